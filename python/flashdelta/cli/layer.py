"""One Gated DeltaNet layer of a Qwen3.5-class model with fixed random weights: from bytes of text to the inputs of the delta rule.

Bytes -> embedding -> RMS norm -> q, k, v, a, b projections -> causal depthwise convolution of width 4 with SiLU on q, k, v. What follows
(l2-norm of q and k, gate from a, A_log and dt_bias, beta from b) is left to the operation, which does it in its kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashdelta.cli.dtypes import DTYPES
from flashdelta.cli.models import MODELS, HeadLayout

HIDDEN = 1024  # width of the 0.8B model's residual stream
CONV_WIDTH = 4
INIT_STD = 0.02  # the family's initialiser for every linear map
RMS_EPS = 1e-6
# Tokens that one pass of the convolution takes: 2048 x 6144 channels in fp32 is 48 MiB, whatever the text's length.
CONV_BLOCK = 2048

# What the layer hands over to the kernels, in the words of chunk_gated_delta_rule.
FLAGS = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


@dataclass
class LayerInputs:
    """Inputs of the delta rule for T tokens: q, k [1, T, H, K], v [1, T, HV, V], raw gate g and beta logit [1, T, HV]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    beta: np.ndarray

    def __getitem__(self, tokens: slice) -> LayerInputs:
        return LayerInputs(*(x[:, tokens] for x in (self.q, self.k, self.v, self.g, self.beta)))

    def as_kwargs(self) -> dict[str, np.ndarray]:
        return {"q": self.q, "k": self.k, "v": self.v, "g": self.g, "beta": self.beta}


def concatenate(parts: list[LayerInputs]) -> LayerInputs:
    """The tokens of all parts, in order."""
    names = ("q", "k", "v", "g", "beta")
    return LayerInputs(*(np.concatenate([getattr(part, name) for part in parts], axis=1) for name in names))


class Layer:
    """The layer's weights. The same seed gives the same weights everywhere.

    Args:
        heads: head layout; the 0.8B model's by default.
        dtype: "bf16", "fp16" or "fp32": dtype of all five inputs. A_log and dt_bias stay fp32, as in training.
        seed: of all weights.
    """

    def __init__(self, heads: HeadLayout = MODELS["qwen3.5-0.8b"], dtype: str = "bf16", seed: int = 0):
        self.heads = heads
        self.dtype = DTYPES[dtype]
        self.seed = seed
        rng = np.random.default_rng(seed)
        key_channels = heads.key_heads * heads.key_width
        value_channels = heads.value_heads * heads.value_width
        self._splits = np.cumsum([key_channels, key_channels, value_channels, heads.value_heads])
        self._conv_channels = 2 * key_channels + value_channels

        embedding = rng.standard_normal((256, HIDDEN), dtype=np.float32)
        embedding /= np.sqrt(np.mean(embedding**2, axis=1, keepdims=True) + RMS_EPS)
        projection = rng.standard_normal((HIDDEN, self._conv_channels + 2 * heads.value_heads), dtype=np.float32) * INIT_STD
        # A linear map of an embedding has one value per byte: computed once per byte, looked up per token.
        self._projected = (embedding @ projection).astype(self.dtype)
        bound = CONV_WIDTH**-0.5
        self._conv = rng.uniform(-bound, bound, (CONV_WIDTH, self._conv_channels)).astype(np.float32)

        self.A_log = np.log(rng.uniform(1.0, 16.0, heads.value_heads)).astype(np.float32)
        dt = np.exp(rng.uniform(np.log(0.001), np.log(0.1), heads.value_heads))
        self.dt_bias = (dt + np.log(-np.expm1(-dt))).astype(np.float32)  # softplus of it is dt

    def kwargs(self) -> dict:
        """Arguments of the delta rule that belong to the layer, not to the tokens."""
        return {"A_log": self.A_log, "dt_bias": self.dt_bias, **FLAGS}

    def inputs(self, tokens: np.ndarray, before: np.ndarray | None = None) -> LayerInputs:
        """The delta rule's inputs for `tokens` (bytes, uint8 [T]).

        Args:
            before: the bytes in front of them; the convolution looks at the last three. None: a text's start.
        """
        reach = CONV_WIDTH - 1
        history = self._projected[(tokens[:0] if before is None else before)[-reach:], : self._conv_channels]
        missing = np.zeros((reach - len(history), self._conv_channels), self.dtype)
        mixed = np.concatenate([missing, history, self._projected[tokens, : self._conv_channels]])
        out = np.empty((len(tokens), self._conv_channels), self.dtype)
        for begin in range(0, len(tokens), CONV_BLOCK):
            block = mixed[begin : begin + CONV_BLOCK + reach].astype(np.float32)
            rows = len(block) - reach
            x = sum(block[i : i + rows] * self._conv[i] for i in range(CONV_WIDTH))
            out[begin : begin + rows] = x / (1.0 + np.exp(-x))
        return self._split(out, self._projected[tokens, self._conv_channels :])

    def _split(self, qkv: np.ndarray, ab: np.ndarray) -> LayerInputs:
        heads, length = self.heads, len(qkv)
        q, k, v = np.split(qkv, self._splits[:2], axis=1)
        # Views of the one projection, as an engine would pass them.
        return LayerInputs(
            q.reshape(1, length, heads.key_heads, heads.key_width),
            k.reshape(1, length, heads.key_heads, heads.key_width),
            v.reshape(1, length, heads.value_heads, heads.value_width),
            ab[None, :, : heads.value_heads],
            ab[None, :, heads.value_heads :],
        )
