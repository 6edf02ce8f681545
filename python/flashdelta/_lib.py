"""Finds the library, loads it, and mirrors its C ABI (include/flashdelta/flashdelta.h) for ctypes.

NumPy arrays take this road: it needs nothing but the library, while importing tvm-ffi would import torch wherever that is installed,
and NumPy's DLPack export knows neither bfloat16 nor, before version 2.1, read-only arrays. Torch tensors go through tvm-ffi
(``_torch.py``), which takes a twelfth of the time per tensor.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

_FILE = "libflashdelta_ffi.so"


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


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
FORWARD_TENSORS = (*INPUTS, "o", "final_state", *SAVED)
BACKWARD_TENSORS = (*INPUTS, *SAVED, "d_o", "d_final_state", *GRADIENTS)


class OptionsStruct(ctypes.Structure):
    _fields_ = (
        ("scale", ctypes.c_double),
        ("has_scale", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in INTEGER_OPTIONS),
        ("context_parallel_tolerance", ctypes.c_double),
        ("stream", ctypes.c_void_p),
    )


def _args_struct(name: str, tensors: tuple[str, ...]) -> type[ctypes.Structure]:
    fields = (
        ("struct_size", ctypes.c_size_t),
        ("options", OptionsStruct),
        *((tensor, ctypes.POINTER(DLTensor)) for tensor in tensors),
        ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_size_t),
    )
    return type(name, (ctypes.Structure,), {"_fields_": fields})


ForwardArgs = _args_struct("ForwardArgs", FORWARD_TENSORS)
BackwardArgs = _args_struct("BackwardArgs", BACKWARD_TENSORS)


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
    for operation, args in (("chunk_forward", ForwardArgs), ("recurrent_forward", ForwardArgs), ("chunk_backward", BackwardArgs)):
        run = getattr(lib, f"flashdelta_{operation}")
        run.argtypes = [ctypes.POINTER(args)]
        size = getattr(lib, f"flashdelta_{operation}_workspace_size")
        size.argtypes = [ctypes.POINTER(args), ctypes.POINTER(ctypes.c_size_t)]
    lib.flashdelta_info.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t)]
    lib.flashdelta_last_error.restype = ctypes.c_char_p
    lib.flashdelta_version.restype = ctypes.c_char_p
    return lib


def check(status: int) -> None:
    """Raises what a flashdelta_status stands for, with the library's text."""
    if status == 0:
        return
    kind = {1: ValueError, 2: TypeError}.get(status, RuntimeError)
    raise kind(library().flashdelta_last_error().decode())


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
