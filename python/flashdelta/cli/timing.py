"""Wall-clock times of calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from flashdelta.cli.device import Cpu, Cuda

# Past this much time a median gains nothing from more repeats.
_ENOUGH_SECONDS = 3.0


def median_seconds(call: Callable[[], object], device: Cpu | Cuda, repeats: int = 5, warm: bool = True) -> float:
    """Median time of `call` over `repeats` runs, fewer when they are slow, after one untimed run.

    Args:
        warm: False skips the untimed run (the caller has just made the same call).
    """
    if warm:
        call()
    times: list[float] = []
    while len(times) < repeats and sum(times) < _ENOUGH_SECONDS:
        device.synchronize()
        start = time.perf_counter()
        call()
        device.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
