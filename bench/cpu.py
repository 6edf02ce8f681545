#!/usr/bin/env python3
"""Records the CPU table: `flashdelta bench --suite cpu` into bench/results/cpu-<processor>-<date>.json, with .md and .svg beside it.

Run it on an otherwise idle machine: ./run python bench/cpu.py [further arguments of `flashdelta bench`]

It needs numpy, ml_dtypes and apache-tvm-ffi; without matplotlib there is no .svg. A machine with nothing else can run a build made
elsewhere, tvm-ffi's wheel unpacked beside it:

    FLASHDELTA_LIBRARY=<folder of libflashdelta_ffi.so> PYTHONPATH=python:<unpacked wheel> python3 bench/cpu.py
"""

import contextlib
import datetime
import importlib.util
import json
import re
import sys
from pathlib import Path

import flashdelta
from flashdelta.cli import main

COLUMNS = (
    "",
    "dtype",
    "instruction set",
    "threads",
    "prefill",
    "token by token",
    "ggml's schedule",
    "ratio",
    "to ggml's schedule",
    "GFLOP/s",
    "of peak",
    "backward",
    "to prefill",
)


def markdown(report: dict) -> str:
    """The report of `flashdelta bench` as a table: a row per shape, microseconds per token and value head."""
    rows = []
    for shape in report["shapes"]:
        passes = {entry["pass"]: entry for entry in shape["passes"]}
        forward = passes["forward"]
        rows.append(
            (
                f"{forward['key_heads']}/{forward['value_heads']}, d = {forward['key_width']}, {forward['tokens']} tokens",
                forward["dtype"],
                forward["instruction_set"],
                str(forward["threads"]),
                f"{forward['us_per_token_head']:.2f} us",
                f"{passes['recurrent']['us_per_token_head']:.2f} us",
                f"{shape['chunked_over_separate_passes'] * forward['us_per_token_head']:.2f} us",
                f"{shape['chunked_over_token_by_token']:.2f}x",
                f"{shape['chunked_over_separate_passes']:.2f}x",
                f"{forward['gflops']:.0f}",
                "-" if forward["share_of_peak"] is None else f"{100 * forward['share_of_peak']:.0f} % of {forward['peak_gflops']:.0f}",
                f"{passes['backward']['us_per_token_head']:.2f} us",
                f"{shape['backward_over_forward']:.2f}x",
            )
        )
    lines = [f"{report['processor']}, {report['threads_available']} threads, {report['date']}; times per token and value head", ""]
    lines += [f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    return "\n".join(lines) + "\n"


def record(arguments: list[str]) -> int:
    """Runs the suite with further `arguments` of `flashdelta bench`; returns its exit code."""
    processor = re.sub(r"[^a-z0-9]+", "-", flashdelta.info()["cpu"]["processor"].lower()).strip("-") or "unknown"
    results = Path(__file__).resolve().parent / "results"
    results.mkdir(exist_ok=True)
    stem = results / f"cpu-{processor}-{datetime.date.today().isoformat()}"
    plot = ["--plot", f"{stem}.svg"] if importlib.util.find_spec("matplotlib") else []
    report = stem.with_name(f"{stem.name}.json")
    with report.open("w") as file, contextlib.redirect_stdout(file):
        code = main(["bench", "--device", "cpu", "--suite", "cpu", "--json", "-", *plot, *arguments])
    if code:
        report.unlink()
        return code
    table = markdown(json.loads(report.read_text()))
    stem.with_name(f"{stem.name}.md").write_text(table)
    print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(record(sys.argv[1:]))
