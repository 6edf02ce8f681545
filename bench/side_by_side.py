#!/usr/bin/env python3
"""The forward pass of flashdelta beside flash-linear-attention, FlashQLA and FlashInfer: one run, the same inputs, on one GPU.

    python3 bench/side_by_side.py                       # all rows, all libraries that can be imported
    python3 bench/side_by_side.py --quick               # the six rows with a sequence and head for every multiprocessor
    python3 bench/side_by_side.py --heads 16/64 --lengths 4x8192 3000+120
    python3 bench/side_by_side.py --first-call --no-rows
    python3 bench/side_by_side.py --kernels --quick     # where flashdelta's time goes

Results: OUT/side-by-side-DEVICE-DATE.json, written after every row, with .md and two .svg beside it. docs/benchmarks.md says what the
numbers mean and how to install the libraries.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import first_call
import peers
import report as reporting
import rows
import timers
import torch

_RESULTS = Path(__file__).resolve().parent / "results"
# docs/numerics.md, bf16 inputs.
_CONTRACT = {"o": 5e-3, "final_state": 4e-3}
# Beyond this a result is not a rounding of the right one, and its time says nothing.
_WRONG = 5e-2
_FIRST_CALL_ROW = ("8/32", "1x8192")


class ContextLostError(RuntimeError):
    """A kernel left the GPU in a state in which this process cannot go on."""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = [name for name in peers.LIBRARIES if name != "flashdelta"]
    parser.add_argument("--heads", nargs="+", default=None, metavar="KEY/VALUE", help=f"head layouts (default: {' '.join(rows.HEADS)})")
    parser.add_argument("--lengths", nargs="+", default=None, metavar="PACK", help=f"packs (default: {' '.join(rows.LENGTHS)})")
    parser.add_argument("--quick", action="store_true", help="the six full rows only")
    parser.add_argument("--peers", nargs="*", choices=others, default=None, help="other libraries (default: all; with --kernels: none)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, flashdelta alone")
    parser.add_argument("--seconds", type=float, default=0.2, help="measuring time per row and library (default: 0.2)")
    parser.add_argument("--first-call", action="store_true", help="also measure first calls, each in a fresh process")
    parser.add_argument("--no-rows", action="store_true", help="no table: with --first-call")
    parser.add_argument("--kernels", action="store_true", help="instead of the table, the kernels of each row and their shares")
    parser.add_argument("--compile-jobs", type=int, default=None, help="processes that compile the others' kernels beforehand; 0: none")
    parser.add_argument("--roof", nargs=2, type=float, metavar=("TFLOPS", "TBPS"), help="the device's roof (known: H100, H200)")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder for the results (default: bench/results)")
    parser.add_argument("--append", action="store_true", help="keep the other rows of a result file of today")
    arguments = parser.parse_args(argv)
    if arguments.quick and (arguments.heads or arguments.lengths):
        parser.error("--quick chooses its own rows: leave out --heads and --lengths")
    try:
        arguments.rows = _rows(arguments)
    except ValueError as error:
        parser.error(str(error))
    if arguments.kernels and arguments.device != "cuda":
        parser.error("--kernels needs --device cuda")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu makes a dry run")
    if arguments.peers is None:
        arguments.peers = [] if arguments.kernels or arguments.device == "cpu" else others
    return arguments


def _rows(arguments: argparse.Namespace) -> list[rows.Row]:
    if arguments.no_rows:
        return []
    if arguments.quick:
        return [rows.row(*pair) for pair in rows.QUICK]
    return [rows.row(heads, pack) for heads in arguments.heads or rows.HEADS for pack in arguments.lengths or rows.LENGTHS]


def _device(kind: str) -> dict:
    if kind == "cpu":
        return {"name": platform.processor() or platform.machine(), "kind": "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "kind": "cuda",
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
    }


def _commit() -> str | None:
    # Of the checkout that this file is in; a copy without git has none.
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions(libraries: dict[str, peers.Library]) -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for library in libraries.values():
        versions |= library.versions()
    return versions


class Run:
    """One run of the program: its libraries, what it has measured, and the file it keeps that in."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.device = arguments, _device(arguments.device)
        self.cuda = arguments.device == "cuda"
        self.roof = rows.Roof(*arguments.roof) if arguments.roof else rows.roof_of(self.device["name"])
        self.libraries, absent = peers.load(["flashdelta", *arguments.peers])
        today = datetime.date.today().isoformat()
        device = re.sub(r"[^a-z0-9]+", "-", self.device["name"].lower()).strip("-")
        kind = "kernels" if arguments.kernels else "side-by-side"
        self.stem = arguments.out / f"{kind}-{device}-{today}"
        self.report = {
            "date": today,
            "device": self.device,
            "commit": _commit(),
            "versions": _versions(self.libraries),
            "absent": absent,
            "roof": self.roof._asdict() if self.roof else None,
            "rows": [],
        }
        if arguments.append:
            self._take_over()
        self.unmet: list[str] = []

    def _take_over(self) -> None:
        path = self._json()
        if path.is_file():
            old = json.loads(path.read_text())
            self.report["rows"] = old["rows"]
            self.report["versions"] = old["versions"] | self.report["versions"]
            self.report["absent"] = {k: v for k, v in old["absent"].items() if k not in self.libraries} | self.report["absent"]
            self.report |= {key: old[key] for key in ("first_call", "geometric_mean", "exact_error") if key in old}

    def _json(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}.json")

    def save(self) -> None:
        """Writes the JSON file anew, in one step: a run that is stopped leaves the rows it had."""
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        partial = self.stem.with_name(f"{self.stem.name}.partial")
        partial.write_text(json.dumps(self.report, indent=1) + "\n")
        partial.replace(self._json())

    def add(self, entry: dict) -> None:
        """Takes a row into the report, in place of an older one of the same name, and saves."""
        kept = [row for row in self.report["rows"] if (row["heads"], row["lengths"]) != (entry["heads"], entry["lengths"])]
        self.report["rows"] = sorted([*kept, entry], key=_row_order)
        ratios = [row["ratio"] for row in self.report["rows"] if row.get("ratio")]
        mean = reporting.geometric_mean(ratios)
        self.report["geometric_mean"] = {"ratio": mean, "rows": len(ratios)} if mean else None
        self.save()

    def contain(self, error: Exception, name: str, row: rows.Row) -> dict:
        """The cell of a library that failed. Raises ContextLostError where nothing else can run any more."""
        if self.cuda:
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                raise ContextLostError(f"{name} on {row.label}: {peers.reason(error)}") from error
        if name == "flashdelta":
            self.unmet.append(f"{row.label}: {peers.reason(error)}")
        return {"error": peers.reason(error)}

    def inputs(self, row: rows.Row) -> list[rows.Inputs]:
        """Input sets of the row, more than the L2 cache holds."""
        return rows.input_sets(row, self.arguments.device, self.device.get("l2_bytes", 0))


def _row_order(row: dict) -> tuple:
    def rank(names: tuple[str, ...], name: str) -> int:
        return names.index(name) if name in names else len(names)

    return rank(rows.HEADS, row["heads"]), row["heads"], rank(rows.LENGTHS, row["lengths"])


def _errors(library: peers.Library, result: peers.Result, exact: peers.Result) -> dict[str, float]:
    return {
        name: rows.relative_error(x, exact_x) for name, x, exact_x in zip(("o", "final_state"), library.result(result), exact, strict=True)
    }


def _checked(run: Run, row: rows.Row, name: str, calls: list[peers.Call], exact: peers.Result) -> tuple[timers.Timed, dict]:
    # A library's errors, of the plain call and of the captured one, before it is timed; raises where it is wrong.
    library = run.libraries[name]
    calls[0]()
    errors = _errors(library, calls[0](), exact)
    timed = timers.prepare(calls, run.arguments.device)
    if timed.mode == "graph":
        timed.runs[0]()
        replayed = _errors(library, timed.outputs, exact)
        errors = {key: max(errors[key], replayed[key]) for key in errors}
    if max(errors.values()) > _WRONG:
        raise ArithmeticError(f"wrong: error of o {errors['o']:.1e}, of the final state {errors['final_state']:.1e}")
    if name == "flashdelta" and any(errors[key] > bound for key, bound in _CONTRACT.items()):
        run.unmet.append(f"{row.label}: error of o {errors['o']:.1e}, of the final state {errors['final_state']:.1e}, beyond the contract")
    return timed, {f"error_{key}": value for key, value in errors.items()}


def _measure(run: Run, row: rows.Row) -> dict:
    sets = run.inputs(row)
    exact = rows.exact(sets[0])
    entries, cells = {}, {}
    for name, library in run.libraries.items():
        try:
            entries[name], cells[name] = _checked(run, row, name, [library.bind(inputs) for inputs in sets], exact)
        except Exception as error:
            cells[name] = run.contain(error, name, row)
    del exact
    for name, error in timers.measure(entries, run.arguments.device, run.arguments.seconds).items():
        cells[name] = run.contain(error, name, row)
    floor = row.floor(run.roof)
    for name, timed in entries.items():
        if "error" not in cells[name]:
            cells[name] |= timed.summary()
            cells[name]["us_sm_per_chunk_head"] = cells[name]["us"] * run.device["multiprocessors"] / row.chunk_heads if run.cuda else None
            cells[name]["share_of_floor"] = floor.us / cells[name]["us"] if floor else None
    times = {name: cells[name]["us"] for name in cells if "us" in cells[name]}
    best = min((name for name in times if name != "flashdelta"), key=times.__getitem__, default=None)
    return {
        "heads": row.heads,
        "lengths": row.lengths,
        "sequences": row.sequences,
        "tokens": row.tokens,
        "chunk_heads": row.chunk_heads,
        "input_sets": len(sets),
        "floor_us": floor.us if floor else None,
        "floor_tensor_us": floor.tensor_us if floor else None,
        "floor_bytes_us": floor.bytes_us if floor else None,
        "libraries": cells,
        "best_peer": best if "flashdelta" in times else None,
        "ratio": times[best] / times["flashdelta"] if best and "flashdelta" in times else None,
    }


def _line(entry: dict) -> str:
    cells = [f"{reporting.LABELS[name]} {reporting.cell(cell, entry)}" for name, cell in entry["libraries"].items()]
    ratio = f"   ratio {entry['ratio']:.2f}x" if entry["ratio"] else ""
    return f"{entry['heads']:>6} {entry['lengths']:<11} {'   '.join(cells)}{ratio}"


def _compile(run: Run) -> None:
    """Lets the other libraries compile for all head layouts at once; what they keep on disk this process finds there."""
    workers = run.arguments.compile_jobs
    if workers is None:
        workers = max((os.cpu_count() or 1) * 3 // 4, 1)
    packs: dict[str, list[str]] = {}
    for row in run.arguments.rows:
        packs.setdefault(row.heads, []).append(row.lengths)
    jobs = [(name, heads, lengths) for name, lib in run.libraries.items() if lib.compiles_to_disk for heads, lengths in packs.items()]
    if not run.cuda or not workers or len(jobs) < 2:
        return
    start = time.perf_counter()
    print(f"compiling: {len(jobs)} processes, {min(workers, len(jobs))} at a time", flush=True)
    for name, heads, result in first_call.compile_all(jobs, workers):
        outcome = result.get("error", f"after {time.perf_counter() - start:.0f} s")
        print(f"  {reporting.LABELS[name]}, {heads}: {outcome}", flush=True)
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)


def _prime(run: Run, heads: str) -> None:
    """One call of each library on the layout's longest row: what is tuned at the first call is tuned there."""
    row = max((row for row in run.arguments.rows if row.heads == heads), key=lambda row: row.tokens)
    inputs = rows.make_inputs(row, rows.Offsets.of(row, "cuda"), 0, "cuda")
    taken = []
    for name, library in run.libraries.items():
        start = time.perf_counter()
        try:
            library.bind(inputs)()
            torch.cuda.synchronize()
        except Exception as error:  # shows again in the row's cell
            run.contain(error, name, row)
            continue
        taken.append(f"{library.label} {time.perf_counter() - start:.2f} s")
    print(f"{heads}: first call {', '.join(taken)}", flush=True)


def _table(run: Run) -> None:
    _compile(run)
    if "flashdelta" in run.libraries:
        run.report["exact_error"] = rows.check_exact(run.libraries["flashdelta"].module.chunk_gated_delta_rule)
        print(f"float64 chunks against float64 recurrence: error {run.report['exact_error']:.1e}", flush=True)
        if run.report["exact_error"] > 1e-9:
            raise SystemExit("the exact result of this benchmark is not that of the reference backend")
    primed: set[str] = set()
    for row in run.arguments.rows:
        if run.cuda and row.heads not in primed:
            primed.add(row.heads)
            _prime(run, row.heads)
        entry = _measure(run, row)
        run.add(entry)
        print(_line(entry), flush=True)
        if run.cuda:
            torch.cuda.empty_cache()


def _kernels(run: Run) -> None:
    for row in run.arguments.rows:
        inputs = run.inputs(row)[0]
        entry = {"heads": row.heads, "lengths": row.lengths, "libraries": {}}
        for name, library in run.libraries.items():
            try:
                found = entry["libraries"][name] = timers.kernels(library.bind(inputs))
            except Exception as error:
                entry["libraries"][name] = run.contain(error, name, row)
                continue
            print(f"{row.label}: {library.label}, kernels together {sum(kernel['us'] for kernel in found):.1f} us", flush=True)
            for kernel in found:
                short = re.sub(r"\(.*|^void ", "", kernel["kernel"])[:90]
                print(f"  {kernel['us']:9.1f} us {100 * kernel['share']:5.1f} %  x{kernel['launches']:g}  {short}", flush=True)
        run.add(entry)


def _first_calls(run: Run) -> None:
    results = first_call.first_calls(run.libraries, *_FIRST_CALL_ROW)
    run.report["first_call"] = {"row": ", ".join(_FIRST_CALL_ROW), "libraries": results}
    run.save()


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 where flashdelta failed or missed its contract, 2 where the GPU was lost."""
    run = Run(_arguments(argv))
    for name, why in run.report["absent"].items():
        print(f"{reporting.LABELS[name]} is absent: {why}", flush=True)
    start, code = time.perf_counter(), 0
    try:
        with torch.no_grad():
            if run.arguments.first_call:
                _first_calls(run)
            if run.arguments.kernels:
                _kernels(run)
                return int(bool(run.unmet))
            _table(run)
    except ContextLostError as lost:
        print(f"the GPU is lost to this process: {lost}\nleave that library out with --peers and go on with --append", file=sys.stderr)
        code = 2
    run.save()
    reporting.show(run.report)
    print(*(f"wrote {path}" for path in (run._json(), *reporting.write(run.report, run.stem))), sep="\n")
    print(f"{len(run.arguments.rows)} rows in {time.perf_counter() - start:.0f} s")
    for text in run.unmet:
        print(f"flashdelta: {text}", file=sys.stderr)
    return code or int(bool(run.unmet) or "flashdelta" in run.report["absent"])


if __name__ == "__main__":
    sys.exit(main())
