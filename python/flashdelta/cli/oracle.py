"""The float64 oracle, called so that a progress bar can follow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import flashdelta

# Tokens of one call: long enough that threads are busy, short enough that a bar moves.
BLOCK = 256


def widen(x: Any) -> Any:
    """float64 copies of floating arrays; offsets, flags and None as they are."""
    if isinstance(x, np.ndarray) and x.dtype.kind not in "iu":
        return x.astype(np.float64)
    return x


def prefill(
    tokens: dict[str, np.ndarray], constants: dict[str, Any], state: np.ndarray | None, threads: int, advance: Callable[[float], None]
) -> tuple[np.ndarray, np.ndarray]:
    """o [1, T, HV, V] and final_state in float64 for one sequence, from the very inputs (rounded as they are) that a backend got.

    Args:
        tokens: q, k, v, g, beta of T tokens.
        constants: A_log, dt_bias and flags.
        state: float64 state before the first token, or None.
        advance: called with the number of tokens done.
    """
    length = tokens["q"].shape[1]
    constants = {name: widen(x) for name, x in constants.items()}
    outputs = []
    for begin in range(0, length, BLOCK):
        block = {name: widen(x[:, begin : begin + BLOCK]) for name, x in tokens.items()}
        o, state = flashdelta.chunk_gated_delta_rule(
            **block, **constants, initial_state=state, output_final_state=True, backend="reference", num_threads=threads
        )
        outputs.append(o)
        advance(o.shape[1])
    return np.concatenate(outputs, axis=1), state
