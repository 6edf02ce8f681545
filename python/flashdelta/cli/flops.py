"""Floating-point operations of the chunked algebra and of the token recurrence, per value head (docs/numerics.md has the products).

A multiply-add is two. Products of the 64 x 64 triangular matrices count their lower half only, because the kernels skip the zero blocks;
k k^T and q k^T are counted per value head, though value heads of one key head share them.
"""

from __future__ import annotations

CHUNK = 64


def _triangular(width: int, chunk: int = CHUNK) -> float:
    return chunk * (chunk + 1) * width


def forward_per_token(key_width: int, value_width: int, chunk: int = CHUNK) -> float:
    """k S, q S and Kh^T U in full; T X, P U, q k^T and k k^T by halves."""
    full = 2.0 * chunk * key_width * value_width
    return (3 * full + 2 * _triangular(value_width, chunk) + 2 * _triangular(key_width, chunk)) / chunk


def cpu_forward_per_token(key_width: int, value_width: int) -> float:
    """The CPU's forward takes half a chunk at a time, which leaves half of the triangular products."""
    return forward_per_token(key_width, value_width, CHUNK // 2)


def backward_per_token(key_width: int, value_width: int) -> float:
    """The adjoint's products, and the forward's that it makes again (k S, T X, q k^T, k k^T); every chunk's state is saved.

    Six in full: Kh dS', q^T do, k^T dX, do S^T, dX S^T, U dS'^T. By halves: P^T do, T^T dU, dX U^T, do U^T, and E k, N k, E^T q, N^T k.
    """
    full = 2.0 * CHUNK * key_width * value_width
    return (7 * full + 5 * _triangular(value_width) + 6 * _triangular(key_width)) / CHUNK


def recurrent_per_token(key_width: int, value_width: int) -> float:
    """Decay, k S, the outer product added, q S."""
    return 7.0 * key_width * value_width


PER_TOKEN = {"forward": forward_per_token, "backward": backward_per_token, "recurrent": recurrent_per_token}
CPU_PER_TOKEN = {**PER_TOKEN, "forward": cpu_forward_per_token}


# One H200: dense bf16 products as large matrices reach them, and bytes of a copy, both measured.
H200_FLOPS = 790e12
H200_BYTES = 4.26e12
# A chunk of one value head at width 128: k S, q S, Kh^T U (2.1 MFLOP each), T X, P U, q k^T, k k^T (1.05 each). Unlike the counts above
# it takes the 64 x 64 products in full, because tensor cores compute whole tiles.
_CHUNK_FLOPS = 10.5e6


def cuda_floor(chunk_heads: int, moved_bytes: int) -> tuple[float, str]:
    """The least seconds of a forward pass on an H200 at width 128, and which of its two limits sets it: "tensor" or "bytes".

    Args:
        chunk_heads: chunks of 64 tokens, each sequence's last one rounded up, times value heads.
        moved_bytes: of inputs and outputs, each once.
    """
    return max((_CHUNK_FLOPS * chunk_heads / H200_FLOPS, "tensor"), (moved_bytes / H200_BYTES, "bytes"))
