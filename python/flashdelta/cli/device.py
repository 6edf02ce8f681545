"""Where the program's tensors live: NumPy arrays on the CPU, torch tensors on a GPU (NumPy has no device memory)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import flashdelta
from flashdelta.cli.dtypes import DTYPES, NAMES
from flashdelta.cli.errors import UsageError
from flashdelta.cli.timing import CudaEvents, Timer, WallClock

DEVICES = ("auto", "cpu", "cuda")
# What the cuda backend's kernels are compiled for. The library refuses the rest in its own words; `auto` must know beforehand.
CUDA_WIDTH = 128
CUDA_DTYPES = ("bf16", "fp16")


class Cpu:
    """NumPy arrays as they are."""

    backend = "cpu"

    def put(self, x: Any) -> Any:
        return x

    def get(self, x: Any) -> Any:
        return x

    def synchronize(self) -> None:
        pass

    def timer(self, call: Callable[[], object], warm: bool = True) -> Timer:
        return WallClock(call, warm)

    def describe(self, info: dict, instruction_set: str, threads: int) -> str:
        sets = info["cpu"]["instruction_sets"]
        used = (sets[0] if sets else "unknown") if instruction_set == "best" else instruction_set.upper()
        return f"{info['cpu']['processor']}, {used}, {threads or info['cpu']['threads']} thread(s)"


class Cuda:
    """Torch tensors on the current CUDA device.

    Args:
        torch: the module.
        device: where tensors go.
    """

    backend = "cuda"

    def __init__(self, torch: Any, device: str = "cuda"):
        self._torch = torch
        self._device = device

    def put(self, x: Any) -> Any:
        """An array's values with its strides; what its strides leave out holds NaN, which nothing may read. Others as they are."""
        if not isinstance(x, np.ndarray):
            return x
        tensor = self._on_device(np.ascontiguousarray(x))
        if x.flags.c_contiguous or not tensor.is_floating_point():
            return tensor
        strides = tuple(stride // x.itemsize for stride in x.strides)
        reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
        space = self._torch.full((reach,), float("nan"), dtype=tensor.dtype, device=tensor.device)
        return space.as_strided(x.shape, strides).copy_(tensor)

    def _on_device(self, x: np.ndarray) -> Any:
        if x.dtype == DTYPES["bf16"]:
            return self._torch.from_numpy(x.view(np.int16)).to(self._device).view(self._torch.bfloat16)
        return self._torch.from_numpy(x).to(self._device)

    def get(self, x: Any) -> Any:
        if not isinstance(x, self._torch.Tensor):
            return x
        x = x.cpu()
        if x.dtype == self._torch.bfloat16:
            return x.view(self._torch.int16).numpy().view(DTYPES["bf16"])
        return x.numpy()

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()

    def timer(self, call: Callable[[], object], warm: bool = True) -> Timer:
        return CudaEvents(self._torch, call)

    def describe(self, info: dict, instruction_set: str, threads: int) -> str:
        return self._torch.cuda.get_device_name()


def cuda_refusal(dtype: np.dtype, key_width: int = CUDA_WIDTH, value_width: int = CUDA_WIDTH) -> str:
    """Why the cuda backend takes no q, k, v of this dtype and these widths; empty where it does."""
    if NAMES.get(dtype) not in CUDA_DTYPES:
        return f"the cuda backend takes q, k, v in {' or '.join(CUDA_DTYPES)}, not {NAMES.get(dtype, dtype.name)}"
    if (key_width, value_width) != (CUDA_WIDTH, CUDA_WIDTH):
        return f"the cuda backend takes heads of width {CUDA_WIDTH}, not {key_width} and {value_width}"
    return ""


def _cuda_problem(info: dict) -> str:
    """Why the cuda backend cannot run here; empty where it can."""
    if "cuda" not in info["backends"]:
        return info["cuda"]["problem"] or "there is no CUDA device"
    try:
        import torch
    except ImportError:
        return "tensors on a GPU need the Python package torch"
    return "" if torch.cuda.is_available() else "the installed torch sees no CUDA device"


def select(name: str, refusal: str = "") -> Cpu | Cuda:
    """The device for --device `name`: auto takes the GPU where the cuda backend can run, else the CPU.

    Args:
        refusal: why the cuda backend does not take what is to be computed (`cuda_refusal`); empty where it does.

    Raises:
        UsageError: cuda was asked for and cannot run.
    """
    if name == "cpu":
        return Cpu()
    problem = _cuda_problem(flashdelta.info()) or refusal
    if not problem:
        import torch

        return Cuda(torch)
    if name == "cuda":
        raise UsageError(f"--device cuda: {problem}")
    return Cpu()
