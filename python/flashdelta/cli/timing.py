"""Times of calls: by the wall clock on the CPU, between events of the device on a GPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from flashdelta.cli.device import Cpu, Cuda

# Past this much time a median gains nothing from more repeats.
_ENOUGH_SECONDS = 3.0
# What a reading between two events should span at least: they resolve half a microsecond, and the first launch has nothing to hide behind.
_LEAST_READING = 2e-3


class Timer(Protocol):
    """One reading in seconds per call of itself; `how` says what was read."""

    how: str

    def __call__(self) -> float: ...


class WallClock:
    """Calls that are done when they return."""

    how = "wall clock"

    def __init__(self, call: Callable[[], object], warm: bool = True):
        self._call = call
        if warm:
            call()

    def __call__(self) -> float:
        start = time.perf_counter()
        self._call()
        return time.perf_counter() - start


class CudaEvents:
    """Replays of a CUDA graph of one call, so that no time of Python's is in them; the call itself where it cannot be captured.

    Args:
        torch: the module.
        call: runs on the current stream.
    """

    def __init__(self, torch: Any, call: Callable[[], object]):
        self._torch = torch
        self._run = self._captured(call)
        self._read(1)
        self._count = max(1, min(100, math.ceil(_LEAST_READING / max(self._read(1), 1e-9))))

    def _captured(self, call: Callable[[], object]) -> Callable[[], object]:
        cuda = self._torch.cuda
        side = cuda.Stream()  # capture must not meet work of the first call on the same stream
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            call()
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        try:
            with cuda.graph(graph):
                self._results = call()  # held: the graph writes them
        except RuntimeError:
            cuda.synchronize()
            self.how = "eager"
            return call
        self.how = "graph"
        return graph.replay

    def _read(self, count: int) -> float:
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            self._run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / count

    def __call__(self) -> float:
        return self._read(self._count)


def median_seconds(call: Callable[[], object], device: Cpu | Cuda, repeats: int = 5, warm: bool = True) -> float:
    """Median time of `call`: see `medians`.

    Args:
        warm: False skips the untimed run on the CPU (the caller has just made the same call).
    """
    return medians({"": device.timer(call, warm)}, repeats)[""]


def medians(timers: Mapping[str, Timer], repeats: int = 5) -> dict[str, float]:
    """Median reading of each timer over `repeats` rounds, fewer when they are slow.

    A round reads every timer once, so that whatever else the machine does meets all of them and their ratios stay fair.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    start, rounds = time.perf_counter(), 0
    while rounds < repeats and time.perf_counter() - start < _ENOUGH_SECONDS * len(timers):
        rounds += 1
        for name, timer in timers.items():
            times[name].append(timer())
    return {name: statistics.median(values) for name, values in times.items()}
