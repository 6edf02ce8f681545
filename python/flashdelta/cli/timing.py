"""Wall-clock times of calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from flashdelta.cli.device import Cpu, Cuda

# Past this much time a median gains nothing from more repeats.
_ENOUGH_SECONDS = 3.0


def median_seconds(call: Callable[[], object], device: Cpu | Cuda, repeats: int = 5, warm: bool = True) -> float:
    """Median time of `call`: see `medians`."""
    return medians({"": call}, device, repeats, warm)[""]


def medians(calls: Mapping[str, Callable[[], object]], device: Cpu | Cuda, repeats: int = 5, warm: bool = True) -> dict[str, float]:
    """Median time of each call over `repeats` rounds, fewer when they are slow, after one untimed run of each.

    A round runs every call once, so that whatever else the machine does meets all of them and their ratios stay fair.

    Args:
        warm: False skips the untimed runs (the caller has just made the same calls).
    """
    if warm:
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent, rounds = 0.0, 0
    while rounds < repeats and spent < _ENOUGH_SECONDS * len(calls):
        rounds += 1
        for name, call in calls.items():
            device.synchronize()
            start = time.perf_counter()
            call()
            device.synchronize()
            times[name].append(time.perf_counter() - start)
            spent += times[name][-1]
    return {name: statistics.median(values) for name, values in times.items()}
