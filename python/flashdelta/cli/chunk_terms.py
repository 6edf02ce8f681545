"""The size of what the chunked algebra sums, for outputs that lie far below it because the sums cancel (docs/numerics.md).

Repeated keys with beta 1 or a product of many factors below 1 leave a state, or its adjoint, far smaller than the parts that a chunk adds
up to it, and float32 rounds the parts. The formulas are docs/numerics.md's, with every factor squared: sums of squares of the terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CHUNK = 64
# Of a chunk's terms, what float32 may lose: four roundings of half a unit (2^-24 each).
ROUNDING = 2.0**-22


def _t(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(-1, -2)


def _norms(x: np.ndarray) -> np.ndarray:
    """Sums of squares per head, shaped to spread over a matrix."""
    return np.sum(x, axis=(-1, -2))[:, None, None]


class Chunk:
    """One chunk of every head: q, k [HV, C, K], v [HV, C, V], gates and beta [HV, C]; everything below is squared but T and M."""

    def __init__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, beta: np.ndarray, scale: float):
        length = q.shape[1]
        kept = np.exp(g)
        G = np.zeros((*g.shape, length))
        for i in range(length):  # a running product: gates of minus infinity leave no inf - inf
            G[:, i, :i] = G[:, i - 1, :i] * kept[:, i, None]
            G[:, i, i] = 1.0
        gam = np.cumprod(kept, axis=1)
        L = np.tril(beta[..., None] * (k @ _t(k)) * G, -1)
        self.T = np.linalg.inv(np.eye(length) + L)
        self.G, self.gam, self.tail = G**2, (gam**2)[..., None], (G[:, -1, :] ** 2)[..., None]
        self.q, self.k, self.v, self.beta, self.scale = q**2, k**2, v**2, (beta**2)[..., None], scale**2
        self.kk = np.tril(self.k @ _t(self.k) * self.G, -1)
        self.P = self.scale * (self.q @ _t(self.k)) * self.G
        decay = gam[:, -1, None, None]
        self.M = decay * np.eye(k.shape[-1]) - _t(G[:, -1, :, None] * k) @ self.T @ ((beta * gam)[..., None] * k)
        self.decay = decay**2

    def updates(self, S: np.ndarray, values: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """R and U [HV, C, V] from the squared state in front; `values` False takes v as zero."""
        R = self.v * values + self.gam * (self.k @ S)
        X = self.beta * R
        U = self.T**2 @ X
        return R, U + self.T**2 @ (self.beta * self.kk @ U)  # the second: what L's own rounding does

    def output(self, S: np.ndarray, U: np.ndarray) -> np.ndarray:
        return self.scale * self.gam * (self.q @ S) + self.P @ U

    def state(self, S: np.ndarray, U: np.ndarray) -> np.ndarray:
        return self.decay * S + _t(self.tail * self.k) @ U

    def adjoint_updates(self, do: np.ndarray, D: np.ndarray) -> np.ndarray:
        """dX from the squared adjoint of the state behind."""
        return _t(self.T**2) @ (_t(self.P) @ do + self.tail * (self.k @ D))

    def adjoint_state(self, do: np.ndarray, D: np.ndarray, dX: np.ndarray) -> np.ndarray:
        return self.decay * D + self.scale * _t(self.gam * self.q) @ do + _t(self.gam * self.beta * self.k) @ dX

    def passed_on(self, lost: np.ndarray, terms: np.ndarray) -> np.ndarray:
        """What becomes of `lost` [HV, 1, 1] through the transition, whose own `terms` are rounded as well."""
        if not lost.any():
            return lost
        return np.linalg.norm(self.M, 2, axis=(1, 2))[:, None, None] ** 2 * lost + ROUNDING**2 * _norms(terms)

    def gradients(self, S: np.ndarray, D: np.ndarray, do: np.ndarray) -> dict[str, np.ndarray]:
        """Per token and head [HV, C], summed over channels."""
        R, U = self.updates(S)
        dX = self.adjoint_updates(do, D)
        dL, dP = np.tril(dX @ _t(U), -1), np.tril(do @ _t(U))
        E, N = self.scale * dP * self.G, self.beta * dL * self.G
        q_reads, k_reads = self.scale * self.gam * (do @ _t(S)), self.gam * self.beta * (dX @ _t(S))
        k_writes = self.tail * (U @ _t(D))
        dq = q_reads + E @ self.k
        dk = k_reads + k_writes + N @ self.k + _t(E) @ self.q + _t(N) @ self.k
        # dg[i]: reads of the state from i on, writes before i, the state carried through, and the pairs of tokens that i lies between.
        reads, writes = np.sum(self.q * q_reads + self.k * k_reads, axis=-1), np.sum(self.k * k_writes, axis=-1)
        pairs = dP * self.P + dL * self.beta * self.kk
        across = np.cumsum(np.cumsum(pairs[:, ::-1], axis=1)[:, ::-1], axis=2)  # [i, j]: rows from i on, columns up to j
        crossing = np.concatenate([np.zeros_like(reads[:, :1]), np.diagonal(across, -1, 1, 2)], axis=1)
        carried = self.decay[:, 0] * np.sum(S * D, axis=(1, 2))[:, None]
        dg = np.cumsum(reads[:, ::-1], axis=1)[:, ::-1] + np.cumsum(writes, axis=1) - writes + carried + crossing
        return {
            "dq": np.sum(dq, axis=-1),
            "dk": np.sum(dk, axis=-1),
            "dv": np.sum(self.beta * dX, axis=-1),
            "dg": dg,
            "dbeta": np.sum(dX * R, axis=-1) + np.sum(dL * self.kk, axis=-1),
        }


@dataclass
class Sizes:
    """Sums of squares: o, final_state, dh0 over everything, `per_token` [T, HV] each."""

    o: float
    final_state: float
    dh0: float
    per_token: dict[str, np.ndarray]


def sizes(chunks: list[Chunk], states: list[np.ndarray], adjoints: list[np.ndarray], do: np.ndarray, left_out: float) -> Sizes:
    """Sizes of a sequence's sums.

    What a chunk loses is handed on by its exact transition: what the exact state forgets, its error forgets too.

    Args:
        states: exact, in front of each chunk and behind the last [HV, K, V].
        adjoints: exact, behind each chunk and, first, in front of the first.
        do: [T, HV, V].
        left_out: what segments may leave out of a state, as a share of earlier states (the tolerance of the call; 0: nothing).
    """
    width = states[0].shape[-1]
    share = (left_out / ROUNDING) ** 2
    lost, before = [np.zeros_like(_norms(states[0]))], []
    o, largest = 0.0, np.zeros_like(lost[0])
    for chunk, state in zip(chunks, states, strict=False):
        spread = np.broadcast_to(lost[-1] / width, state.shape)
        before.append(state**2 + spread)
        o += float(np.sum(chunk.output(before[-1], chunk.updates(before[-1])[1])))
        passed = chunk.passed_on(lost[-1], chunk.state(spread, chunk.updates(spread, values=False)[1]))
        largest = np.maximum(largest, _norms(state**2))
        lost.append(_norms(chunk.state(state**2, chunk.updates(state**2)[1])) + passed + share * largest)
    behind, largest = np.zeros_like(lost[0]), np.zeros_like(lost[0])
    tokens: list[dict[str, np.ndarray]] = []
    for i in reversed(range(len(chunks))):
        chunk, D = chunks[i], adjoints[i + 1] ** 2
        spread = np.broadcast_to(behind / width, D.shape)
        d = do[i * CHUNK : (i + 1) * CHUNK].swapaxes(0, 1) ** 2
        tokens.append(chunk.gradients(before[i], D + spread, d))
        passed = chunk.passed_on(behind, chunk.adjoint_state(0 * d, spread, chunk.adjoint_updates(0 * d, spread)))
        largest = np.maximum(largest, _norms(D))
        behind = _norms(chunk.adjoint_state(d, D, chunk.adjoint_updates(d, D))) + passed + share * largest
    names = ("dq", "dk", "dv", "dg", "dbeta")
    per_token = {name: np.concatenate([x[name] for x in reversed(tokens)], axis=1).T for name in names} if tokens else {}
    return Sizes(o, float(np.sum(lost[-1])), float(np.sum(behind)), per_token)
