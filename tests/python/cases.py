"""Inputs, and the recurrence written down once more in NumPy: what shows that every argument reaches its place."""

from __future__ import annotations

import itertools

import numpy as np


def relative_error(x, expected) -> float:
    x, expected = np.asarray(x, np.float64), np.asarray(expected, np.float64)
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(x - expected) / size) if size else float(np.linalg.norm(x))


def inputs(seed=0, B=1, T=70, H=2, HV=4, K=16, V=24, dtype=np.float32):
    """q, k, v, g, beta by name; keys near unit length, gates that forget over a few tens of tokens."""
    rng = np.random.default_rng(seed)
    return {
        "q": rng.standard_normal((B, T, H, K)).astype(dtype),
        "k": (rng.standard_normal((B, T, H, K)) / np.sqrt(K)).astype(dtype),
        "v": rng.standard_normal((B, T, HV, V)).astype(dtype),
        "g": (-0.1 * rng.random((B, T, HV))).astype(np.float64 if dtype == np.float64 else np.float32),
        "beta": rng.random((B, T, HV)).astype(np.float64 if dtype == np.float64 else np.float32),
    }


def state(seed=1, N=1, HV=4, K=16, V=24, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((N, HV, K, V)).astype(dtype)


def with_flags(flags, **shape):
    """Inputs that the flags of a call complete: a state per sequence, and gates that are made in the kernel get their parameters."""
    x = inputs(**shape)
    (HV, V), K = x["v"].shape[2:], x["k"].shape[3]
    n = len(flags["cu_seqlens"]) - 1 if "cu_seqlens" in flags else x["q"].shape[0]
    x["initial_state"] = state(N=n, HV=HV, K=K, V=V)
    if flags.get("use_gate_in_kernel"):
        x |= {"A_log": np.linspace(-2, 0, HV, dtype=np.float32), "dt_bias": np.linspace(-1, 1, HV, dtype=np.float32)}
    return x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def recurrence(
    q, k, v, g, beta, scale=None, initial_state=None, cu_seqlens=None, l2norm=False, A_log=None, dt_bias=None, logits=False, twice=False
):
    """o [B, T, HV, V] and the final state [N, HV, K, V], in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if l2norm:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    g = np.zeros((B, T, HV)) if g is None else np.asarray(g, np.float64)
    if A_log is not None:
        g = -np.exp(np.asarray(A_log, np.float64)) * np.logaddexp(0, g + (0 if dt_bias is None else np.asarray(dt_bias, np.float64)))
    beta = np.ones((B, T, HV)) if beta is None else np.asarray(beta, np.float64)
    if logits:
        beta = sigmoid(beta) * (2 if twice else 1)
    scale = K**-0.5 if scale is None else scale
    if cu_seqlens is None:
        sequences = [(row, 0, T) for row in range(B)]
    else:
        sequences = [(0, begin, end) for begin, end in itertools.pairwise(cu_seqlens)]
    o, final = np.zeros((B, T, HV, V)), np.zeros((len(sequences), HV, K, V))
    for n, (row, begin, end) in enumerate(sequences):
        for h in range(HV):
            S = np.zeros((K, V)) if initial_state is None else np.array(initial_state[n, h], np.float64)
            key = h // (HV // H)
            for t in range(begin, end):
                S = np.exp(g[row, t, h]) * S
                u = beta[row, t, h] * (v[row, t, h] - k[row, t, key] @ S)
                S = S + np.outer(k[row, t, key], u)
                o[row, t, h] = scale * q[row, t, key] @ S
            final[n, h] = S
    return o, final
