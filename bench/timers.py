"""How long calls take on a device: replays of CUDA graphs over several input sets, or wall-clock time on the CPU."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peers import Call, reason

# Cycles the device idles at the start of a measurement, about 1 ms: the host gets ahead and stays there.
_HEAD_START = 2_000_000
_ROUNDS = 4


@dataclass
class Timed:
    """One library on one row: a runner per input set, and the times so far.

    Attributes:
        mode: "graph", "eager" where capture failed, "cpu".
        capture_failure: why it failed.
        samples: microseconds per call, each the mean of a pass over all input sets.
    """

    runs: list[Callable[[], object]]
    mode: str
    capture_failure: str | None = None
    samples: list[float] = field(default_factory=list)
    outputs: object = None  # of the first input set's graph

    def summary(self) -> dict:
        quarter = statistics.quantiles(self.samples, n=4) if len(self.samples) > 1 else self.samples * 3
        return {
            "us": statistics.median(self.samples),
            "us_quartiles": [quarter[0], quarter[2]],
            "samples": len(self.samples),
            "calls_per_sample": len(self.runs),
            "mode": self.mode,
            "capture_failure": self.capture_failure,
        }


def _capture(call: Call) -> tuple[torch.cuda.CUDAGraph, object]:
    # torch.cuda.graph would collect garbage and empty the allocator's cache each time.
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            outputs = call()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the capture is void already
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, outputs


def prepare(calls: list[Call], device: str) -> Timed:
    """Captures each call in a graph of its own, or leaves all of them as they are where one cannot be captured."""
    if device != "cuda":
        return Timed(list(calls), "cpu")
    try:
        captured = [_capture(call) for call in calls]
        return Timed([graph.replay for graph, _ in captured], "graph", outputs=captured[0][1])
    except Exception as error:
        torch.cuda.synchronize()
        return Timed(list(calls), "eager", reason(error))


def _passes_cuda(timed: Timed, passes: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(passes + 1)]
    torch.cuda._sleep(_HEAD_START)
    timed.runs[-1]()  # what the caches hold is the same in front of every pass
    marks[0].record()
    for mark in marks[1:]:
        for run in timed.runs:
            run()
        mark.record()
    torch.cuda.synchronize()
    return [1e3 * a.elapsed_time(b) / len(timed.runs) for a, b in itertools.pairwise(marks)]


def _passes_cpu(timed: Timed, passes: int) -> list[float]:
    samples = []
    for _ in range(passes):
        start = time.perf_counter()
        for run in timed.runs:
            run()
        samples.append(1e6 * (time.perf_counter() - start) / len(timed.runs))
    return samples


def measure(entries: dict[str, Timed], device: str, seconds: float) -> dict[str, Exception]:
    """Adds samples to each entry, about `seconds` each, in rounds in which all take part: the device's clock meets them alike.

    Returns:
        What went wrong, by name; such an entry is not run again.
    """
    run_passes = _passes_cuda if device == "cuda" else _passes_cpu
    passes, failed = {}, {}
    for turn in range(_ROUNDS + 1):
        for name, timed in entries.items():
            if name in failed:
                continue
            try:
                if turn == 0:  # finds out how many passes fit, and is not counted
                    pass_us = min(run_passes(timed, 2)) * len(timed.runs)
                    passes[name] = min(max(math.ceil(1e6 * seconds / _ROUNDS / pass_us), 2), 100)
                else:
                    timed.samples += run_passes(timed, passes[name])
            except Exception as error:
                failed[name] = error
    return failed


def kernels(call: Call, repeats: int = 10) -> list[dict]:
    """The kernels of a call on the GPU, in the order of their time: name, microseconds and launches per call, share of the sum.

    Kernels that overlap (a dependent launch) count in full, so the sum may exceed the time of the call.
    """
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    sums: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = sums.setdefault(event.name, [0.0, 0])
            entry[0] += event.time_range.elapsed_us()
            entry[1] += 1
    total = sum(us for us, _ in sums.values())
    return [
        {"kernel": name, "us": us / repeats, "launches": count / repeats, "share": us / total}
        for name, (us, count) in sorted(sums.items(), key=lambda item: -item[1][0])
    ]
