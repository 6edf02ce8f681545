"""NumPy arrays: to DLTensors and through the C ABI."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from flashdelta import _lib, _shapes
from flashdelta._options import Options

_DTYPE_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}  # DLDataTypeCode by NumPy's kind
_BFLOAT16_CODE = 4

Array = np.ndarray


@functools.cache
def _dtype_code(dtype: np.dtype) -> int | None:
    if dtype.name == "bfloat16":  # ml_dtypes': NumPy itself has none
        return _BFLOAT16_CODE
    known = dtype.isbuiltin == 1 and dtype.isnative
    return _DTYPE_CODES.get(dtype.kind) if known else None


def _view(name: str, array: Any, output: bool) -> _lib.TensorView | None:
    if array is None:
        return None
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: is a {type(array).__name__}; it must be a NumPy array, as q is")
    if output and not array.flags.writeable:
        raise ValueError(f"{name}: is read-only; it is written")
    code = _dtype_code(array.dtype)
    if code is None:
        raise TypeError(f"{name}: dtype is {array.dtype}; it must be a native NumPy number or ml_dtypes.bfloat16")
    size = array.itemsize
    if any(stride % size for stride in array.strides):
        raise ValueError(f"{name}: strides are {array.strides} bytes; they must be multiples of its element's {size}")
    return _lib.TensorView(array.ctypes.data, code, 8 * size, array.shape, tuple(stride // size for stride in array.strides))


class _Workspace:
    """Bytes at an aligned address."""

    def __init__(self, size: int) -> None:
        alignment = 64
        self._space = np.empty(size + alignment, np.uint8)
        self.address = -(-self._space.ctypes.data // alignment) * alignment


def _views(operation: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> list[_lib.TensorView | None]:
    names = _lib.BACKWARD_TENSORS if operation == "chunk_backward" else _lib.FORWARD_TENSORS
    return [_view(name, outputs[name], True) if name in outputs else _view(name, inputs.get(name), False) for name in names]


def _call(operation: str, inputs: dict[str, Any], outputs: dict[str, Any], options: Options) -> None:
    _lib.call(operation, _views(operation, inputs, outputs), options, _Workspace)


def prepare(operation: str, inputs: dict[str, Any], outputs: dict[str, Any], options: Options) -> tuple[Callable[[], None], int]:
    """``_lib.prepare`` on arrays by the names of the C ABI's fields, absent ones left out: a call to make again and again, on outputs and
    a workspace that exist already."""
    run, size = _lib.prepare(operation, _views(operation, inputs, outputs), options, _Workspace)

    def prepared(held: Any = (inputs, outputs)) -> None:
        run()

    return prepared, size


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
    segment_counts: Any = None,
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
    saved: list[Any] = [None] * 3
    if save:
        shapes = (_shapes.saved_c(v), _shapes.saved_T(v), _shapes.saved_states(q, v, cu_seqlens, options))
        saved = [np.empty(shape, np.float32) if wanted else None for shape, wanted in zip(shapes, save, strict=True)]
    outputs = dict(zip(("o", "final_state", *_lib.SAVED, "segment_counts"), (o, final_state, *saved, segment_counts), strict=True))
    _call(operation, named, outputs, options)
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
    _call("chunk_backward", named, dict(zip(_lib.GRADIENTS, gradients, strict=True)), options)
    return tuple(gradients)


def is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray)
