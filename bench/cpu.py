#!/usr/bin/env python3
"""Records the CPU table: `flashdelta bench --suite cpu` into bench/results/cpu-<processor>-<date>.json and .svg beside it.

Run it on an otherwise idle machine: ./run python bench/cpu.py
"""

import datetime
import re
import sys
from pathlib import Path

import flashdelta
from flashdelta.cli import main


def record(arguments: list[str]) -> int:
    """Runs the suite with further `arguments` of `flashdelta bench`; returns its exit code."""
    processor = re.sub(r"[^a-z0-9]+", "-", flashdelta.info()["cpu"]["processor"].lower()).strip("-") or "unknown"
    results = Path(__file__).resolve().parent / "results"
    results.mkdir(exist_ok=True)
    stem = results / f"cpu-{processor}-{datetime.date.today().isoformat()}"
    files = ["--json", f"{stem}.json", "--plot", f"{stem}.svg"]
    return main(["bench", "--device", "cpu", "--suite", "cpu", *files, *arguments])


if __name__ == "__main__":
    sys.exit(record(sys.argv[1:]))
