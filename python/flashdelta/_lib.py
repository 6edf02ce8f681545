"""Finds the library, loads it, and calls its C ABI (include/flashdelta/flashdelta.h) by ctypes.

NumPy arrays take this road: it needs nothing but the library, while importing tvm-ffi would import torch wherever that is installed,
and NumPy's DLPack export knows neither bfloat16 nor, before version 2.1, read-only arrays. Torch tensors go through tvm-ffi
(``_torch.py``), which takes a seventh of the time per tensor.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from flashdelta._options import Options

_FILE = "libflashdelta_ffi.so"


# flashdelta_options between has_scale and context_parallel_tolerance, in the struct's order; `Options.integers` has the same.
INTEGER_OPTIONS = (
    "use_qk_l2norm_in_kernel",
    "use_gate_in_kernel",
    "use_beta_sigmoid_in_kernel",
    "allow_neg_eigval",
    "state_v_first",
    "context_parallel",
    "num_segments",
    "batch_invariant",
    "backend",
    "num_threads",
    "instruction_set",
    "checkpoint_chunks",
)

INPUTS = ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens", "A_log", "dt_bias")
SAVED = ("saved_c", "saved_T", "saved_states")
GRADIENTS = ("dq", "dk", "dv", "dg", "dbeta", "d_initial_state", "dA_log", "d_dt_bias")
# The last one stands behind the workspace: structs grow at their end.
FORWARD_TENSORS = (*INPUTS, "o", "final_state", *SAVED, "segment_counts")
BACKWARD_TENSORS = (*INPUTS, *SAVED, "d_o", "d_final_state", *GRADIENTS)


OPTIONS = ("scale", "has_scale", *INTEGER_OPTIONS, "context_parallel_tolerance", "stream")

# Packed, not ctypes.Structure: a third of the time. '@' aligns as C does, and the library checks struct_size.
_DLTENSOR = struct.Struct("@PiiiBBHPPQ")  # data, device_type, device_id, ndim, dtype code, bits, lanes, shape, strides, byte_offset
_CPU = 1


class _Args:
    # struct_size, options, tensors, workspace, workspace_size, and the tensors that came later
    def __init__(self, tensors: int, later: int = 0) -> None:
        self._struct = struct.Struct(f"@Nd{1 + len(INTEGER_OPTIONS)}idP{tensors}PPN{later}P")
        self._later = later

    def pack(self, options: Options, addresses: list[int], workspace: int, workspace_size: int) -> bytes:
        first = len(addresses) - self._later
        return self._struct.pack(
            self._struct.size,
            options.scale or 0.0,
            options.scale is not None,
            *options.integers,
            options.tolerance,
            0,
            *addresses[:first],
            workspace,
            workspace_size,
            *addresses[first:],
        )


_ARGS = {
    "chunk_forward": _Args(len(FORWARD_TENSORS) - 1, 1),
    "recurrent_forward": _Args(len(FORWARD_TENSORS) - 1, 1),
    "chunk_backward": _Args(len(BACKWARD_TENSORS)),
}


def library_path() -> Path:
    """The shared library: ``$FLASHDELTA_LIBRARY`` (the file, or its folder), else the one beside this package.

    Raises:
        ImportError: there is none.
    """
    chosen = os.environ.get("FLASHDELTA_LIBRARY")
    path = Path(chosen) if chosen else Path(__file__).with_name(_FILE)
    if path.is_dir():
        path = path / _FILE
    if not path.is_file():
        raise ImportError(
            f"flashdelta: {path} does not exist; install the package (pip install .), or build with -DFLASHDELTA_PYTHON=ON and set "
            f"FLASHDELTA_LIBRARY to the {_FILE} of that build"
        )
    return path.resolve()


def _load_tvm_ffi_runtime() -> None:
    # By its path, because the library may be far from the package, and without importing the package, which would import torch.
    package = importlib.util.find_spec("tvm_ffi")
    for folder in (package.submodule_search_locations or ()) if package else ():
        runtime = Path(folder, "lib", "libtvm_ffi.so")
        if runtime.is_file():
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, its functions typed. ctypes releases the GIL while one runs."""
    _load_tvm_ffi_runtime()
    lib = ctypes.CDLL(str(library_path()))
    for operation in _ARGS:
        getattr(lib, f"flashdelta_{operation}").argtypes = [ctypes.c_void_p]
        getattr(lib, f"flashdelta_{operation}_workspace_size").argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    lib.flashdelta_info.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t)]
    lib.flashdelta_last_error.restype = ctypes.c_char_p
    lib.flashdelta_version.restype = ctypes.c_char_p
    lib.flashdelta_ffi_cpu_peak_gflops.argtypes = [ctypes.c_int32, ctypes.c_int32]
    lib.flashdelta_ffi_cpu_peak_gflops.restype = ctypes.c_double
    lib.flashdelta_ffi_cpu_separate_passes.argtypes = [ctypes.c_void_p]
    lib.flashdelta_ffi_cpu_separate_passes.restype = ctypes.c_int32
    return lib


def check(status: int) -> None:
    """Raises what a flashdelta_status stands for, with the library's text."""
    if status == 0:
        return
    kind = {1: ValueError, 2: TypeError}.get(status, RuntimeError)
    raise kind(library().flashdelta_last_error().decode())


class TensorView(NamedTuple):
    """Host memory as a DLTensor describes it; strides in elements."""

    address: int
    dtype_code: int
    dtype_bits: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _pack_tensors(tensors: Sequence[TensorView | None]) -> tuple[Any, list[int]]:
    # One buffer with every DLTensor, each followed by its axes, and the address of each (0: absent).
    block = ctypes.create_string_buffer(sum(_DLTENSOR.size + 16 * len(tensor.shape) for tensor in tensors if tensor is not None))
    base, at, addresses = ctypes.addressof(block), 0, []
    for tensor in tensors:
        if tensor is None:
            addresses.append(0)
            continue
        address, code, bits, shape, strides = tensor
        axes = at + _DLTENSOR.size
        rank = len(shape)
        _DLTENSOR.pack_into(block, at, address, _CPU, 0, rank, code, bits, 1, base + axes, base + axes + 8 * rank, 0)
        struct.pack_into(f"{2 * rank}q", block, axes, *shape, *strides)
        addresses.append(base + at)
        at = axes + 16 * rank
    return block, addresses


def _workspace_size(operation: str, options: Options, addresses: list[int]) -> int:
    needed = ctypes.c_size_t()
    args = _ARGS[operation].pack(options, addresses, 0, 0)
    check(getattr(library(), f"flashdelta_{operation}_workspace_size")(args, ctypes.byref(needed)))
    return needed.value


def prepare(
    operation: str, tensors: Sequence[TensorView | None], options: Options, workspace: Callable[[int], Any]
) -> tuple[Callable[[], None], int]:
    """Checks the arguments of an operation of the C ABI and lays them out.

    Args:
        operation: "chunk_forward", "recurrent_forward" or "chunk_backward"; for benchmarks also "separate_passes", which is
            recurrent_forward as ggml schedules it: a pass over the state for each of decay, read, update and output. CPU only.
        tensors: in the order of ``FORWARD_TENSORS`` or ``BACKWARD_TENSORS``.
        options: the options.
        workspace: makes a workspace of so many bytes: an object with ``address``, alive while it is held.

    Returns:
        What runs the call, as often as it is called; it holds the workspace, but not what the tensors view. And the workspace's bytes.

    Raises:
        ValueError, TypeError, RuntimeError: what the library refuses, in its words.
    """
    separate = operation == "separate_passes"
    checked = "recurrent_forward" if separate else operation
    block, addresses = _pack_tensors(tensors)
    size = _workspace_size(checked, options, addresses)
    space = workspace(size) if size else None
    args = _ARGS[checked].pack(options, addresses, space.address if space else 0, size)
    function = library().flashdelta_ffi_cpu_separate_passes if separate else getattr(library(), f"flashdelta_{operation}")

    def run(held: Any = (block, space)) -> None:  # the arguments point into what is held
        status = function(args)
        if separate and not status:
            raise RuntimeError("separate_passes: runs on the cpu backend only")
        if not separate:
            check(status)

    return run, size


def call(operation: str, tensors: Sequence[TensorView | None], options: Options, workspace: Callable[[int], Any]) -> None:
    """Runs an operation of the C ABI once; arguments and errors are those of `prepare`."""
    run, _ = prepare(operation, tensors, options, workspace)
    run()


def info() -> dict[str, Any]:
    """What this build holds and this machine offers: version, backends, instruction sets, GPUs.

    Returns:
        The library's JSON description, parsed.
    """
    lib = library()
    needed = ctypes.c_size_t()
    check(lib.flashdelta_info(None, 0, ctypes.byref(needed)))
    text = ctypes.create_string_buffer(needed.value)
    check(lib.flashdelta_info(text, needed.value, None))
    return json.loads(text.value)


def cpu_peak_gflops(instruction_set: str, threads: int) -> float | None:
    """Measures the CPU's peak on fp32 multiply-adds held in registers, as kernels of one instruction set can reach it; takes 0.2 s.

    Args:
        instruction_set: "best", "baseline", "avx2" or "avx512".
        threads: 0 stands for all that calls may use.

    Returns:
        GFLOP/s (a multiply-add is two operations) of all threads together; None where it cannot run here.
    """
    from flashdelta._options import INSTRUCTION_SET

    peak = library().flashdelta_ffi_cpu_peak_gflops(INSTRUCTION_SET[instruction_set], threads)
    return peak if peak > 0 else None
