"""What `flashdelta bench` measures: one shape on one device, pass by pass."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import flashdelta
from flashdelta.cli import device, flops, timing
from flashdelta.cli.dtypes import DTYPES
from flashdelta.cli.models import HeadLayout

PASSES = ("forward", "backward", "recurrent")


@dataclass(frozen=True)
class Shape:
    """What is computed, and how."""

    heads: HeadLayout
    tokens: int
    batch: int
    dtype: str
    instruction_set: str = "best"
    threads: int = 0

    @property
    def token_heads(self) -> int:
        return self.batch * self.tokens * self.heads.value_heads

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self.heads), "tokens": self.tokens, "batch": self.batch, "dtype": self.dtype} | {
            "instruction_set": self.instruction_set,
            "threads": self.threads,
        }


@dataclass
class Result:
    """One pass of one shape."""

    shape: Shape
    operation: str
    seconds: float
    extra_bytes: int | None  # workspace: what the call allocates beyond what it returns; None where it cannot be seen
    peak_gflops: float | None  # of the same instruction set and threads

    @property
    def gflops(self) -> float:
        width = (self.shape.heads.key_width, self.shape.heads.value_width)
        return flops.PER_TOKEN[self.operation](*width) * self.shape.token_heads / self.seconds * 1e-9

    @property
    def us_per_token_head(self) -> float:
        return 1e6 * self.seconds / self.shape.token_heads

    @property
    def floor_share(self) -> float | None:
        """Time at the measured peak over the time taken."""
        return self.gflops / self.peak_gflops if self.peak_gflops else None

    def as_json(self) -> dict[str, Any]:
        return {
            **self.shape.as_json(),
            "pass": self.operation,
            "seconds": self.seconds,
            "us_per_token_head": self.us_per_token_head,
            "gflops": self.gflops,
            "peak_gflops": self.peak_gflops,
            "floor_seconds": self.seconds * self.floor_share if self.floor_share else None,
            "share_of_peak": self.floor_share,
            "extra_bytes": self.extra_bytes,
        }


def inputs(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Random q, k, v, raw gates and beta logits with a model's decays: all flags in the kernel, as a model calls."""
    rng = np.random.default_rng(seed)
    heads, dtype = shape.heads, DTYPES[shape.dtype]
    rows = (shape.batch, shape.tokens)

    def normal(*tail: int) -> np.ndarray:
        return rng.standard_normal((*rows, *tail), dtype=np.float32).astype(dtype)

    dt = np.exp(rng.uniform(np.log(0.001), np.log(0.1), heads.value_heads))
    return {
        "q": normal(heads.key_heads, heads.key_width),
        "k": normal(heads.key_heads, heads.key_width),
        "v": normal(heads.value_heads, heads.value_width),
        "g": normal(heads.value_heads),
        "beta": normal(heads.value_heads),
        "A_log": np.log(rng.uniform(1.0, 16.0, heads.value_heads)).astype(np.float32),
        "dt_bias": np.log(np.expm1(dt)).astype(np.float32),
    }


def peak_gflops(instruction_set: str, threads: int) -> float | None:
    """The CPU's fp32 peak with one instruction set, measured by the library; None where it offers no such measurement."""
    from flashdelta import _lib

    function = getattr(_lib, "cpu_peak_gflops", None)
    return None if function is None else float(function(instruction_set, threads))


def _extra_bytes(call: Callable[[], Any], place: device.Cpu | device.Cuda) -> int | None:
    """What a call allocates through NumPy at its peak, beyond what it returns: that is the workspace."""
    if place.backend != "cpu":
        return None
    tracemalloc.start()
    try:
        returned = call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    arrays = {id(x): x for x in returned if isinstance(x, np.ndarray)}
    return max(0, peak - sum(x.nbytes for x in arrays.values()))


def run(shape: Shape, passes: tuple[str, ...], place: device.Cpu | device.Cuda, repeats: int, advance: Callable[[], None]) -> list[Result]:
    """Measures `passes` of `shape`, in that order."""
    placed = {name: place.put(x) for name, x in inputs(shape).items()}
    flags = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    common = {**placed, **flags, "backend": place.backend, "num_threads": shape.threads, "instruction_set": shape.instruction_set}
    peak = peak_gflops(shape.instruction_set, shape.threads) if place.backend == "cpu" else None

    def forward() -> Any:
        return flashdelta.chunk_gated_delta_rule(**common, output_final_state=True)

    def recurrent() -> Any:
        return flashdelta.fused_recurrent_gated_delta_rule(**common, output_final_state=True)

    calls = {"forward": forward, "recurrent": recurrent}
    if "backward" in passes:
        saved = flashdelta.chunk_gated_delta_rule_fwd(**common, output_h=True, output_g_cumsum=True, output_A=True)
        d_o = place.put(
            np.random.default_rng(1).standard_normal(place.get(placed["v"]).shape, dtype=np.float32).astype(DTYPES[shape.dtype])
        )

        def backward() -> Any:
            return flashdelta.chunk_gated_delta_rule_bwd(**common, do=d_o, h=saved.h, g_cumsum=saved.g_cumsum, A=saved.A)

        calls["backward"] = backward
    results = []
    for name in passes:
        extra = _extra_bytes(calls[name], place)  # runs the call once: the timing below needs no warm-up of its own
        seconds = timing.median_seconds(calls[name], place, repeats, warm=False)
        results.append(Result(shape, name, seconds, extra, peak))
        advance()
    return results
