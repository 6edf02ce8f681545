#!/usr/bin/env python3
"""The first call of a library in a fresh process: python3 bench/first_call.py LIBRARY HEADS LENGTHS [LENGTHS...]

Prints one line of JSON: seconds to import the library, of the first call, of the second. CUDA is initialised and the inputs are made
before. `first_calls` runs it with an empty home folder, so that no cache of compiled kernels is found; `compile_all` runs it beforehand
for many head layouts at once, so that a benchmark finds its kernels on disk.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

_SELF = Path(__file__).resolve()
_PATIENCE = 300  # seconds: the slowest library known takes 30


def _synchronize(torch, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _run(name: str, heads: str, lengths: list[str]) -> dict:
    import torch
    from peers import LIBRARIES
    from rows import Offsets, make_inputs, row

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sets = []
    for text in lengths:
        one = row(heads, text)
        sets.append(make_inputs(one, Offsets.of(one, device), 0, device))
    _synchronize(torch, device)
    times, start = [], time.perf_counter()
    library = LIBRARIES[name]()
    imported = time.perf_counter() - start
    with torch.no_grad():
        for inputs in sets:
            call = library.bind(inputs)
            _synchronize(torch, device)
            for _ in range(2):
                start = time.perf_counter()
                call()
                _synchronize(torch, device)
                times.append(time.perf_counter() - start)
    return {"import_s": imported, "first_call_s": times[0], "second_call_s": times[1]}


def _spawn(arguments: list[str], environment: dict[str, str]) -> dict:
    command = [sys.executable, str(_SELF), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {_PATIENCE} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}


def first_calls(names: Iterable[str], heads: str, lengths: str) -> dict[str, dict]:
    """Import, first and second call of each library, one after the other, with nothing compiled before."""
    results = {}
    for name in names:
        with tempfile.TemporaryDirectory() as home:
            # All of them keep what they compile below the home folder; packages that the user installed are there as well.
            clean = {
                "HOME": home,
                "XDG_CACHE_HOME": f"{home}/.cache",
                "CUDA_CACHE_PATH": f"{home}/.nv",
                "PYTHONUSERBASE": site.getuserbase(),
            }
            environment = {k: v for k, v in os.environ.items() if not k.endswith("_CACHE_DIR")} | clean
            results[name] = _spawn([name, heads, lengths], environment)
    return results


def compile_all(jobs: Iterable[tuple[str, str, list[str]]], workers: int) -> Iterator[tuple[str, str, dict]]:
    """Runs (library, head layout, lengths) in so many processes at once; yields (library, head layout, times or error) of each as it ends.

    FLA times its variants while others use the GPU, so its choice is not kept.
    """
    environment = {**os.environ, "FLA_CACHE_RESULTS": "0"}
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        running = {pool.submit(_spawn, [name, heads, *lengths], environment): (name, heads) for name, heads, lengths in jobs}
        for future in as_completed(running):
            yield *running[future], future.result()


if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1], sys.argv[2], sys.argv[3:])))
