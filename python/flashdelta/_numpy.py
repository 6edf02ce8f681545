"""NumPy arrays: to DLTensors and through the C ABI."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from flashdelta import _lib, _shapes
from flashdelta._options import Options

_CPU = 1
_DTYPE_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}  # DLDataTypeCode by NumPy's kind
_BFLOAT16_CODE = 4

Array = np.ndarray


def _dtype_code(name: str, dtype: np.dtype) -> int:
    if dtype.name == "bfloat16":  # ml_dtypes': NumPy itself has none
        return _BFLOAT16_CODE
    if dtype.isbuiltin != 1 or not dtype.isnative or dtype.kind not in _DTYPE_CODES:
        raise TypeError(f"{name}: dtype is {dtype}; it must be a native NumPy number or ml_dtypes.bfloat16")
    return _DTYPE_CODES[dtype.kind]


def _dltensor(name: str, array: Any, output: bool) -> _lib.DLTensor:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: is a {type(array).__name__}; it must be a NumPy array, as q is")
    if output and not array.flags.writeable:
        raise ValueError(f"{name}: is read-only; it is written")
    code = _dtype_code(name, array.dtype)
    size = array.dtype.itemsize
    if any(stride % size for stride in array.strides):
        raise ValueError(f"{name}: strides are {array.strides} bytes; they must be multiples of its element's {size}")
    axes = ctypes.c_int64 * array.ndim
    return _lib.DLTensor(
        data=array.__array_interface__["data"][0],
        device_type=_CPU,
        ndim=array.ndim,
        dtype_code=code,
        dtype_bits=8 * size,
        dtype_lanes=1,
        shape=axes(*array.shape),
        strides=axes(*(stride // size for stride in array.strides)),
    )


def _workspace(size: int) -> Array:
    alignment = 64
    space = np.empty(size + alignment, np.uint8)
    start = -space.__array_interface__["data"][0] % alignment
    return space[start : start + size]


def _call(operation: str, struct: type, inputs: dict[str, Any], outputs: dict[str, Any], options: Options) -> None:
    lib = _lib.library()
    args = struct(struct_size=ctypes.sizeof(struct))
    args.options.has_scale = options.scale is not None
    args.options.scale = options.scale or 0.0
    for name, value in zip(_lib.INTEGER_OPTIONS, options.integers, strict=True):
        setattr(args.options, name, value)
    args.options.context_parallel_tolerance = options.tolerance
    for arrays, output in ((inputs, False), (outputs, True)):
        for name, array in arrays.items():
            if array is not None:
                setattr(args, name, ctypes.pointer(_dltensor(name, array, output)))
    needed = ctypes.c_size_t()
    _lib.check(getattr(lib, f"flashdelta_{operation}_workspace_size")(args, needed))
    if needed.value:
        workspace = _workspace(needed.value)
        args.workspace, args.workspace_size = workspace.__array_interface__["data"][0], needed.value
    _lib.check(getattr(lib, f"flashdelta_{operation}")(args))


def _offsets(cu_seqlens: Any) -> Array | None:
    if cu_seqlens is None or isinstance(cu_seqlens, np.ndarray):
        return cu_seqlens
    try:
        offsets = np.asarray(cu_seqlens)
    except Exception as error:  # a ragged list, or another library's tensor that is not on the CPU
        raise TypeError(f"cu_seqlens: is a {type(cu_seqlens).__name__} that NumPy does not read ({error})") from error
    if offsets.ndim == 0:
        raise TypeError(f"cu_seqlens: is a {type(cu_seqlens).__name__}; it must be an array or a sequence of integers")
    return offsets if offsets.size else offsets.astype(np.int64)


def _require(**arrays: Any) -> None:
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name}: is a {type(array).__name__}; it must be a NumPy array, as q is")


def _final_state_dtype(dtype: Any, q: Array) -> np.dtype:
    if dtype is None:
        return np.dtype(np.float64 if q.dtype == np.float64 else np.float32)
    try:
        return np.dtype(dtype)
    except TypeError:
        raise TypeError(f"final_state_dtype: is {dtype!r}; it must be a NumPy dtype") from None


def forward(
    operation: str,
    inputs: tuple[Any, ...],
    options: Options,
    output_final_state: bool,
    o: Any,
    final_state: Any,
    final_state_dtype: Any,
    save: tuple[bool, bool, bool] | None = None,
    inplace_state: bool = False,
) -> tuple[Any, ...]:
    """(o, final_state, saved_c, saved_T, saved_states), None where not wanted. `save` None: nothing is saved."""
    named = dict(zip(_lib.INPUTS, inputs, strict=True))
    q, v = named["q"], named["v"]
    _require(q=q, k=named["k"], v=v)
    cu_seqlens = named["cu_seqlens"] = _offsets(named["cu_seqlens"])
    if o is None:
        o = np.empty(v.shape, v.dtype)
    if inplace_state:
        final_state = named["initial_state"]
    elif final_state is None and output_final_state:
        final_state = np.empty(_shapes.state(q, v, cu_seqlens, options), _final_state_dtype(final_state_dtype, q))
    shapes = (_shapes.saved_c(v), _shapes.saved_T(v), _shapes.saved_states(q, v, cu_seqlens, options))
    saved = [np.empty(shape, np.float32) if wanted else None for shape, wanted in zip(shapes, save or (False,) * 3, strict=True)]
    outputs = dict(zip(("o", "final_state", *_lib.SAVED), (o, final_state, *saved), strict=True))
    _call(operation, _lib.ForwardArgs, named, outputs, options)
    return (o, final_state if output_final_state or inplace_state else None, *saved)


def backward(
    inputs: tuple[Any, ...],
    saved: tuple[Any, ...],
    d_o: Any,
    d_final_state: Any,
    options: Options,
) -> tuple[Any, ...]:
    """Gradients in the order of ``_lib.GRADIENTS``, None for absent inputs."""
    named = dict(zip(_lib.INPUTS, inputs, strict=True))
    _require(q=named["q"], k=named["k"], v=named["v"])
    named["cu_seqlens"] = _offsets(named["cu_seqlens"])
    owners = [named[name] for name in _lib.INPUTS if name != "cu_seqlens"]
    gradients = [np.empty(x.shape, x.dtype) if isinstance(x, np.ndarray) else None for x in owners]
    named.update(zip(_lib.SAVED, saved, strict=True))
    named.update(d_o=d_o, d_final_state=d_final_state)
    _call("chunk_backward", _lib.BackwardArgs, named, dict(zip(_lib.GRADIENTS, gradients, strict=True)), options)
    return tuple(gradients)


def is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray)
