"""The command line: options, help, exit codes. Each subcommand is a module with `add_parser` and `main(args) -> exit code`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from flashdelta.cli import errors

_DESCRIPTION = """The gated delta rule (Gated DeltaNet) of Qwen3-Next / 3.5 class models: chunked prefill, backward, and token-by-token
decode, on the CPU and, where built, on NVIDIA GPUs."""

_EPILOG = """exit codes: 0 done; 1 a check failed (an error outside the numerics contract, a failing case); 2 bad usage or input.
`flashdelta COMMAND --help` explains each command."""


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors: the usage text is for those who ask for it."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{self.prog}: error: {message} (see {self.prog} --help)")
        raise SystemExit(errors.USAGE)


def _complain(line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    # The subcommands are imported here, so that importing the entry point costs nothing.
    from flashdelta import _lib
    from flashdelta.cli import bench, demo, info, run, verify

    top = _Parser(prog="flashdelta", description=_DESCRIPTION, epilog=_EPILOG)
    version = _lib.library().flashdelta_version().decode()  # `info` would ask the GPU's driver for every --help
    top.add_argument("--version", action="version", version=f"flashdelta {version}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for module in (info, demo, verify, bench, run):
        made = module.add_parser(commands)
        made.set_defaults(main=module.main, prog=made.prog)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with `argv` (the process's own by default) and returns its exit code."""
    prog = "flashdelta"
    try:
        args = parser().parse_args(argv)
        prog = args.prog
        code = args.main(args)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse's, for --help, --version and usage errors
        return int(stop.code or 0)
    except (errors.UsageError, ImportError) as error:  # ImportError: the library or an optional package is missing; it says which
        _complain(f"{prog}: error: {error}")
        return errors.USAGE
    except KeyboardInterrupt:
        _complain(f"{prog}: interrupted")
        return errors.INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough (`flashdelta bench | head`). Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.OK
