#!/usr/bin/env python3
"""Builds of the library against one another: the forward pass of several libflashdelta.so in turn, in one run, on the same inputs.

    python3 bench/variants.py before.so after.so                          # a row of each kind
    python3 bench/variants.py before.so after.so --rows 2/8:1x8192 16/16:8x1024 --check
    python3 bench/variants.py a.so b.so c.so --mode exact --batch-invariant

For what a change to a kernel brings: inputs and timing are those of side_by_side.py, rounds alternate between the builds, and a build whose
outputs differ from the first one's in a single bit is marked with an asterisk. Each library is loaded as a file of its own by its C ABI, so
build variants of one tree into other places. Times of one build differ by 1 % between runs, and more on rows that draw so much power that
the clock falls. The Python package must be importable too: it knows the ABI.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path

import flashdelta._lib as abi
import rows
import timers
import torch
from flashdelta._options import CONTEXT_PARALLEL

# One of each kind: uncut and short, the same with few heads, cut; long and cut; long and uncut.
_ROWS = ("16/16:8x1024", "8/32:8x1024", "2/8:1x2048", "2/8:1x8192", "16/16:1x8192", "8/32:4096+4096", "2/8:1x32768", "8/32:4x8192")


class _Options(ctypes.Structure):
    # flashdelta_options
    _fields_ = (
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("has_scale", *abi.INTEGER_OPTIONS)),
        ("context_parallel_tolerance", ctypes.c_double),
        ("stream", ctypes.c_void_p),
    )


class _Arguments(ctypes.Structure):
    # flashdelta_forward_args
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("options", _Options),
        *((name, ctypes.c_void_p) for name in abi.FORWARD_TENSORS[:-1]),
        ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_size_t),
        (abi.FORWARD_TENSORS[-1], ctypes.c_void_p),
    )


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path.resolve()))
        library.flashdelta_last_error.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise SystemExit(f"{path}: {error}") from None
    return library


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "libraries", nargs="+", type=Path, metavar="LIBRARY", help="libflashdelta.so of a build; the first is compared with"
    )
    parser.add_argument("--rows", nargs="+", default=_ROWS, metavar="HEADS:LENGTHS", help=f"(default: {' '.join(_ROWS)})")
    parser.add_argument("--mode", choices=CONTEXT_PARALLEL, default="auto", help="context_parallel (default: auto)")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--check", action="store_true", help="also the errors against the exact result")
    parser.add_argument("--seconds", type=float, default=0.1, help="measuring time per row and library (default: 0.1)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu measures the CPU backend")
    try:
        arguments.rows = [rows.row(*text.partition(":")[::2]) for text in arguments.rows]
    except ValueError as error:
        parser.error(str(error))
    return arguments


class _Call:
    """A call of one library on one input set, its outputs and its workspace."""

    def __init__(self, library: ctypes.CDLL, inputs: rows.Inputs, arguments: argparse.Namespace):
        self.library, self.cuda = library, inputs.q.is_cuda
        self.o, self.final_state = torch.empty_like(inputs.v), torch.empty_like(inputs.initial_state)
        packed = len(inputs.row.sequences) > 1
        tensors = {name: getattr(inputs, name) for name in ("q", "k", "v", "g", "beta", "initial_state")}
        tensors |= {"o": self.o, "final_state": self.final_state} | ({"cu_seqlens": inputs.offsets.int32} if packed else {})
        # A DLManagedTensor begins with its DLTensor; the capsule keeps both.
        self.capsules = {name: torch.utils.dlpack.to_dlpack(tensor) for name, tensor in tensors.items()}
        address = ctypes.pythonapi.PyCapsule_GetPointer
        address.restype, address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        self.arguments = _Arguments(ctypes.sizeof(_Arguments), **{name: address(x, b"dltensor") for name, x in self.capsules.items()})
        self.arguments.options.context_parallel = CONTEXT_PARALLEL[arguments.mode]
        self.arguments.options.batch_invariant = arguments.batch_invariant
        size = ctypes.c_size_t()
        self._must(library.flashdelta_chunk_forward_workspace_size(ctypes.byref(self.arguments), ctypes.byref(size)))
        self.workspace = torch.empty(size.value + 64, dtype=torch.uint8, device=inputs.q.device)
        self.arguments.workspace = (self.workspace.data_ptr() + 63) // 64 * 64
        self.arguments.workspace_size = size.value

    def _must(self, status: int) -> None:
        if status:
            raise RuntimeError(self.library.flashdelta_last_error().decode())

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.arguments.options.stream = torch.cuda.current_stream().cuda_stream if self.cuda else None
        self._must(self.library.flashdelta_chunk_forward(ctypes.byref(self.arguments)))
        return self.o, self.final_state


def _measure(row: rows.Row, libraries: dict[str, ctypes.CDLL], arguments: argparse.Namespace) -> list[str]:
    cache = torch.cuda.get_device_properties(0).L2_cache_size if arguments.device == "cuda" else 0
    sets = rows.input_sets(row, arguments.device, cache)
    exact = rows.exact(sets[0]) if arguments.check else None
    entries, notes, first = {}, {}, None
    for name, library in libraries.items():
        calls = [_Call(library, inputs, arguments) for inputs in sets]
        for output in calls[0]():
            output.fill_(float("nan"))
        outputs = [x.clone() for x in calls[0]()]
        first = first or outputs
        notes[name] = " " if all(torch.equal(x, y) for x, y in zip(outputs, first, strict=True)) else "*"
        if exact:
            errors = (rows.relative_error(x.reshape(y.shape), y) for x, y in zip(outputs, exact, strict=True))
            notes[name] += " ({:.2e}, {:.2e})".format(*errors)
        entries[name] = timers.prepare(calls, arguments.device)
    failed = timers.measure(entries, arguments.device, arguments.seconds)
    if failed:
        raise next(iter(failed.values()))
    return [f"{entries[name].summary()['us']:9.1f}{notes[name]}" for name in libraries]


def main(argv: list[str] | None = None) -> int:
    """Prints microseconds per call, a row of the benchmark a line, a library a column."""
    arguments = _arguments(argv)
    libraries = {str(path): _load(path) for path in arguments.libraries}
    print(f"{'':20}", *(f"{path.stem[-9:]:>9} " for path in arguments.libraries), flush=True)
    with torch.no_grad():
        for row in arguments.rows:
            print(f"{row.label:20}", *_measure(row, libraries, arguments), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
