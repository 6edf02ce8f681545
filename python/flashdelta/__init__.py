"""flashdelta: the gated delta rule (Gated DeltaNet), chunked forward and backward and token-by-token decode.

Takes NumPy arrays and torch tensors; neither torch nor a GPU is needed. See ``help(flashdelta.chunk_gated_delta_rule)``.
"""

from flashdelta._lib import info
from flashdelta._ops import (
    ChunkBackward,
    ChunkForward,
    chunk_gated_delta_rule,
    chunk_gated_delta_rule_bwd,
    chunk_gated_delta_rule_fwd,
    fused_recurrent_gated_delta_rule,
)

__version__ = "0.1.0"

__all__ = [
    "ChunkBackward",
    "ChunkForward",
    "__version__",
    "chunk_gated_delta_rule",
    "chunk_gated_delta_rule_bwd",
    "chunk_gated_delta_rule_fwd",
    "fused_recurrent_gated_delta_rule",
    "info",
]
