"""Exit codes of the program, and the error that ends it with one line on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

OK = 0
FAILED = 1  # a check ran and did not hold: an error outside the contract, a failing case
USAGE = 2  # the command line, an input file or the machine does not allow what was asked
INTERRUPTED = 130  # what a shell reports for SIGINT


class UsageError(Exception):
    """Bad input from the user: printed as one line, exit code 2."""


@contextmanager
def library_errors() -> Iterator[None]:
    """The library's refusals of what the user gave become usage errors; its text already names the argument and what is allowed."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    except MemoryError as error:
        raise UsageError("out of memory; take fewer tokens, heads or batch rows") from error
