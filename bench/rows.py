"""What the side-by-side benchmark measures: its rows, their inputs, the exact result, and the floor under their time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F

WIDTH = 128  # K = V of every model that uses the operation
CHUNK = 64  # tokens; what a chunk-head counts, whatever a library's own chunk is
_MAX_SETS = 24

HEADS = ("2/8", "8/32", "16/64", "16/48", "16/16")
LENGTHS = ("1x2048", "1x8192", "4096+4096", "8x1024", "1x32768", "24576+8192", "4x8192")
# Enough (sequence, head) pairs that one thread block for each fills the machine.
QUICK = (
    ("16/64", "4x8192"),
    ("8/32", "4x8192"),
    ("16/64", "8x1024"),
    ("16/48", "8x1024"),
    ("8/32", "8x1024"),
    ("16/16", "8x1024"),
)

# docs/numerics.md: S K^T, Q S, Kh^T U at 2.1 each, T X, P U, QK^T, KK^T at 1.05 each.
MFLOP_PER_CHUNK_HEAD = 10.5
# Measured: dense bf16 products in TFLOP/s, copies in TB/s.
ROOFS = {"H200": (790.0, 4.26), "H100": (781.0, 3.03)}


class Roof(NamedTuple):
    """What the device reaches: TFLOP/s of dense bf16 products and TB/s of copies."""

    tflops: float
    terabytes: float


class Floor(NamedTuple):
    """The least time of a row in microseconds: of its products, of its bytes, and the larger of the two."""

    tensor_us: float
    bytes_us: float

    @property
    def us(self) -> float:
        return max(self)


@dataclass(frozen=True)
class Row:
    """One head layout and one pack of sequences."""

    key_heads: int
    value_heads: int
    sequences: tuple[int, ...]
    lengths: str

    @property
    def heads(self) -> str:
        return f"{self.key_heads}/{self.value_heads}"

    @property
    def label(self) -> str:
        return f"{self.heads}, {self.lengths}"

    @property
    def tokens(self) -> int:
        return sum(self.sequences)

    @property
    def chunk_heads(self) -> int:
        return self.value_heads * sum(-(-length // CHUNK) for length in self.sequences)

    @property
    def input_bytes(self) -> int:
        """q, k, v in two bytes; g, beta and the initial state in four."""
        per_token = 2 * WIDTH * (2 * self.key_heads + self.value_heads) + 8 * self.value_heads
        return self.tokens * per_token + self.state_bytes

    @property
    def state_bytes(self) -> int:
        return 4 * len(self.sequences) * self.value_heads * WIDTH * WIDTH

    def floor(self, roof: Roof | None) -> Floor | None:
        """The larger of the time of the products and the time of reading the inputs and writing o and the final state once."""
        if roof is None:
            return None
        moved = self.input_bytes + 2 * WIDTH * self.value_heads * self.tokens + self.state_bytes
        return Floor(self.chunk_heads * MFLOP_PER_CHUNK_HEAD / roof.tflops, moved / roof.terabytes / 1e6)


def parse_heads(text: str) -> tuple[int, int]:
    """Key and value heads of a layout: (16, 64) of "16/64".

    Raises:
        ValueError: the text is not KEY/VALUE with VALUE a multiple of KEY.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    key, value = (int(x) for x in match.groups()) if match else (0, 0)
    if not key or not value or value % key:
        raise ValueError(f"heads: is {text!r}; it must be KEY/VALUE, like 16/64, with VALUE a multiple of KEY")
    return key, value


def parse_lengths(text: str) -> tuple[int, ...]:
    """Lengths of the sequences of a pack: "8x1024" is eight of 1024 tokens, "4096+4096" two; both may be mixed.

    Raises:
        ValueError: the text is neither.
    """
    sequences: list[int] = []
    for part in text.split("+"):
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)", part)
        if not match or not int(match[2]):
            raise ValueError(f"lengths: is {text!r}; it must be like 1x8192, 8x1024 or 24576+8192")
        sequences += [int(match[2])] * int(match[1] or 1)
    if not sequences:
        raise ValueError(f"lengths: is {text!r}; it has no sequence")
    return tuple(sequences)


def row(heads: str, lengths: str) -> Row:
    """The row of a head layout like "16/64" and a pack like "8x1024"."""
    return Row(*parse_heads(heads), parse_lengths(lengths), lengths)


def roof_of(device: str) -> Roof | None:
    """The measured roof of a device by its name, None where there is none."""
    return next((Roof(*values) for name, values in ROOFS.items() if name in device), None)


@dataclass(frozen=True)
class Offsets:
    """cu_seqlens of a row, made once: two of the libraries keep tables by the identity of the tensor that they are given."""

    int32: torch.Tensor
    int64: torch.Tensor
    host: torch.Tensor  # int64 on the CPU

    @staticmethod
    def of(row: Row, device: str) -> Offsets:
        host = F.pad(torch.tensor(row.sequences, dtype=torch.int64).cumsum(0), (1, 0))
        return Offsets(host.to(device, torch.int32), host.to(device), host)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call: q, k [1, T, H, 128] and v [1, T, HV, 128] bf16; g, beta [1, T, HV] and the state [N, HV, K, V] fp32."""

    row: Row
    offsets: Offsets
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    initial_state: torch.Tensor

    @cached_property
    def alpha(self) -> torch.Tensor:
        """exp(g): the gate as one of the libraries wants it."""
        return self.g.exp()

    @cached_property
    def initial_state_v_first(self) -> torch.Tensor:
        return self.initial_state.transpose(-1, -2).contiguous()


def make_inputs(row: Row, offsets: Offsets, seed: int, device: str) -> Inputs:
    """Random inputs as in the benchmark that FlashQLA publishes.

    bf16 q, k, v of which q and k have norm 1, g = logsigmoid(normal) / 16 but 0 for every fourth value head, beta a sigmoid, and a
    state to start from.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    tokens, states = row.tokens, (len(row.sequences), row.value_heads, WIDTH, WIDTH)
    q, k = (F.normalize(normal(1, tokens, row.key_heads, WIDTH), dim=-1).bfloat16() for _ in range(2))
    v = normal(1, tokens, row.value_heads, WIDTH).bfloat16()
    g = F.logsigmoid(normal(1, tokens, row.value_heads)) / 16
    g[..., ::4] = 0
    beta = normal(1, tokens, row.value_heads).sigmoid()
    return Inputs(row, offsets, q, k, v, g, beta, normal(*states))


def input_sets(row: Row, device: str, cache_bytes: int) -> list[Inputs]:
    """Input sets of a row: at least two, at most 24, together three times what the cache holds, so that it knows none of them."""
    offsets = Offsets.of(row, device)
    count = min(max(-(-3 * cache_bytes // row.input_bytes), 2), _MAX_SETS)
    return [make_inputs(row, offsets, seed, device) for seed in range(count)]


def _groups(sequences: tuple[int, ...]) -> Iterator[tuple[int, list[int], list[int]]]:
    # Sequences of one length at a time: (length, their numbers, their first tokens).
    starts = [sum(sequences[:i]) for i in range(len(sequences))]
    for length in sorted(set(sequences)):
        members = [i for i, other in enumerate(sequences) if other == length]
        yield length, members, [starts[i] for i in members]


def exact(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(o [T, HV, V], final state [N, HV, K, V]) in float64, by the chunked formulas of docs/numerics.md.

    It shares no code with a library; `check_exact` compares it with the reference backend's recurrence.
    """
    row = inputs.row
    group, scale = row.value_heads // row.key_heads, WIDTH**-0.5
    o = torch.empty(row.tokens, row.value_heads, WIDTH, dtype=torch.float64, device=inputs.q.device)
    final = torch.empty_like(inputs.initial_state, dtype=torch.float64)
    for length, members, starts in _groups(row.sequences):
        first = torch.tensor(starts, device=o.device)[:, None]
        S = inputs.initial_state[members].double()
        for begin in range(0, length, CHUNK):
            at = first + torch.arange(begin, min(begin + CHUNK, length), device=o.device)
            q, k = (x[0, at].double().transpose(1, 2).repeat_interleave(group, 1) for x in (inputs.q, inputs.k))
            v = inputs.v[0, at].double().transpose(1, 2)
            b, c = inputs.beta[0, at].double().transpose(1, 2)[..., None], inputs.g[0, at].double().transpose(1, 2).cumsum(-1)
            gam, last = c.exp()[..., None], c[..., -1:]
            G = (c[..., :, None] - c[..., None, :]).tril().exp().tril()
            L = (b * (k @ k.mT) * G).tril(-1)
            U = torch.linalg.solve_triangular(L, b * (v - gam * (k @ S)), upper=False, unitriangular=True)
            o[at] = (scale * (gam * (q @ S) + ((q @ k.mT) * G) @ U)).transpose(1, 2)
            S = last.exp()[..., None] * S + ((last - c).exp()[..., None] * k).mT @ U
        final[members] = S
    return o, final


def relative_error(x: torch.Tensor, exact_x: torch.Tensor) -> float:
    """||x - exact|| / ||exact||, 2-norms over the whole tensor: the error of docs/numerics.md. Infinite where x has no number."""
    error = float((x.double() - exact_x).norm() / exact_x.norm())
    return error if math.isfinite(error) else math.inf


def check_exact(reference) -> float:
    """The larger error of `exact` against the recurrence token by token.

    Args:
        reference: flashdelta.chunk_gated_delta_rule, whose reference backend is that recurrence.
    """
    small = row("2/4", "130+64+7")
    offsets = Offsets.of(small, "cpu")
    inputs = make_inputs(small, offsets, 0, "cpu")
    double = (x.double() for x in (inputs.q, inputs.k, inputs.v))
    o, state = reference(
        *double,
        inputs.g,
        inputs.beta,
        initial_state=inputs.initial_state,
        output_final_state=True,
        cu_seqlens=offsets.int32,
        backend="reference",
    )
    exact_o, exact_state = exact(inputs)
    return max(relative_error(exact_o, o[0]), relative_error(exact_state, state))
