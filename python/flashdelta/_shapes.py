"""Shapes of what an operation writes, from its inputs' shapes alone, for NumPy and torch alike."""

from __future__ import annotations

from typing import Any

from flashdelta._options import CHUNK, Options


def _offsets(cu_seqlens: Any) -> int:
    return max(cu_seqlens.shape[0] - 1, 0) if len(cu_seqlens.shape) else 0


def state(q: Any, v: Any, cu_seqlens: Any, options: Options) -> tuple[int, ...]:
    """[N, HV, K, V], or [N, HV, V, K] with state_v_first."""
    q_shape, v_shape = q.shape, v.shape
    if len(q_shape) != 4 or len(v_shape) != 4:
        return (0, 0, 0, 0)  # a wrong rank is the library's to refuse, so allocating for it must not fail here first
    n = q_shape[0] if cu_seqlens is None else _offsets(cu_seqlens)
    K, V = q_shape[3], v_shape[3]
    return (n, v_shape[2], V, K) if options.state_v_first else (n, v_shape[2], K, V)


def saved_c(v: Any) -> tuple[int, ...]:
    return tuple(v.shape[:3])


def saved_T(v: Any) -> tuple[int, ...]:
    return (*v.shape[:3], CHUNK)


def saved_states(q: Any, v: Any, cu_seqlens: Any, options: Options) -> tuple[int, ...]:
    """[S, HV, K, V]; S bounds the chunks of every sequence from shapes, whatever cu_seqlens holds."""
    q_shape, v_shape = q.shape, v.shape
    if len(q_shape) != 4 or len(v_shape) != 4:
        return (0, 0, 0, 0)
    n = q_shape[0] if cu_seqlens is None else _offsets(cu_seqlens)
    return (q_shape[0] * q_shape[1] // (CHUNK * options.chunks_per_state) + n, v_shape[2], q_shape[3], v_shape[3])
