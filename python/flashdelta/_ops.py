"""The functions of the package: flash-linear-attention's names, order and defaults, then this library's own options by keyword."""

from __future__ import annotations

import sys
import warnings
from typing import Any, NamedTuple

import numpy as np

from flashdelta import _numpy, _options

Array = Any  # numpy.ndarray or torch.Tensor: all tensors of a call are of one kind


class ChunkForward(NamedTuple):
    """What :func:`chunk_gated_delta_rule_fwd` returns; None for what was not asked for.

    Attributes:
        g_cumsum: [B, T, HV] float32, inclusive sum of the log gates (natural) inside each chunk of 64 tokens.
        A: [B, T, HV, 64] float32, row i of (I + L)^-1 of token i's chunk, gates included (docs/numerics.md).
        o: [B, T, HV, V] in v's dtype.
        h: [S, HV, K, V] float32, states before every ``checkpoint_chunks``-th chunk, S = B*T // (64 n) + N. The state before chunk i
            (i % n == 0) of sequence m, whose first token is s, is at s // (64 n) + m + i // n. Slots of no chunk hold anything.
        final_state: [N, HV, K, V], or [N, HV, V, K] with ``state_v_first``.
    """

    g_cumsum: Array | None
    A: Array | None
    o: Array
    h: Array | None
    final_state: Array | None


class ChunkBackward(NamedTuple):
    """Gradients of :func:`chunk_gated_delta_rule_bwd`, each in its argument's shape and dtype; None where that argument was None.

    Attributes:
        dq: of q.
        dk: of k.
        dv: of v.
        dg: of g (of the raw gate with ``use_gate_in_kernel``).
        dbeta: of beta (of the logits with ``use_beta_sigmoid_in_kernel``).
        dh0: of initial_state.
        dA_log: of A_log.
        ddt_bias: of dt_bias.
    """

    dq: Array
    dk: Array
    dv: Array
    dg: Array | None
    dbeta: Array | None
    dh0: Array | None
    dA_log: Array | None
    ddt_bias: Array | None


def _carrier(q: Any) -> Any:
    # The module that handles q's kind of array. torch is imported by its user, never by us for a NumPy caller.
    if isinstance(q, np.ndarray):
        return _numpy
    if "torch" in sys.modules:
        from flashdelta import _torch

        if _torch.is_array(q):
            return _torch
    raise TypeError(f"q: is a {type(q).__name__}; it must be a NumPy array or a torch tensor")


def _refuse_unknown(function: str, keywords: dict[str, Any]) -> None:
    for name, value in keywords.items():
        if value is not None:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def _refuse_given(name: str, value: Any, why: str) -> None:
    if value is not None:
        raise ValueError(f"{name}: is a {type(value).__name__}; {why}, so it must be None")


def _state_v_first(state_v_first: Any, transpose_state_layout: Any) -> Any:
    if transpose_state_layout is None:
        return state_v_first
    if state_v_first:
        raise ValueError("state_v_first: is given together with transpose_state_layout, its deprecated name; give state_v_first alone")
    warnings.warn("transpose_state_layout is deprecated; use state_v_first", DeprecationWarning, stacklevel=3)
    return transpose_state_layout


def chunk_gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    beta: Array | None,
    scale: float | None = None,
    initial_state: Array | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any = None,
    cu_seqlens_cpu: Any = None,
    chunk_indices: Any = None,
    cp_context: None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    chunk_size: int | None = None,
    transpose_state_layout: bool | None = None,
    head_first: None = None,
    context_parallel: str = "auto",
    context_parallel_tolerance: float | None = None,
    num_segments: int = 0,
    batch_invariant: bool = False,
    backend: str = "auto",
    num_threads: int = 0,
    instruction_set: str = "best",
    checkpoint_chunks: int = 0,
    final_state_dtype: Any = None,
    o: Array | None = None,
    final_state: Array | None = None,
    **kwargs: Any,
) -> tuple[Array, Array | None]:
    r"""The gated delta rule over whole sequences, in chunks: prefill and training.

    Per sequence and value head, with a state S of [K, V] (value head h reads query and key head ``h // (HV // H)``)::

        S <- exp(g_t) S;   u = beta_t (v_t - k_t S);   S <- S + k_t^T u;   o_t = scale * q_t S

    The recurrence is that of Gated Delta Networks (Yang, Kautz and Hatamizadeh, 2024); docs/numerics.md has the chunked form and the
    error bounds. Differentiable for torch tensors (once; not twice), traceable by ``torch.compile(fullgraph=True)``. Inputs are never
    changed. Any strides are fine; the last axis of q, k and v must be contiguous.

    Args:
        q: [B, T, H, K] bfloat16, float16 or float32 (float64 with ``backend="reference"``). K and V are 1..256 on the CPU. On a GPU
            they are 128, q is bfloat16 or float16, and addresses and strides of q, k, v, o are multiples of 16 bytes.
        k: [B, T, H, K], q's dtype.
        v: [B, T, HV, V], q's dtype; HV is a multiple of H.
        g: [B, T, HV] float32, bfloat16 or float16: log gate, natural, at most 0 (-inf allowed); with ``use_gate_in_kernel`` the raw
            gate. None: no gate.
        beta: [B, T, HV] float32, bfloat16 or float16; with ``use_beta_sigmoid_in_kernel`` the logits. None: 1.
        scale: factor on q; None means ``K ** -0.5``, 0 means 0.
        initial_state: [N, HV, K, V] float32, bfloat16 or float16. None: zero.
        output_final_state: return the final state.
        use_qk_l2norm_in_kernel: q and k become ``x * rsqrt(sum(x**2) + 1e-6)`` per token and head.
        use_beta_sigmoid_in_kernel: beta becomes ``sigmoid(beta)``.
        allow_neg_eigval: beta becomes ``2 * sigmoid(beta)``; needs ``use_beta_sigmoid_in_kernel``.
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: [N + 1] int32 or int64 offsets into T, or a sequence of integers, non-decreasing within [0, T]; B must be 1. Rows
            of o and of gradients for tokens of no sequence are zero. None: B sequences of T tokens. Beside tensors on a GPU: a tensor
            there is used as it is and never read by the host; anything else is checked and copied there without a synchronisation,
            which is an error while a CUDA graph is captured.
        cu_seqlens_cpu: accepted, not needed.
        chunk_indices: accepted, not needed.
        cp_context: must be None: sequences are not spread over several processes.
        use_gate_in_kernel: g becomes ``-exp(A_log) * softplus(g + dt_bias)``; needs ``A_log``.
        A_log: [HV] float32, bfloat16 or float16; with ``use_gate_in_kernel`` only.
        dt_bias: [HV] float32, bfloat16 or float16; with ``use_gate_in_kernel`` only.
        chunk_size: 16, 32, 64 or None: a hint of another implementation's, without effect; the chunk is 64 tokens.
        transpose_state_layout: deprecated name of ``state_v_first`` (DeprecationWarning).
        head_first: removed; anything but None raises DeprecationWarning.
        context_parallel: "auto": long sequences of few heads are cut into segments, and what is certified to matter less than the
            tolerance is cut off; "exact": segments, nothing cut off; "off": no segments. docs/context_parallel.md has the whole.
        context_parallel_tolerance: what "auto" may cut off, relative to the state; None means 1e-6, with bfloat16 or float16 q 1e-5.
        num_segments: segments per sequence and head, 1..64 (fewer where there are fewer chunks); 0: planned.
        batch_invariant: a sequence's bits do not depend on what it is packed with.
        backend: "auto" (by the tensors' device), "cpu", "cuda", or "reference" (float64, token by token, slow).
        num_threads: CPU threads; 0: all that the process may use.
        instruction_set: "best", "baseline", "avx2" or "avx512", on the CPU.
        checkpoint_chunks: for the backward, keep the state of every n-th chunk (1..64); more costs time and saves memory. 0 means 1.
        final_state_dtype: dtype of the final state; None means float32.
        o: buffer for the output, [B, T, HV, V] in v's dtype; written completely. Not while gradients are recorded.
        final_state: buffer for the final state, float32, bfloat16 or float16; implies ``output_final_state``. Not while gradients are
            recorded. May be ``initial_state`` itself.
        **kwargs: anything but None is refused.

    Returns:
        (o, final_state): o [B, T, HV, V] in v's dtype; final_state [N, HV, K, V], or None without ``output_final_state``.

    Raises:
        ValueError: a value, shape or stride is not allowed; the text names the argument.
        TypeError: a dtype or Python type is not allowed, or a keyword is unknown.
        DeprecationWarning: ``head_first`` is given.
        RuntimeError: the backend is not available here, or buffers are given while gradients are recorded; from ``backward()``, that
            the backend has none (on a GPU).
    """
    state_v_first = _state_v_first(state_v_first, transpose_state_layout)
    if head_first is not None:
        raise DeprecationWarning("head_first has been removed; q, k, v are [B, T, heads, width]")
    if chunk_size is not None and chunk_size not in (16, 32, 64):
        raise ValueError(f"chunk_size: is {chunk_size}; it must be 16, 32 or 64")
    _refuse_given("cp_context", cp_context, "sequences are not spread over several processes")
    _refuse_unknown("chunk_gated_delta_rule", kwargs)
    options = _options.pack(
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        context_parallel=context_parallel,
        context_parallel_tolerance=context_parallel_tolerance,
        num_segments=num_segments,
        batch_invariant=batch_invariant,
        backend=backend,
        num_threads=num_threads,
        instruction_set=instruction_set,
        checkpoint_chunks=checkpoint_chunks,
    )
    inputs = (q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias)
    wanted = bool(output_final_state) or final_state is not None
    return _carrier(q).forward("chunk_forward", inputs, options, wanted, o, final_state, final_state_dtype)[:2]


def fused_recurrent_gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None = None,
    gk: None = None,
    gv: None = None,
    beta: Array | None = None,
    scale: float | None = None,
    initial_state: Array | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any = None,
    *,
    transpose_state_layout: bool | None = None,
    head_first: Any = None,
    cu_seqlens_cpu: Any = None,
    chunk_indices: Any = None,
    inplace_state: bool = False,
    batch_invariant: bool = False,
    backend: str = "auto",
    num_threads: int = 0,
    instruction_set: str = "best",
    context_parallel: str = "auto",
    context_parallel_tolerance: float | None = None,
    num_segments: int = 0,
    final_state_dtype: Any = None,
    o: Array | None = None,
    final_state: Array | None = None,
    **kwargs: Any,
) -> tuple[Array, Array | None]:
    """The gated delta rule token by token: decode of one or a few tokens per sequence. For inference; it has no gradient.

    The formula and all arguments not listed here are those of :func:`chunk_gated_delta_rule`.

    Args:
        q: [B, T, H, K] bfloat16, float16 or float32.
        k: [B, T, H, K], q's dtype.
        v: [B, T, HV, V], q's dtype; may be bfloat16 or float16 where q and k are float32.
        g: [B, T, HV] float32, bfloat16 or float16. None: no gate.
        gk: must be None: gates are one number per token and head.
        gv: must be None.
        beta: [B, T, HV] float32, bfloat16 or float16. None: 1.
        scale: factor on q; None means ``K ** -0.5``.
        initial_state: [N, HV, K, V] float32, bfloat16 or float16. None: zero.
        output_final_state: return the final state.
        use_qk_l2norm_in_kernel: normalise q and k.
        use_gate_in_kernel: g is the raw gate; needs ``A_log``.
        A_log: [HV].
        dt_bias: [HV].
        use_beta_sigmoid_in_kernel: beta is a logit.
        allow_neg_eigval: twice the sigmoid.
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: [N + 1] int32 or int64 offsets, or a sequence of integers.
        transpose_state_layout: deprecated name of ``state_v_first`` (DeprecationWarning).
        head_first: accepted, without effect.
        cu_seqlens_cpu: accepted, not needed.
        chunk_indices: accepted, not needed.
        inplace_state: write the final state into ``initial_state`` and return that.
        batch_invariant: as in :func:`chunk_gated_delta_rule`.
        backend: as in :func:`chunk_gated_delta_rule`.
        num_threads: as in :func:`chunk_gated_delta_rule`.
        instruction_set: as in :func:`chunk_gated_delta_rule`.
        context_parallel: accepted as in :func:`chunk_gated_delta_rule`; tokens are taken one by one whatever it says.
        context_parallel_tolerance: likewise.
        num_segments: likewise.
        final_state_dtype: dtype of the final state; None means float32.
        o: buffer for the output, written completely.
        final_state: buffer for the final state; implies ``output_final_state``.
        **kwargs: anything but None is refused.

    Returns:
        (o, final_state): o [B, T, HV, V] in v's dtype; final_state [N, HV, K, V], or None when it is neither asked for nor written in
        place.

    Raises:
        ValueError: a value, shape or stride is not allowed; the text names the argument.
        TypeError: a dtype or Python type is not allowed, or a keyword is unknown.
        RuntimeError: the backend is not available here; a buffer or ``inplace_state`` while gradients are recorded; or, from
            ``backward()``, that there is no gradient.
    """
    state_v_first = _state_v_first(state_v_first, transpose_state_layout)
    _refuse_given("gk", gk, "gates are one number per token and value head")
    _refuse_given("gv", gv, "gates are one number per token and value head")
    _refuse_unknown("fused_recurrent_gated_delta_rule", kwargs)
    inplace = _options.flag("inplace_state", inplace_state) != 0
    if inplace and initial_state is None:
        raise ValueError("initial_state: is None; inplace_state needs it")
    if inplace and final_state is not None:
        raise ValueError("final_state: is given; with inplace_state the final state goes to initial_state")
    options = _options.pack(
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        context_parallel=context_parallel,
        context_parallel_tolerance=context_parallel_tolerance,
        num_segments=num_segments,
        batch_invariant=batch_invariant,
        backend=backend,
        num_threads=num_threads,
        instruction_set=instruction_set,
    )
    inputs = (q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias)
    wanted = bool(output_final_state) or final_state is not None
    return _carrier(q).forward("recurrent_forward", inputs, options, wanted, o, final_state, final_state_dtype, inplace_state=inplace)[:2]


# The C ABI's names of what the low-level functions call as flash-linear-attention does.
_LOW_LEVEL_NAMES = {"saved_c": "g_cumsum", "saved_T": "A", "saved_states": "h", "d_o": "do", "d_final_state": "dht"}


def _rename(error: Exception) -> Exception:
    name, colon, rest = str(error).partition(":")
    return type(error)(f"{_LOW_LEVEL_NAMES[name]}{colon}{rest}") if name in _LOW_LEVEL_NAMES else error


def chunk_gated_delta_rule_fwd(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None = None,
    beta: Array | None = None,
    scale: float | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Any = None,
    output_final_state: bool = True,
    output_h: bool = False,
    *,
    output_g_cumsum: bool = False,
    output_A: bool = False,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    final_state_dtype: Any = None,
    o: Array | None = None,
    final_state: Array | None = None,
    segment_counts: Array | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    context_parallel: str = "auto",
    context_parallel_tolerance: float | None = None,
    num_segments: int = 0,
    batch_invariant: bool = False,
    backend: str = "auto",
    num_threads: int = 0,
    instruction_set: str = "best",
    checkpoint_chunks: int = 0,
) -> ChunkForward:
    """The forward alone, with what a backward reads: outside autograd, for callers that keep the saved tensors themselves.

    Args:
        q: [B, T, H, K]; this and every argument not listed: :func:`chunk_gated_delta_rule`.
        k: [B, T, H, K].
        v: [B, T, HV, V].
        g: [B, T, HV] or None.
        beta: [B, T, HV] or None.
        scale: factor on q; None means ``K ** -0.5``.
        initial_state: [N, HV, K, V] or None.
        cu_seqlens: [N + 1] offsets or None.
        output_final_state: give ``final_state``.
        output_h: give ``h``, which :func:`chunk_gated_delta_rule_bwd` needs.
        output_g_cumsum: give ``g_cumsum``.
        output_A: give ``A``; with both, the backward computes less again.
        A_log: [HV], with ``use_gate_in_kernel``.
        dt_bias: [HV] or None, with ``use_gate_in_kernel``.
        final_state_dtype: None means float32.
        o: buffer for the output.
        final_state: buffer for the final state.
        segment_counts: buffer of 4 int32 for how context parallelism fell out: segments run, boundaries warmed up, boundaries reached
            exactly, chunks that the warm-ups ran (docs/context_parallel.md). Not while gradients are recorded.
        use_qk_l2norm_in_kernel: as in :func:`chunk_gated_delta_rule`.
        use_gate_in_kernel: as in :func:`chunk_gated_delta_rule`.
        use_beta_sigmoid_in_kernel: as in :func:`chunk_gated_delta_rule`.
        allow_neg_eigval: as in :func:`chunk_gated_delta_rule`.
        state_v_first: as in :func:`chunk_gated_delta_rule`.
        context_parallel: as in :func:`chunk_gated_delta_rule`.
        context_parallel_tolerance: as in :func:`chunk_gated_delta_rule`.
        num_segments: as in :func:`chunk_gated_delta_rule`.
        batch_invariant: as in :func:`chunk_gated_delta_rule`.
        backend: as in :func:`chunk_gated_delta_rule`.
        num_threads: as in :func:`chunk_gated_delta_rule`.
        instruction_set: as in :func:`chunk_gated_delta_rule`.
        checkpoint_chunks: as in :func:`chunk_gated_delta_rule`.

    Returns:
        :class:`ChunkForward`.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`chunk_gated_delta_rule`.
    """
    packed = _options.pack(
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        context_parallel=context_parallel,
        context_parallel_tolerance=context_parallel_tolerance,
        num_segments=num_segments,
        batch_invariant=batch_invariant,
        backend=backend,
        num_threads=num_threads,
        instruction_set=instruction_set,
        checkpoint_chunks=checkpoint_chunks,
    )
    inputs = (q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias)
    wanted = bool(output_final_state) or final_state is not None
    save = (bool(output_g_cumsum), bool(output_A), bool(output_h))
    written = {"save": save, "segment_counts": segment_counts}
    try:
        o, state, c, t, h = _carrier(q).forward("chunk_forward", inputs, packed, wanted, o, final_state, final_state_dtype, **written)
    except (ValueError, TypeError) as error:
        raise _rename(error) from None
    return ChunkForward(c, t, o, h, state)


def chunk_gated_delta_rule_bwd(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    beta: Array | None,
    do: Array | None,
    dht: Array | None = None,
    scale: float | None = None,
    initial_state: Array | None = None,
    cu_seqlens: Any = None,
    *,
    h: Array | None = None,
    g_cumsum: Array | None = None,
    A: Array | None = None,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    context_parallel: str = "auto",
    context_parallel_tolerance: float | None = None,
    num_segments: int = 0,
    batch_invariant: bool = False,
    backend: str = "auto",
    num_threads: int = 0,
    instruction_set: str = "best",
    checkpoint_chunks: int = 0,
) -> ChunkBackward:
    """All gradients, from the forward's inputs and its saved tensors alone.

    Args:
        q: [B, T, H, K]; the inputs are those of the forward.
        k: [B, T, H, K].
        v: [B, T, HV, V].
        g: [B, T, HV] or None.
        beta: [B, T, HV] or None.
        do: [B, T, HV, V] float32, bfloat16 or float16, gradient of o; None: zero.
        dht: [N, HV, K, V] float32, bfloat16 or float16, gradient of the final state; None: zero.
        scale: as in the forward.
        initial_state: as in the forward.
        cu_seqlens: as in the forward.
        h: the forward's ``h``; required, except by the reference backend.
        g_cumsum: the forward's, or None: computed again.
        A: the forward's, or None: computed again.
        A_log: as in the forward.
        dt_bias: as in the forward.
        use_qk_l2norm_in_kernel: as in the forward.
        use_gate_in_kernel: as in the forward.
        use_beta_sigmoid_in_kernel: as in the forward.
        allow_neg_eigval: as in the forward.
        state_v_first: as in the forward.
        context_parallel: may differ from the forward's.
        context_parallel_tolerance: as in the forward.
        num_segments: as in the forward.
        batch_invariant: as in the forward.
        backend: as in the forward.
        num_threads: as in the forward.
        instruction_set: as in the forward.
        checkpoint_chunks: as in the forward.

    Returns:
        :class:`ChunkBackward`.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`chunk_gated_delta_rule`.
    """
    packed = _options.pack(
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        context_parallel=context_parallel,
        context_parallel_tolerance=context_parallel_tolerance,
        num_segments=num_segments,
        batch_invariant=batch_invariant,
        backend=backend,
        num_threads=num_threads,
        instruction_set=instruction_set,
        checkpoint_chunks=checkpoint_chunks,
    )
    inputs = (q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias)
    try:
        return ChunkBackward(*_carrier(q).backward(inputs, (g_cumsum, A, h), do, dht, packed))
    except (ValueError, TypeError) as error:
        raise _rename(error) from None
