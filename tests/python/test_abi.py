"""What Python knows of the C ABI against the header itself."""

import re
from pathlib import Path

import flashdelta._lib as lib
import pytest
from flashdelta import _options

HEADER = Path(__file__).parents[2] / "include" / "flashdelta" / "flashdelta.h"


def fields_of(struct: str) -> list[str]:
    body = re.search(rf"typedef struct {struct} {{(.*?)}} {struct};", HEADER.read_text(), re.DOTALL).group(1)
    return re.findall(r"(\w+);", re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL))


@pytest.mark.parametrize(
    ("struct", "names"),
    [
        ("flashdelta_options", lib.OPTIONS),
        (
            "flashdelta_forward_args",
            ("struct_size", "options", *lib.FORWARD_TENSORS[:-1], "workspace", "workspace_size", lib.FORWARD_TENSORS[-1]),
        ),
        ("flashdelta_backward_args", ("struct_size", "options", *lib.BACKWARD_TENSORS, "workspace", "workspace_size")),
    ],
)
def test_fields_stand_in_the_headers_order(struct, names):
    assert list(names) == fields_of(struct)


def test_choices_have_the_headers_numbers():
    text = HEADER.read_text()
    for prefix, choices in (
        ("BACKEND", _options.BACKEND),
        ("CONTEXT_PARALLEL", _options.CONTEXT_PARALLEL),
        ("INSTRUCTION_SET", _options.INSTRUCTION_SET),
    ):
        found = {name.lower(): int(number) for name, number in re.findall(rf"FLASHDELTA_{prefix}_(\w+) = (\d+)", text)}
        assert found == choices


def test_chunk_is_the_headers():
    assert f"#define FLASHDELTA_CHUNK {_options.CHUNK}\n" in HEADER.read_text()
