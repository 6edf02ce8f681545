"""`flashdelta info`: what this build holds and this machine offers."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata

import flashdelta
from flashdelta.cli import errors, ui

_PACKAGES = ("numpy", "ml_dtypes", "torch", "apache-tvm-ffi", "safetensors", "matplotlib")


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    text = "Shows the backends built and usable here, the CPU's instruction sets, the GPUs, and versions."
    parser = commands.add_parser("info", help="backends, instruction sets, GPUs, versions", description=text)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def main(args: argparse.Namespace) -> int:
    info = flashdelta.info()
    info["versions"] = _versions()
    if args.json:
        print(json.dumps(info, indent=2))
        return errors.OK
    console = ui.stdout()
    cpu, cuda = info["cpu"], info["cuda"]
    table = ui.table(f"flashdelta {info['version']}", "what", "here")
    table.add_row("backends", ", ".join(info["backends"]))
    table.add_row("processor", cpu["processor"])
    table.add_row("instruction sets", ", ".join(cpu["instruction_sets"]) or "none")
    table.add_row("threads", str(cpu["threads"]))
    table.add_row("CUDA built", "yes" if cuda["built"] else "no")
    for i, gpu in enumerate(cuda["devices"]):
        table.add_row(
            f"GPU {i}",
            f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['multiprocessors']} SMs, {ui.size(gpu['memory'])}",
        )
    if not cuda["devices"]:
        table.add_row("GPUs", f"none ({cuda['problem']})" if cuda["problem"] else "none")
    for name, version in info["versions"].items():
        table.add_row(name, version or "not installed")
    console.print(table)
    return errors.OK
