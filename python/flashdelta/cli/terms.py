"""The size of what each output sums, for outputs whose exact value is next to nothing because its terms cancel (docs/numerics.md).

A third telling of the recurrence and its adjoint, in NumPy and float64, that keeps sums of squares beside the values. It is slow, and
only runs when an error is outside the contract by the output's own norm.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashdelta.cli.cases import Case

CHUNK = 64
# dg is <exp(g) S, dS> by its definition, but chunked code adds up parts that cancel within a chunk. Their rounding in float32 may show:
# this share of the parts' size counts, about what the 64 tokens of a chunk would lift dg itself to if nothing cancelled.
CHUNKED_GATE_SHARE = 1 / 64
_L2_EPS = 1e-6


@dataclass
class _Folded:
    """A case with every flag folded into plain inputs, and the factors by which its gradients return to the inputs given."""

    q: np.ndarray  # [B, T, HV, K], normalised, repeated for the value heads
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray  # [B, T, HV] log gates
    beta: np.ndarray
    scale: float
    dq: np.ndarray  # [B, T, HV, 1]
    dk: np.ndarray
    dg: np.ndarray  # [B, T, HV]
    dbeta: np.ndarray
    dA_log: np.ndarray


def _wide(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64)


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-_softplus(-x))


def _fold(case: Case) -> _Folded:
    t, flags = case.tensors, case.flags
    v = _wide(t["v"])
    group = v.shape[2] // t["q"].shape[2]
    q, k = (np.repeat(_wide(t[name]), group, axis=2) for name in ("q", "k"))
    rq = rk = np.ones((*q.shape[:3], 1))
    if flags["use_qk_l2norm_in_kernel"]:
        rq, rk = (1.0 / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + _L2_EPS) for x in (q, k))
    ones = np.ones(v.shape[:3])
    g, dg, dA_log = 0.0 * ones, ones, 0.0 * ones
    if t["g"] is not None:
        g = _wide(t["g"])
        if flags["use_gate_in_kernel"]:
            x = g + (0.0 if t["dt_bias"] is None else _wide(t["dt_bias"]))
            rate = np.exp(_wide(t["A_log"]))
            g, dg = -rate * _softplus(x), rate * _sigmoid(x)
            dA_log = np.where(np.exp(g) > 0.0, -g, 0.0)
    beta, dbeta = ones, ones
    if t["beta"] is not None:
        beta = _wide(t["beta"])
        if flags["use_beta_sigmoid_in_kernel"]:
            twice = 2.0 if flags["allow_neg_eigval"] else 1.0
            s = _sigmoid(beta)
            beta, dbeta = twice * s, twice * s * _sigmoid(-_wide(t["beta"]))
    scale = q.shape[-1] ** -0.5 if flags["scale"] is None else flags["scale"]
    return _Folded(q * rq, k * rk, v, g, beta, scale, rq, rk, dg, dbeta, dA_log)


def _outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., :, None] * b[..., None, :]


def _rows(a: np.ndarray, m: np.ndarray) -> np.ndarray:
    """a m over the rows of m, head by head."""
    return np.einsum("hk,hkv->hv", a, m)


def _columns(m: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("hkv,hv->hk", m, b)


class _Sequence:
    """One sequence of T tokens; every array is [T, HV, ...]."""

    def __init__(self, f: _Folded, row: int, tokens: slice, state: np.ndarray):
        self.q, self.k, self.v, self.g, self.beta = (x[row, tokens] for x in (f.q, f.k, f.v, f.g, f.beta))
        self.scale = f.scale
        self.length = len(self.q)
        self.decayed: list[np.ndarray] = []  # P_t = exp(g_t) S_(t-1)
        self.states = [state]
        for t in range(self.length):
            p = np.exp(self.g[t])[:, None, None] * self.states[-1]
            u = self.beta[t][:, None] * (self.v[t] - _rows(self.k[t], p))
            self.decayed.append(p)
            self.states.append(p + _outer(self.k[t], u))

    def forward_terms(self) -> tuple[float, float]:
        """Sums of squares of the terms of o and of the final state."""
        o = sum(self.scale**2 * np.sum(_rows(self.q[t] ** 2, self.states[t + 1] ** 2)) for t in range(self.length))
        if not self.length:
            return 0.0, float(np.sum(self.states[0] ** 2))
        u = self.beta[-1][:, None] * (self.v[-1] - _rows(self.k[-1], self.decayed[-1]))
        return float(o), float(np.sum(self.decayed[-1] ** 2) + np.sum(_outer(self.k[-1] ** 2, u**2)))

    def backward_terms(self, do: np.ndarray, dht: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
        """Squares of the terms per token and head, summed over channels; and of dh0, summed over everything."""
        names = ("dq", "dk", "dv", "dg", "dbeta")
        squares = {name: np.zeros((self.length, self.q.shape[1])) for name in names}
        ds, dh0 = dht, float(np.sum(dht**2))
        chunk_end = 0.0
        for t in reversed(range(self.length)):
            q, k, p, s, beta = self.q[t], self.k[t], self.decayed[t], self.states[t + 1], self.beta[t][:, None]
            if t == self.length - 1 or (t + 1) % CHUNK == 0:
                chunk_end = np.sum((s * ds) ** 2, axis=(1, 2))
            ds = ds + self.scale * _outer(q, do[t])
            du = _rows(k, ds)
            dr = beta * du
            u = beta * (self.v[t] - _rows(k, p))
            du_terms = _rows(k**2, ds**2)
            squares["dq"][t] = self.scale**2 * np.sum(_columns(s**2, do[t] ** 2), axis=1)
            squares["dk"][t] = np.sum(_columns(ds**2, u**2) + _columns(p**2, dr**2), axis=1)
            squares["dv"][t] = np.sum(beta**2 * du_terms, axis=1)
            squares["dbeta"][t] = np.sum(du_terms * (self.v[t] ** 2 + _rows(k**2, p**2)), axis=1)
            roles = (q * _columns(s, self.scale * do[t]), k * _columns(p, dr), k * _columns(ds, u))
            chunked = chunk_end + sum(np.sum(role**2, axis=1) for role in roles)
            direct = np.sum(p**2 * (ds**2 + _outer(k**2, dr**2)), axis=(1, 2))
            squares["dg"][t] = direct + CHUNKED_GATE_SHARE**2 * chunked
            decay = np.exp(self.g[t])[:, None, None]
            dh0 = float(np.sum(decay**2 * (ds**2 + _outer(k**2, dr**2))))
            ds = decay * (ds - _outer(k, dr))
        return squares, dh0


def _spans(case: Case) -> list[tuple[int, slice]]:
    cu_seqlens = case.tensors["cu_seqlens"]
    if cu_seqlens is None:
        batch, length = case.tensors["q"].shape[:2]
        return [(row, slice(0, length)) for row in range(batch)]
    return [(0, slice(int(a), int(b))) for a, b in itertools.pairwise(cu_seqlens)]


# Tokens of no sequence hold NaN, which NumPy would warn of; they are left out of every sum.
@np.errstate(all="ignore")
def norms(case: Case) -> dict[str, float]:
    """The 2-norm of the terms of every output of `case`."""
    f = _fold(case)
    batch, length, heads, _ = f.v.shape

    def state(x: Any, n: int) -> np.ndarray:
        if x is None:
            return np.zeros((heads, f.q.shape[-1], f.v.shape[-1]))
        return _wide(x[n]).swapaxes(1, 2) if case.flags["state_v_first"] else _wide(x[n])

    total = dict.fromkeys(("o", "final_state", "dh0"), 0.0)
    squares = {name: np.zeros((batch, length, heads)) for name in ("dq", "dk", "dv", "dg", "dbeta")}
    for n, (row, tokens) in enumerate(_spans(case)):
        sequence = _Sequence(f, row, tokens, state(case.tensors["initial_state"], n))
        o, final_state = sequence.forward_terms()
        total["o"] += o
        total["final_state"] += final_state
        if case.operation == "chunk":
            do = np.zeros_like(f.v[row, tokens]) if case.do is None else _wide(case.do[row, tokens])
            per_token, dh0 = sequence.backward_terms(do, state(case.dht, n))
            total["dh0"] += dh0
            for name, values in per_token.items():
                squares[name][row, tokens] = values
    inside = case.covered[None, :, None]

    def through(name: str, factor: np.ndarray) -> float:
        return float(np.sum(np.where(inside, squares[name] * factor**2, 0.0)))

    total.update(
        dq=through("dq", f.dq[..., 0]),
        dk=through("dk", f.dk[..., 0]),
        dv=through("dv", np.ones(())),
        dg=through("dg", f.dg),
        dbeta=through("dbeta", f.dbeta),
        dA_log=through("dg", f.dA_log),
        ddt_bias=through("dg", f.dg),
    )
    return {name: float(np.sqrt(value)) for name, value in total.items()}
