"""What `flashdelta bench` measures: one shape on one device, pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import flashdelta
from flashdelta import _lib, _numpy, _options
from flashdelta.cli import device, flops, timing
from flashdelta.cli.dtypes import DTYPES
from flashdelta.cli.models import HeadLayout

PASSES = ("forward", "backward", "recurrent")
# The token-by-token path as ggml schedules it: measured beside "recurrent", on the CPU.
SEPARATE = "separate_passes"


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

    @property
    def chunk_heads(self) -> int:
        return self.batch * -(-self.tokens // flops.CHUNK) * self.heads.value_heads

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
    workspace_bytes: int | None  # what the library asks for: all that a call takes beyond inputs, outputs and saved tensors. CPU only
    peak_gflops: float | None  # of the same instruction set and threads. CPU only
    how: str = "wall clock"  # what the time was read from: Timer.how
    floor: tuple[float, str] | None = None  # seconds, and what sets them: flops.cuda_floor. CUDA only
    separate_seconds: float | None = None  # recurrent on the CPU: the time of the same with ggml's schedule

    @property
    def workspace_per_thread(self) -> float | None:
        if self.workspace_bytes is None:
            return None
        return self.workspace_bytes / (self.shape.threads or flashdelta.info()["cpu"]["threads"])

    @property
    def gflops(self) -> float:
        width = (self.shape.heads.key_width, self.shape.heads.value_width)
        counts = flops.PER_TOKEN if self.floor else flops.CPU_PER_TOKEN
        return counts[self.operation](*width) * self.shape.token_heads / self.seconds * 1e-9

    @property
    def us_per_token_head(self) -> float:
        return 1e6 * self.seconds / self.shape.token_heads

    @property
    def floor_share(self) -> float | None:
        """The least time over the time taken: on a GPU that of its floor, on the CPU that at the measured peak."""
        if self.floor:
            return self.floor[0] / self.seconds
        return self.gflops / self.peak_gflops if self.peak_gflops else None

    def as_json(self) -> dict[str, Any]:
        return {
            **self.shape.as_json(),
            "pass": self.operation,
            "seconds": self.seconds,
            "timed_by": self.how,
            "us_per_token_head": self.us_per_token_head,
            "gflops": self.gflops,
            "peak_gflops": self.peak_gflops,
            "floor_seconds": self.seconds * self.floor_share if self.floor_share else None,
            "floor_set_by": self.floor[1] if self.floor else None,
            "share_of_peak": self.floor_share,
            "workspace_bytes": self.workspace_bytes,
            "workspace_bytes_per_thread": self.workspace_per_thread,
            "separate_passes_seconds": self.separate_seconds,
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


def _moved_bytes(tensors: Iterable[Any]) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


def _on_arrays(common: dict[str, Any], outputs: dict[str, dict[str, Any]]) -> dict[str, tuple[Callable[[], None], int]]:
    """Calls on NumPy arrays, each with its workspace's bytes. Outputs and workspace exist before and are the same every time, as under a
    framework that keeps its memory: pages that the system has yet to grant would cost as much as the operation.

    Args:
        common: arguments that all calls share, by their public names.
        outputs: of each pass, the further inputs and the outputs by the names of the C ABI.
    """
    inputs = {name: common.get(name) for name in _lib.INPUTS}
    options = _options.pack(**{name: x for name, x in common.items() if name not in inputs})
    operations = {"forward": "chunk_forward", "backward": "chunk_backward", "recurrent": "recurrent_forward"}
    return {name: _numpy.prepare(operations.get(name, name), {**inputs, **x}, x, options) for name, x in outputs.items()}


def run(shape: Shape, passes: tuple[str, ...], place: device.Cpu | device.Cuda, repeats: int, advance: Callable[[], None]) -> list[Result]:
    """Measures `passes` of `shape`; results in that order. `advance` is called when all are done."""
    placed = {name: place.put(x) for name, x in inputs(shape).items()}
    flags = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    common = {**placed, **flags, "backend": place.backend, "num_threads": shape.threads, "instruction_set": shape.instruction_set}
    on_cpu = place.backend == "cpu"
    peak = _lib.cpu_peak_gflops(shape.instruction_set, shape.threads) if on_cpu else None

    def forward() -> Any:
        return flashdelta.chunk_gated_delta_rule(**common, output_final_state=True)

    def recurrent() -> Any:
        return flashdelta.fused_recurrent_gated_delta_rule(**common, output_final_state=True)

    calls = {"forward": forward, "recurrent": recurrent}
    o, final_state = forward()
    outputs = {name: {"o": o, "final_state": final_state} for name in (*calls, SEPARATE)}
    if "backward" in passes:
        saved = flashdelta.chunk_gated_delta_rule_fwd(**common, output_h=True, output_g_cumsum=True, output_A=True)
        d_o = place.put(np.random.default_rng(1).standard_normal(tuple(o.shape), dtype=np.float32).astype(DTYPES[shape.dtype]))

        def backward() -> Any:
            return flashdelta.chunk_gated_delta_rule_bwd(**common, do=d_o, h=saved.h, g_cumsum=saved.g_cumsum, A=saved.A)

        calls["backward"] = backward
        owners = {"dq": "q", "dk": "k", "dv": "v", "dg": "g", "dbeta": "beta", "dA_log": "A_log", "d_dt_bias": "dt_bias"}
        gradients = {name: np.empty_like(place.get(placed[owner])) for name, owner in owners.items()}
        kept = {"saved_c": saved.g_cumsum, "saved_T": saved.A, "saved_states": saved.h}
        outputs["backward"] = {**kept, "d_o": d_o, **gradients}
    workspaces = {}
    measured = (*passes, SEPARATE) if on_cpu and "recurrent" in passes else passes
    if on_cpu:
        prepared = _on_arrays(common, {name: outputs[name] for name in measured})
        calls = {name: call for name, (call, _) in prepared.items()}
        workspaces = {name: size for name, (_, size) in prepared.items()}
    timers = {name: place.timer(calls[name]) for name in measured}
    seconds = timing.medians(timers, repeats)
    if on_cpu:  # the better of two: another program may have held a core during the first
        peak = max(filter(None, (peak, _lib.cpu_peak_gflops(shape.instruction_set, shape.threads))), default=None)
    floor = None if on_cpu else flops.cuda_floor(shape.chunk_heads, _moved_bytes((*placed.values(), o, final_state)))
    advance()
    separate = {"recurrent": seconds.get(SEPARATE)}
    return [Result(shape, name, seconds[name], workspaces.get(name), peak, timers[name].how, floor, separate.get(name)) for name in passes]
