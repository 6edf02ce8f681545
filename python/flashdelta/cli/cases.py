"""Random calls for `flashdelta verify`, biased towards edges. A case is its seed: the same seed gives the same call everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashdelta.cli.dtypes import DTYPES, NAMES

EDGE_LENGTHS = (0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129)
EDGE_WIDTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 96, 128, 129, 255, 256)


@dataclass
class Case:
    """One call: arrays and flags as chunk_gated_delta_rule takes them, and what happens to them.

    `do` and `dht` are the outputs' gradients for a chunked case with `backward`, None for others. `covered` marks the tokens [T]
    that belong to a sequence; the others hold NaN in every input.
    """

    seed: int
    operation: str  # "chunk" or "recurrent"
    tensors: dict[str, np.ndarray | None]
    flags: dict[str, Any]  # what the operation computes
    execution: dict[str, Any]  # how it is computed: neither changes the exact result
    do: np.ndarray | None
    dht: np.ndarray | None
    covered: np.ndarray
    checkpoint_chunks: int = 1
    backward: bool = True  # of a chunked case: whether gradients are part of it
    notes: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """Everything that tells this case from another, in one line."""
        shapes = {name: f"{NAMES.get(x.dtype, x.dtype.name)}{list(x.shape)}" for name, x in self.tensors.items() if x is not None}
        flags = {name: value for name, value in {**self.flags, **self.execution}.items() if value not in (None, False)}
        parts = {**shapes, **flags, **self.notes}
        if self.tensors["cu_seqlens"] is not None:
            parts["cu_seqlens"] = self.tensors["cu_seqlens"].tolist()
        if self.operation == "chunk":
            parts.update(checkpoint_chunks=self.checkpoint_chunks)
        if self.operation == "chunk" and self.backward:
            parts.update(do=self.do is not None, dht=self.dht is not None)
        return f"{self.operation}: " + ", ".join(f"{name}={value}" for name, value in parts.items())


class _Maker:
    """Draws one case. Each method draws one aspect; the order of draws is fixed by `make`."""

    # Work of one case in tokens * value heads * K * V: a few ten milliseconds of the oracle, so that a minute sees many cases.
    budget = 3 << 20
    most_tokens = 400
    dtypes = ("bf16", "bf16", "fp16", "fp32")
    padding = 3  # elements between the rows of padded q, k, v
    backward = True

    def __init__(self, seed: int):
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.notes: dict[str, Any] = {}

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def width(self) -> int:
        return int(self.pick(EDGE_WIDTHS)) if self.chance(0.7) else int(self.rng.integers(1, 257))

    def length(self, longest: int) -> int:
        edges = [n for n in EDGE_LENGTHS if n <= longest]
        return int(self.pick(edges)) if self.chance(0.7) else int(self.rng.integers(0, longest + 1))

    def array(self, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
        return (scale * self.rng.standard_normal(shape)).astype(DTYPES[dtype])

    # Shapes -------------------------------------------------------------------------------------------------------------------------

    def shapes(self, operation: str) -> None:
        self.H = int(self.rng.integers(1, 4))
        self.HV = self.H * int(self.pick((1, 1, 2, 3, 4)))
        self.K = self.width()
        self.V = self.K if self.chance(0.4) else self.width()
        most = max(1, min(self.most_tokens, self.budget // (self.HV * self.K * self.V)))
        self.offsets: np.ndarray | None = None
        if self.chance(0.5):
            self.pack(most, operation)
        else:
            self.B = int(self.pick((1, 1, 2, 3)))
            longest = 16 if operation == "recurrent" and self.chance(0.8) else most
            self.T = self.length(max(1, min(longest, most) // self.B))
            self.N = self.B
            self.covered = np.ones(self.T, bool)

    def pack(self, most: int, operation: str) -> None:
        """Sequences one after another, with tokens of no sequence in front of them and behind them."""
        self.B, self.N = 1, int(self.rng.integers(0, 7))
        longest = 16 if operation == "recurrent" and self.chance(0.8) else most
        lengths = [self.length(longest) for _ in range(self.N)]
        while sum(lengths) > most:
            lengths[int(np.argmax(lengths))] //= 2
        before = int(self.pick((0, 0, 1, 63, 64)))
        after = int(self.pick((0, 0, 1, 65)))
        dtype = np.int64 if self.chance(0.5) else np.int32
        self.offsets = (before + np.concatenate([[0], np.cumsum(lengths)])).astype(dtype)
        end = int(self.offsets[-1])
        self.T = end + after
        self.covered = np.zeros(self.T, bool)
        self.covered[before:end] = True

    # Tensors ------------------------------------------------------------------------------------------------------------------------

    def keys(self, normalised_in_kernel: bool) -> np.ndarray:
        k = self.rng.standard_normal((self.B, self.T, self.H, self.K))
        kind = self.pick(("random", "random", "similar", "repeated", "some zero", "all zero"))
        if kind in ("similar", "repeated"):
            spread = 0.3 if kind == "similar" else 0.0
            k = self.rng.standard_normal((self.B, 1, self.H, self.K)) + spread * k
        if kind == "some zero" and self.T:
            k[:, self.rng.random(self.T) < 0.3] = 0.0
        if kind == "all zero":
            k[...] = 0.0
        if not normalised_in_kernel:  # |k| <= 1, or beta up to 2 would let the state grow without bound
            k /= np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), 1e-9)
            k *= 0.999  # rounding to bf16 must not lift |k| above 1
        self.notes["keys"] = kind
        return k

    def log_gate(self) -> np.ndarray:
        g = -np.exp(self.rng.normal(-3.0, 2.0, (self.B, self.T, self.HV)))
        kind = self.pick(("random", "random", "zero", "-inf", "mixed", "heads differ"))
        if kind == "zero":
            g[...] = 0.0
        if kind == "-inf":
            g[...] = -np.inf
        if kind == "mixed":
            chosen = self.rng.random(g.shape)
            g[chosen < 0.3] = 0.0
            g[chosen > 0.85] = -1000.0
            g[chosen > 0.95] = -np.inf
        if kind == "heads differ":
            g[..., 0] = 0.0
            g[..., -1] = -np.inf if self.HV > 1 else 0.0
        self.notes["gates"] = kind
        return g

    def raw_gate(self) -> np.ndarray:
        g = self.rng.normal(-2.0, 2.0, (self.B, self.T, self.HV))
        kind = self.pick(("random", "random", "extreme"))
        if kind == "extreme":
            chosen = self.rng.random(g.shape)
            g[chosen < 0.2] = -1000.0  # no decay
            g[chosen > 0.8] = 1000.0  # forgets everything
        self.notes["raw gates"] = kind
        return g

    def betas(self, logits: bool) -> np.ndarray:
        shape = (self.B, self.T, self.HV)
        edges = (-1000.0, 0.0, 1000.0) if logits else (0.0, 1.0, 2.0)
        kind = self.pick(("random", "random", "edges", "constant"))
        beta = self.rng.normal(0.0, 2.0, shape) if logits else self.rng.random(shape)
        if kind == "edges":
            beta = self.rng.choice(edges, shape)
        if kind == "constant":
            beta = np.full(shape, self.pick(edges))
        self.notes["betas"] = kind
        return beta

    def laid_out(self, x: np.ndarray, channels_last: bool) -> np.ndarray:
        """The same values with other strides."""
        kind = self.pick(("contiguous", "heads first", "padded", "tokens apart"))
        if kind == "heads first":
            return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
        if kind == "padded":
            wide = np.zeros((*x.shape[:-1], x.shape[-1] + self.padding), x.dtype)
            wide[..., : x.shape[-1]] = x
            return wide[..., : x.shape[-1]]
        if kind == "tokens apart":
            apart = np.zeros((x.shape[0], 2 * x.shape[1], *x.shape[2:]), x.dtype)
            apart[:, ::2] = x
            return apart[:, ::2]
        return x if channels_last else np.asfortranarray(x)

    def projection(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v as slices of one packed projection, or each with strides of its own."""
        if self.chance(0.4) and v.dtype == q.dtype:
            self.notes["layout"] = "packed"
            widths = (self.H * self.K, self.H * self.K, self.HV * self.V)
            packed = np.concatenate([x.reshape(self.B, self.T, width) for x, width in zip((q, k, v), widths, strict=True)], axis=-1)
            parts = np.split(packed, np.cumsum(widths[:2]), axis=-1)
            return tuple(part.reshape(x.shape) for part, x in zip(parts, (q, k, v), strict=True))
        self.notes["layout"] = "own strides"
        return tuple(self.laid_out(x, channels_last=True) for x in (q, k, v))

    # The call -----------------------------------------------------------------------------------------------------------------------

    def make(self) -> Case:
        operation = self.pick(("chunk", "chunk", "chunk", "recurrent"))
        self.shapes(operation)
        dtype = self.pick(self.dtypes)
        scalar = lambda: self.pick(("fp32", "fp32", dtype))  # noqa: E731
        l2norm, gate, sigmoid = self.chance(0.5), self.chance(0.4), self.chance(0.4)
        flags = {
            "scale": self.pick((None, None, 0.0, 1.0, 0.3)),
            "use_qk_l2norm_in_kernel": l2norm,
            "use_gate_in_kernel": gate,
            "use_beta_sigmoid_in_kernel": sigmoid,
            "allow_neg_eigval": sigmoid and self.chance(0.5),
            "state_v_first": self.chance(0.3),
        }
        v_dtype = self.pick(("bf16", "fp16")) if operation == "recurrent" and dtype == "fp32" and self.chance(0.3) else dtype
        size = 3.0 if l2norm else 1.0
        q = self.array((self.B, self.T, self.H, self.K), dtype, size if l2norm else self.K**-0.5)
        k = (size * self.keys(l2norm)).astype(DTYPES[dtype])
        v = self.array((self.B, self.T, self.HV, self.V), v_dtype)
        tensors: dict[str, np.ndarray | None] = dict.fromkeys(("g", "beta", "initial_state", "A_log", "dt_bias"))
        tensors["cu_seqlens"] = self.offsets
        if gate:
            tensors["g"] = self.raw_gate().astype(DTYPES[scalar()])
            tensors["A_log"] = np.log(self.rng.uniform(1.0, 16.0, self.HV)).astype(DTYPES[self.pick(("fp32", "bf16"))])
            if self.chance(0.7):
                tensors["dt_bias"] = self.array((self.HV,), self.pick(("fp32", "bf16")))
        elif self.chance(0.85):
            tensors["g"] = self.log_gate().astype(DTYPES[scalar()])
        if sigmoid or self.chance(0.85):
            tensors["beta"] = self.betas(sigmoid).astype(DTYPES[scalar()])
        state_shape = (self.N, self.HV, self.V, self.K) if flags["state_v_first"] else (self.N, self.HV, self.K, self.V)
        if self.chance(0.6):
            tensors["initial_state"] = self.array(state_shape, self.pick(("fp32", "fp32", "bf16", "fp16")))
        self.poison(q, k, v, tensors["g"], tensors["beta"])
        tensors["q"], tensors["k"], tensors["v"] = self.projection(q, k, v)
        for name in ("g", "beta"):
            if tensors[name] is not None:
                tensors[name] = self.laid_out(tensors[name], channels_last=False)
        do, dht, checkpoint_chunks = None, None, 1
        if operation == "chunk" and self.backward:
            do = self.array((self.B, self.T, self.HV, self.V), dtype) if self.chance(0.85) else None
            dht = self.array(state_shape, "fp32") if do is None or self.chance(0.5) else None
            if do is not None:
                self.poison(do)
                do = self.laid_out(do, channels_last=True)
        if operation == "chunk":
            checkpoint_chunks = int(self.pick((1, 1, 2, 3, 8)))
            self.notes["saved"] = self.chance(0.5)  # whether backward gets g_cumsum and A, or makes them again
        order = ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens", "A_log", "dt_bias")
        tensors = {name: tensors[name] for name in order}
        execution = self.execution()
        return Case(self.seed, operation, tensors, flags, execution, do, dht, self.covered, checkpoint_chunks, self.backward, self.notes)

    def poison(self, *arrays: np.ndarray | None) -> None:
        """Tokens of no sequence hold NaN: a backend that reads one shows it."""
        for x in arrays:
            if x is not None:
                x[:, ~self.covered] = np.nan

    def execution(self) -> dict[str, Any]:
        context_parallel = self.pick(("auto", "auto", "exact", "off"))
        segments = 0 if context_parallel == "off" or self.chance(0.6) else int(self.rng.integers(1, 9))
        return {
            "context_parallel": context_parallel,
            "num_segments": segments,
            "batch_invariant": self.chance(0.2),
            "num_threads": int(self.pick((0, 0, 1, 2, 3))),
        }


class _CudaMaker(_Maker):
    """Calls that the cuda backend takes: its widths and dtypes, strides of whole 16 bytes, no backward."""

    budget = 24 << 20  # forward alone, and long enough for several chunks at width 128
    most_tokens = 1500
    dtypes = ("bf16", "bf16", "fp16")
    padding = 8
    backward = False

    def width(self) -> int:
        return 128


def make(seed: int, backend: str = "cpu") -> Case:
    """The case of `seed` for a backend: "cpu" or "cuda"."""
    return (_CudaMaker if backend == "cuda" else _Maker)(seed).make()
