"""Options that several subcommands share, with the checks of their values."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import flashdelta
from flashdelta.cli.device import DEVICES
from flashdelta.cli.dtypes import DTYPES
from flashdelta.cli.errors import UsageError

INSTRUCTION_SETS = ("best", "baseline", "avx2", "avx512")
# What the library calls the sets in `info`.
_SETS_BY_NAME = {"AVX512": "avx512", "AVX2": "avx2", "SSSE3": "baseline", "NEON": "baseline"}


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number within [low, high]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not within {low}..{high}")
        return value

    return parse


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: the GPU where one can be used, else the CPU (default)")


def add_cpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=integer(0, 1024), default=0, metavar="N", help="CPU threads; 0: all this process may use (default)"
    )
    parser.add_argument(
        "--instruction-set", choices=INSTRUCTION_SETS, default="best", help="CPU: which build of the kernels runs (default: best)"
    )


def add_dtype(parser: argparse.ArgumentParser, default: str = "bf16") -> None:
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=default, help=f"of q, k, v (default: {default})")


def add_seed(parser: argparse.ArgumentParser, default: int | None, text: str) -> None:
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=default, metavar="S", help=text)


@functools.cache  # `info` also asks the GPU's driver, which takes its time
def _sets_here() -> tuple[str, ...]:
    names = [_SETS_BY_NAME[name.upper()] for name in flashdelta.info()["cpu"]["instruction_sets"]]
    return tuple(dict.fromkeys(names))


def instruction_sets_here() -> list[str]:
    """The instruction sets that this build holds and this processor runs, best first, by the names that calls take."""
    return list(_sets_here())


def check_instruction_set(name: str) -> None:
    """Raises UsageError where --instruction-set `name` cannot run here."""
    if name != "best" and name not in instruction_sets_here():
        raise UsageError(f"--instruction-set {name}: this machine and build run {', '.join(instruction_sets_here()) or 'none'}")
