"""Shapes of what an operation writes, from its inputs' shapes alone, for NumPy and torch alike."""

from __future__ import annotations

from typing import Any

from flashdelta._options import CHUNK, Options


def _axis(array: Any, axis: int) -> int:
    # A wrong rank is the library's to refuse, so allocating for it must not fail here first.
    return array.shape[axis] if len(array.shape) > axis else 0


def sequences(q: Any, cu_seqlens: Any) -> int:
    """N: the batch rows, or one less than the offsets."""
    return _axis(q, 0) if cu_seqlens is None else max(_axis(cu_seqlens, 0) - 1, 0)


def state(q: Any, v: Any, cu_seqlens: Any, options: Options) -> tuple[int, ...]:
    """[N, HV, K, V], or [N, HV, V, K] with state_v_first."""
    widths = (_axis(q, 3), _axis(v, 3))
    return (sequences(q, cu_seqlens), _axis(v, 2), *(widths[::-1] if options.state_v_first else widths))


def saved_c(v: Any) -> tuple[int, ...]:
    return tuple(v.shape[:3])


def saved_T(v: Any) -> tuple[int, ...]:
    return (*v.shape[:3], CHUNK)


def saved_states(q: Any, v: Any, cu_seqlens: Any, options: Options) -> tuple[int, ...]:
    """[S, HV, K, V]; S bounds the chunks of every sequence from shapes, whatever cu_seqlens holds."""
    slots = _axis(q, 0) * _axis(q, 1) // (CHUNK * options.chunks_per_state) + sequences(q, cu_seqlens)
    return (slots, _axis(v, 2), _axis(q, 3), _axis(v, 3))
