"""The size of what each output sums, for outputs whose exact value is next to nothing because its terms cancel (docs/numerics.md).

A third telling of the recurrence and its adjoint, in NumPy and float64, that keeps sums of squares beside the values. It is slow, and
only runs when an error is outside the contract by the output's own norm.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashdelta.cli import chunk_terms
from flashdelta.cli.cases import Case
from flashdelta.cli.chunk_terms import CHUNK, Chunk, Sizes

_L2_EPS = 1e-6
# What context_parallel="auto" may leave out of a state unless told otherwise, relative to what the state was: by bytes of q's elements.
_LEFT_OUT = {8: 1e-6, 4: 1e-6, 2: 1e-5}


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
        self.adjoints = []  # behind each chunk, last first
        for t in reversed(range(self.length)):
            q, k, p, s, beta = self.q[t], self.k[t], self.decayed[t], self.states[t + 1], self.beta[t][:, None]
            if t == self.length - 1 or (t + 1) % CHUNK == 0:
                self.adjoints.append(ds)
            ds = ds + self.scale * _outer(q, do[t])
            du = _rows(k, ds)
            dr = beta * du
            u = beta * (self.v[t] - _rows(k, p))
            du_terms = _rows(k**2, ds**2)
            squares["dq"][t] = self.scale**2 * np.sum(_columns(s**2, do[t] ** 2), axis=1)
            squares["dk"][t] = np.sum(_columns(ds**2, u**2) + _columns(p**2, dr**2), axis=1)
            squares["dv"][t] = np.sum(beta**2 * du_terms, axis=1)
            squares["dbeta"][t] = np.sum(du_terms * (self.v[t] ** 2 + _rows(k**2, p**2)), axis=1)
            squares["dg"][t] = np.sum(p**2 * (ds**2 + _outer(k**2, dr**2)), axis=(1, 2))
            decay = np.exp(self.g[t])[:, None, None]
            dh0 = float(np.sum(decay**2 * (ds**2 + _outer(k**2, dr**2))))
            ds = decay * (ds - _outer(k, dr))
        self.adjoints.append(ds)
        return squares, dh0

    def without_backward(self) -> None:
        """What backward_terms leaves for chunk_sizes where nothing flows back."""
        self.adjoints = [np.zeros_like(self.states[0])] * (-(-self.length // CHUNK) + 1)

    def chunk_sizes(self, do: np.ndarray, left_out: float) -> Sizes:
        """After backward_terms with the same `do`, or without_backward and zeros: what the chunked algebra sums."""
        spans = [slice(begin, begin + CHUNK) for begin in range(0, self.length, CHUNK)]
        per_head = (self.q, self.k, self.v, self.g, self.beta)
        chunks = [Chunk(*(x[span].swapaxes(0, 1) for x in per_head), self.scale) for span in spans]
        states = [self.states[span.start] for span in spans] + self.states[-1:]
        return chunk_terms.sizes(chunks, states, self.adjoints[::-1], do, left_out)


def _spans(case: Case) -> list[tuple[int, slice]]:
    cu_seqlens = case.tensors["cu_seqlens"]
    if cu_seqlens is None:
        batch, length = case.tensors["q"].shape[:2]
        return [(row, slice(0, length)) for row in range(batch)]
    return [(0, slice(int(a), int(b))) for a, b in itertools.pairwise(cu_seqlens)]


@dataclass
class Norms:
    """2-norms of what every output of a case sums: token by token, and by chunks (none for a recurrent call)."""

    by_token: dict[str, float]
    by_chunk: dict[str, float]


class _Total:
    """Sums of squares over sequences, taken through the flags to the gradients of the inputs given."""

    def __init__(self, shape: tuple[int, int, int]):
        self.whole = dict.fromkeys(("o", "final_state", "dh0"), 0.0)
        self.per_token = {name: np.zeros(shape) for name in ("dq", "dk", "dv", "dg", "dbeta")}

    def add(self, row: int, tokens: slice, per_token: dict[str, np.ndarray], **whole: float) -> None:
        for name, value in whole.items():
            self.whole[name] += value
        for name, values in per_token.items():
            self.per_token[name][row, tokens] = values

    def norms(self, f: _Folded, covered: np.ndarray) -> dict[str, float]:
        inside = covered[None, :, None]

        def through(name: str, factor: Any) -> float:
            return float(np.sum(np.where(inside, self.per_token[name] * factor**2, 0.0)))

        squares = self.whole | {
            "dq": through("dq", f.dq[..., 0]),
            "dk": through("dk", f.dk[..., 0]),
            "dv": through("dv", np.ones(())),
            "dg": through("dg", f.dg),
            "dbeta": through("dbeta", f.dbeta),
            "dA_log": through("dg", f.dA_log),
            "ddt_bias": through("dg", f.dg),
        }
        return {name: float(np.sqrt(value)) for name, value in squares.items()}


# Tokens of no sequence hold NaN, which NumPy would warn of; they are left out of every sum.
@np.errstate(all="ignore")
def norms(case: Case) -> Norms:
    """The 2-norm of the terms of every output of `case`."""
    f = _fold(case)
    heads = f.v.shape[2]
    left_out = _LEFT_OUT[case.tensors["q"].itemsize] if case.execution.get("context_parallel") == "auto" else 0.0
    by_token, by_chunk = _Total(f.v.shape[:3]), _Total(f.v.shape[:3])

    def state(x: Any, n: int) -> np.ndarray:
        if x is None:
            return np.zeros((heads, f.q.shape[-1], f.v.shape[-1]))
        return _wide(x[n]).swapaxes(1, 2) if case.flags["state_v_first"] else _wide(x[n])

    for n, (row, tokens) in enumerate(_spans(case)):
        sequence = _Sequence(f, row, tokens, state(case.tensors["initial_state"], n))
        o, final_state = sequence.forward_terms()
        by_token.add(row, tokens, {}, o=o, final_state=final_state)
        if case.operation == "chunk":
            do = np.zeros_like(f.v[row, tokens]) if case.do is None else _wide(case.do[row, tokens])
            if case.backward:
                per_token, dh0 = sequence.backward_terms(do, state(case.dht, n))
                by_token.add(row, tokens, per_token, dh0=dh0)
            else:
                sequence.without_backward()
            sums = sequence.chunk_sizes(do, left_out)
            by_chunk.add(row, tokens, sums.per_token, o=sums.o, final_state=sums.final_state, dh0=sums.dh0)
    return Norms(by_token.norms(f, case.covered), by_chunk.norms(f, case.covered))
