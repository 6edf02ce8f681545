"""Where the program's tensors live: NumPy arrays on the CPU, torch tensors on a GPU (NumPy has no device memory)."""

from __future__ import annotations

from typing import Any

import numpy as np

import flashdelta
from flashdelta.cli.dtypes import DTYPES
from flashdelta.cli.errors import UsageError

DEVICES = ("auto", "cpu", "cuda")


class Cpu:
    """NumPy arrays as they are."""

    backend = "cpu"

    def put(self, x: Any) -> Any:
        return x

    def get(self, x: Any) -> Any:
        return x

    def synchronize(self) -> None:
        pass

    def describe(self, info: dict, instruction_set: str, threads: int) -> str:
        sets = info["cpu"]["instruction_sets"]
        used = (sets[0] if sets else "unknown") if instruction_set == "best" else instruction_set.upper()
        return f"{info['cpu']['processor']}, {used}, {threads or info['cpu']['threads']} thread(s)"


class Cuda:
    """Torch tensors on the first CUDA device."""

    backend = "cuda"

    def __init__(self, torch: Any):
        self._torch = torch

    def put(self, x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        x = np.ascontiguousarray(x)
        if x.dtype == DTYPES["bf16"]:
            return self._torch.from_numpy(x.view(np.int16)).view(self._torch.bfloat16).cuda()
        return self._torch.from_numpy(x).cuda()

    def get(self, x: Any) -> Any:
        if not isinstance(x, self._torch.Tensor):
            return x
        x = x.cpu()
        if x.dtype == self._torch.bfloat16:
            return x.view(self._torch.int16).numpy().view(DTYPES["bf16"])
        return x.numpy()

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()

    def describe(self, info: dict, instruction_set: str, threads: int) -> str:
        return info["cuda"]["devices"][0]["name"]


def _cuda_problem(info: dict) -> str:
    """Why the cuda backend cannot run here; empty where it can."""
    if "cuda" not in info["backends"]:
        return info["cuda"]["problem"] or "this build has no CUDA kernels"
    if not info["cuda"]["devices"]:
        return info["cuda"]["problem"] or "there is no CUDA device"
    try:
        import torch
    except ImportError:
        return "tensors on a GPU need the Python package torch"
    return "" if torch.cuda.is_available() else "the installed torch sees no CUDA device"


def select(name: str) -> Cpu | Cuda:
    """The device for --device `name`: auto takes the GPU where the cuda backend can run, else the CPU.

    Raises:
        UsageError: cuda was asked for and cannot run.
    """
    if name == "cpu":
        return Cpu()
    problem = _cuda_problem(flashdelta.info())
    if not problem:
        import torch

        return Cuda(torch)
    if name == "cuda":
        raise UsageError(f"--device cuda: {problem}")
    return Cpu()
