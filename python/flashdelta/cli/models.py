"""Head layouts of the published Gated DeltaNet models, all with K = V = 128."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadLayout:
    """Key heads, value heads and widths of one GDN layer (of one rank, where a model is spread over several GPUs)."""

    key_heads: int
    value_heads: int
    key_width: int = 128
    value_width: int = 128

    def __str__(self) -> str:
        return f"{self.key_heads}/{self.value_heads}"


# Tensor-parallel ranks take their share of both kinds of heads; the layouts that only arise so are named after the model and the ranks.
MODELS: dict[str, HeadLayout] = {
    "qwen3.5-0.8b": HeadLayout(16, 16),
    "qwen3.5-2b": HeadLayout(16, 16),
    "qwen3.5-4b": HeadLayout(16, 32),
    "qwen3.5-9b": HeadLayout(16, 32),
    "qwen3.5-27b": HeadLayout(16, 48),
    "qwen3.5-35b-a3b": HeadLayout(16, 32),
    "qwen3.5-122b-a10b": HeadLayout(16, 64),
    "qwen3.5-397b-a17b": HeadLayout(16, 64),
    "qwen3-next-80b-a3b": HeadLayout(16, 32),
    "qwen3.5-397b-a17b-tp2": HeadLayout(8, 32),
    "qwen3.5-397b-a17b-tp8": HeadLayout(2, 8),
}
