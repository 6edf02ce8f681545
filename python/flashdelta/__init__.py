"""flashdelta: the gated delta rule (Gated DeltaNet), chunked forward and backward and token-by-token decode.

Takes NumPy arrays and torch tensors; neither torch nor a GPU is needed. See ``help(flashdelta.chunk_gated_delta_rule)``.
"""

import contextlib as _contextlib
import sys as _sys

from flashdelta._lib import info
from flashdelta._ops import (
    ChunkBackward,
    ChunkForward,
    chunk_gated_delta_rule,
    chunk_gated_delta_rule_bwd,
    chunk_gated_delta_rule_fwd,
    fused_recurrent_gated_delta_rule,
)

# Where torch is loaded already, its operators are registered now, so that the first call does not wait for that. What they may be missing
# is told by the first call that needs them.
if _sys.modules.get("torch") is not None:
    with _contextlib.suppress(ImportError, OSError):
        from flashdelta import _torch as _torch

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
