"""Torch tensors: the operators flashdelta::*, their fake kernels and gradients, and the calls into the library through tvm-ffi.

Imported with the package where torch is loaded, else on the first call that gets a torch tensor. Operators return fixed tuples, so a tensor
that is not wanted is an empty one. ``options`` is ``Options.integers``.
"""

from __future__ import annotations

import os
from typing import Any

# For torch before 2.10, which has no C-level DLPack exchange, tvm-ffi would compile an extension on its first import.
os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")

import torch
import tvm_ffi

from flashdelta import _lib, _shapes
from flashdelta._options import Options

Tensor = torch.Tensor

_MODULE = tvm_ffi.load_module(str(_lib.library_path()))
_CHUNK_FORWARD = _MODULE.get_function("chunk_forward")
_CHUNK_BACKWARD = _MODULE.get_function("chunk_backward")
_RECURRENT_FORWARD = _MODULE.get_function("recurrent_forward")
_FUNCTIONS = {"chunk_forward": _CHUNK_FORWARD, "recurrent_forward": _RECURRENT_FORWARD}
_CHECK_CU_SEQLENS = _MODULE.get_function("check_cu_seqlens")

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? initial_state, Tensor? cu_seqlens, Tensor? A_log, Tensor? dt_bias"
_OPTIONS = "float? scale, int[] options, float tolerance"
_SAVE_C, _SAVE_T, _SAVE_STATES = 1, 2, 4
SAVE_ALL = _SAVE_C | _SAVE_T | _SAVE_STATES

_operators = torch.library.Library("flashdelta", "DEF")
_operators.define(
    f"chunk_forward({_INPUTS}, {_OPTIONS}, ScalarType? final_state_dtype, int save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_operators.define(
    f"chunk_forward_out({_INPUTS}, {_OPTIONS}, Tensor(a!) o, Tensor(b!)? final_state, Tensor(c!)? saved_c, Tensor(d!)? saved_T, "
    "Tensor(e!)? saved_states, Tensor(f!)? segment_counts) -> ()"
)
_operators.define(
    f"chunk_backward({_INPUTS}, Tensor? saved_c, Tensor? saved_T, Tensor? saved_states, Tensor? d_o, Tensor? d_final_state, {_OPTIONS}, "
    "int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_operators.define(f"recurrent_forward({_INPUTS}, {_OPTIONS}, ScalarType? final_state_dtype) -> (Tensor, Tensor)")
_operators.define(f"recurrent_forward_out({_INPUTS}, {_OPTIONS}, Tensor(a!) o, Tensor(b!)? final_state) -> ()")
_operators.define(
    f"recurrent_forward_({_INPUTS.replace('Tensor? initial_state', 'Tensor(a!) initial_state')}, {_OPTIONS}, Tensor(b!) o) -> ()"
)
_operators.define("offsets_to(Tensor cu_seqlens, SymInt tokens, Device device) -> Tensor")


def _current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# What inductor and triton ask as well: a tenth of the time of making a Stream object.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _run(function: Any, tensors: tuple[Tensor | None, ...], scale: float | None, options: Any, tolerance: float, device: Any) -> None:
    stream = 0
    if device.type == "cuda":
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return _run(function, tensors, scale, options, tolerance, device)
        stream = _raw_stream(device.index) if _raw_stream else _current_stream(device)
    needed = function(*tensors, scale, *options, tolerance, stream, None)
    if needed:
        # Torch's allocator may give these bytes away as soon as they are dropped: only to what follows on the same stream.
        workspace = torch.empty(needed, dtype=torch.uint8, device=device)
        function(*tensors, scale, *options, tolerance, stream, workspace)
    return None


def _empty(like: Tensor, shape: Any, dtype: torch.dtype, wanted: Any = True) -> Tensor | None:
    return torch.empty(shape, dtype=dtype, device=like.device) if wanted else None


def _output(v: Tensor) -> Tensor:
    # Half the time of naming shape, dtype and device.
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _filled(like: Tensor, tensors: list[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(torch.empty(0, dtype=like.dtype, device=like.device) if t is None else t for t in tensors)


def _state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: Options, dtype: torch.dtype | None) -> Tensor | None:
    return _empty(v, _shapes.state(q, v, cu_seqlens, options), dtype, dtype is not None)


def _saved(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, options: Options, save: int) -> list[Tensor | None]:
    return [
        _empty(v, _shapes.saved_c(v), torch.float32, save & _SAVE_C),
        _empty(v, _shapes.saved_T(v), torch.float32, save & _SAVE_T),
        _empty(v, _shapes.saved_states(q, v, cu_seqlens, options), torch.float32, save & _SAVE_STATES),
    ]


def _check_devices(inputs: tuple[Tensor | None, ...]) -> None:
    # Only where no data is: there the library, which refuses mixed devices, is never asked.
    device = inputs[0].device
    for name, tensor in zip(_lib.INPUTS, inputs, strict=True):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: is on {tensor.device}, but q is on {device}; all tensors must be on one device")


# chunk_forward


def _chunk_outputs(q, v, cu_seqlens, options, final_state_dtype, save):
    packed = Options(None, tuple(options), 0.0)
    final_state = _state(q, v, cu_seqlens, packed, final_state_dtype)
    return [_output(v), final_state, *_saved(q, v, cu_seqlens, packed, save)]


def _chunk_forward(q, k, v, g, beta, h0, cu, A_log, dt_bias, scale, options, tolerance, final_state_dtype, save):
    outputs = _chunk_outputs(q, v, cu, options, final_state_dtype, save)
    _chunk_forward_out(q, k, v, g, beta, h0, cu, A_log, dt_bias, scale, options, tolerance, *outputs, None)
    return _filled(v, outputs)


def _chunk_forward_fake(q, k, v, g, beta, h0, cu, A_log, dt_bias, scale, options, tolerance, final_state_dtype, save):
    _check_devices((q, k, v, g, beta, h0, cu, A_log, dt_bias))
    return _filled(v, _chunk_outputs(q, v, cu, options, final_state_dtype, save))


def _chunk_forward_out(q, k, v, g, beta, h0, cu, A_log, dt_bias, scale, options, tolerance, *outputs):
    _run(_CHUNK_FORWARD, (q, k, v, g, beta, h0, cu, A_log, dt_bias, *outputs), scale, options, tolerance, q.device)


# chunk_backward


def _gradients(inputs: tuple[Tensor | None, ...], wanted: int) -> list[Tensor | None]:
    owners = inputs[:6] + inputs[7:]  # all but cu_seqlens
    return [None if x is None else _empty(x, x.shape, x.dtype, wanted >> i & 1) for i, x in enumerate(owners)]


def _chunk_backward(*arguments):
    tensors, (scale, options, tolerance, wanted) = arguments[:14], arguments[14:]
    gradients = _gradients(tensors[:9], wanted)
    _run(_CHUNK_BACKWARD, (*tensors, *gradients), scale, options, tolerance, tensors[0].device)
    return _filled(tensors[2], gradients)


def _chunk_backward_fake(*arguments):
    _check_devices(arguments[:9])
    return _filled(arguments[2], _gradients(arguments[:9], arguments[17]))


# recurrent_forward


def _recurrent_outputs(q, v, cu_seqlens, options, final_state_dtype):
    packed = Options(None, tuple(options), 0.0)
    return [_output(v), _state(q, v, cu_seqlens, packed, final_state_dtype)]


def _recurrent_forward(q, k, v, g, beta, h0, cu, A_log, dt_bias, scale, options, tolerance, final_state_dtype):
    outputs = _recurrent_outputs(q, v, cu, options, final_state_dtype)
    _recurrent_forward_out(q, k, v, g, beta, h0, cu, A_log, dt_bias, scale, options, tolerance, *outputs)
    return _filled(v, outputs)


def _recurrent_forward_fake(q, k, v, g, beta, h0, cu, A_log, dt_bias, scale, options, tolerance, final_state_dtype):
    _check_devices((q, k, v, g, beta, h0, cu, A_log, dt_bias))
    return _filled(v, _recurrent_outputs(q, v, cu, options, final_state_dtype))


def _recurrent_forward_out(q, k, v, g, beta, h0, cu, A_log, dt_bias, scale, options, tolerance, o, final_state):
    tensors = (q, k, v, g, beta, h0, cu, A_log, dt_bias, o, final_state, None, None, None, None)
    _run(_RECURRENT_FORWARD, tensors, scale, options, tolerance, q.device)


def _recurrent_forward_inplace(q, k, v, g, beta, state, cu, A_log, dt_bias, scale, options, tolerance, o):
    _recurrent_forward_out(q, k, v, g, beta, state, cu, A_log, dt_bias, scale, options, tolerance, o, state)


# Offsets from the CPU to where the tensors are


def _offsets_to(cu_seqlens, tokens, device):
    _CHECK_CU_SEQLENS(cu_seqlens, tokens)
    if device.type != "cuda":
        return cu_seqlens.to(device, copy=True)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "cu_seqlens: is on the CPU while a CUDA graph is captured, whose replays would not see what it holds then; "
                "give a tensor on the device"
            )
        # From pinned memory the copy only joins the stream. Torch keeps the staging bytes until it has been made.
        staged = torch.empty(cu_seqlens.shape, dtype=cu_seqlens.dtype, device="cpu", pin_memory=True).copy_(cu_seqlens)
        return staged.to(device, non_blocking=True)


def _offsets_to_fake(cu_seqlens, tokens, device):
    return torch.empty_like(cu_seqlens, memory_format=torch.contiguous_format, device=device)


def _writes_only(*arguments) -> None:
    _check_devices(arguments[:9])


# Registered for every device, so that the library, not the dispatcher, refuses the ones it does not take.
for _name, _kernel, _fake in (
    ("chunk_forward", _chunk_forward, _chunk_forward_fake),
    ("chunk_forward_out", _chunk_forward_out, _writes_only),
    ("chunk_backward", _chunk_backward, _chunk_backward_fake),
    ("recurrent_forward", _recurrent_forward, _recurrent_forward_fake),
    ("recurrent_forward_out", _recurrent_forward_out, _writes_only),
    ("recurrent_forward_", _recurrent_forward_inplace, _writes_only),
    ("offsets_to", _offsets_to, _offsets_to_fake),
):
    _operators.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashdelta::{_name}", _fake, lib=_operators)

_OPS = torch.ops.flashdelta


# Gradients


def _remember_chunk_forward(ctx, inputs, output) -> None:
    *tensors, scale, options, tolerance, final_state_dtype, save = inputs
    ctx.set_materialize_grads(False)  # an output that nothing was made of has no gradient to read
    ctx.flashdelta_has_final_state = final_state_dtype is not None
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *(x if save >> i & 1 else None for i, x in enumerate(output[2:])))
    ctx.flashdelta_options = (scale, options, tolerance)


def _differentiate_chunk_forward(ctx, d_o, d_final_state, *_d_saved):
    needs = ctx.needs_input_grad[:9]
    needs = needs[:6] + needs[7:]
    wanted = sum(1 << i for i, needed in enumerate(needs) if needed)
    d_final_state = d_final_state if ctx.flashdelta_has_final_state else None
    gradients = _OPS.chunk_backward.default(*ctx.saved_tensors, d_o, d_final_state, *ctx.flashdelta_options, wanted)
    found = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    return (*found[:6], None, *found[6:], None, None, None, None, None)


def _remember_nothing(ctx, inputs, output) -> None:
    pass


def _refuse_second_derivative(_ctx, *_gradients):
    raise RuntimeError("chunk_gated_delta_rule: its backward is not differentiable; second derivatives are not supported")


def _refuse_recurrent_gradient(_ctx, *_gradients):
    raise RuntimeError("fused_recurrent_gated_delta_rule: is for inference and has no gradient; use chunk_gated_delta_rule for training")


torch.library.register_autograd(
    "flashdelta::chunk_forward", _differentiate_chunk_forward, setup_context=_remember_chunk_forward, lib=_operators
)
torch.library.register_autograd("flashdelta::chunk_backward", _refuse_second_derivative, setup_context=_remember_nothing, lib=_operators)
torch.library.register_autograd(
    "flashdelta::recurrent_forward", _refuse_recurrent_gradient, setup_context=_remember_nothing, lib=_operators
)


# The face


_DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")


def _check_types(names: tuple[str, ...], tensors: tuple[Any, ...]) -> None:
    for i, tensor in enumerate(tensors):
        name = names[i]
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("q", "k", "v")):
            raise TypeError(f"{name}: is a {type(tensor).__name__}; it must be a torch tensor, as q is")


def _offsets(cu_seqlens: Any, q: Tensor) -> Tensor | None:
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor):
        try:
            cu_seqlens = torch.as_tensor(cu_seqlens, dtype=None if len(cu_seqlens) else torch.int64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"cu_seqlens: is a {type(cu_seqlens).__name__} that torch does not read ({error})") from error
    device = q.device
    if device.type != "cpu" and cu_seqlens.device.type == "cpu" and q.dim() == 4:  # of another rank q is refused first
        return _OPS.offsets_to.default(cu_seqlens, q.shape[1], device)
    return cu_seqlens


def _prepared(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], bool]:
    # The inputs with cu_seqlens as a tensor, and whether gradients flow to any of them.
    q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias = inputs
    differentiable = (q, k, v, g, beta, initial_state, A_log, dt_bias)
    _check_types(_DIFFERENTIABLE, differentiable)
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
    return (q, k, v, g, beta, initial_state, _offsets(cu_seqlens, q), A_log, dt_bias), recorded


def _final_state_dtype(dtype: Any, q: Tensor) -> torch.dtype:
    if dtype is None:
        return torch.float64 if q.dtype == torch.float64 else torch.float32
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"final_state_dtype: is {dtype!r}; it must be a torch dtype")
    return dtype


# Past the dispatcher, where nobody would notice: it takes as long as the whole operation of one decoded token. What it asks of torch
# is not public; where a version does not have it, every call takes the operators.
_ordinary = frozenset((Tensor, torch.nn.Parameter))
_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)


def _unobserved(tensors: tuple[Tensor | None, ...]) -> bool:
    # No compiler, trace, mode or transform that has to see an operator, and no tensor that is not what it seems.
    if torch.compiler.is_compiling() or _modes is None or _transforms is None:
        return False
    if _modes() or _transforms() is not None or torch.jit.is_tracing():
        return False
    return all(x is None or (type(x) in _ordinary and not x.is_meta) for x in tensors)


def _written(*outputs: Tensor | None) -> None:
    # Given buffers: autograd must see that a tensor it saved has changed. An operator would say so by its schema.
    for x in outputs:
        if x is not None and not x.is_inference():
            torch.autograd.graph.increment_version(x)


def _refuse_recorded(**buffers: Any) -> None:
    name = next(name for name, buffer in buffers.items() if buffer is not None)
    raise RuntimeError(f"{name}: cannot be written in place while gradients are recorded; leave it out, or call under torch.no_grad()")


def _forward_out(
    operation: str,
    inputs: tuple[Any, ...],
    options: Options,
    o: Any,
    final_state: Any,
    final_state_dtype: torch.dtype | None,
    save: int,
    inplace_state: bool,
    segment_counts: Any,
) -> tuple[Any, ...]:
    q, v, cu_seqlens = inputs[0], inputs[2], inputs[6]
    _check_types(("o", "final_state", "segment_counts"), (o, final_state, segment_counts))
    given = (o, inputs[5] if inplace_state else final_state, segment_counts)
    o = _output(v) if o is None else o
    direct = _unobserved((*inputs, *given))
    saved = (None, None, None)
    if inplace_state:
        final_state = inputs[5]
        if not direct:
            _OPS.recurrent_forward_.default(*inputs, *options, o)
            return o, final_state, *saved
    elif final_state is None:
        final_state = _state(q, v, cu_seqlens, options, final_state_dtype)
    if operation == "chunk_forward" and save:
        saved = _saved(q, v, cu_seqlens, options, save)
    if direct:
        tensors = (*inputs, o, final_state, *saved, segment_counts)
        _run(_FUNCTIONS[operation], tensors, options.scale, options.integers, options.tolerance, q.device)
        _written(*given)
    elif operation == "recurrent_forward":
        _OPS.recurrent_forward_out.default(*inputs, *options, o, final_state)
    else:
        _OPS.chunk_forward_out.default(*inputs, *options, o, final_state, *saved, segment_counts)
    return o, final_state, *saved


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
    """(o, final_state, saved_c, saved_T, saved_states), None where not wanted. `save` None: what autograd will need."""
    inputs, recorded = _prepared(inputs)
    dtype = _final_state_dtype(final_state_dtype, inputs[0]) if output_final_state else None
    if save is None:
        # The reference backend's adjoint starts from the inputs.
        mask = SAVE_ALL if recorded and not options.is_reference else 0
    else:
        mask = sum(1 << i for i, wanted in enumerate(save) if wanted)
    buffers = o is not None or final_state is not None or inplace_state or segment_counts is not None
    if buffers and recorded:
        _refuse_recorded(inplace_state=inplace_state or None, o=o, final_state=final_state, segment_counts=segment_counts)
    # What writes into given tensors has no gradient to set up, which takes torch as long as a decoded token. A compiler has the
    # functional operator instead: it plans the memory itself.
    if buffers or not (recorded or torch.compiler.is_compiling()):
        return _forward_out(operation, inputs, options, o, final_state, dtype, mask, inplace_state, segment_counts)
    if operation == "recurrent_forward":
        o, final_state = _OPS.recurrent_forward.default(*inputs, *options, dtype)
        return o, None if dtype is None else final_state, None, None, None
    o, final_state, *saved = _OPS.chunk_forward.default(*inputs, *options, dtype, mask)
    return o, None if dtype is None else final_state, *(x if mask >> i & 1 else None for i, x in enumerate(saved))


def backward(
    inputs: tuple[Any, ...],
    saved: tuple[Any, ...],
    d_o: Any,
    d_final_state: Any,
    options: Options,
) -> tuple[Any, ...]:
    """Gradients in the order of ``_lib.GRADIENTS``, None for absent inputs."""
    inputs, _ = _prepared(inputs)
    _check_types((*_lib.SAVED, "d_o", "d_final_state"), (*saved, d_o, d_final_state))
    gradients = _OPS.chunk_backward.default(*inputs, *saved, d_o, d_final_state, *options, 0xFF)
    owners = inputs[:6] + inputs[7:]
    return tuple(None if x is None else gradient for x, gradient in zip(owners, gradients, strict=True))


def is_array(x: Any) -> bool:
    return isinstance(x, Tensor)
