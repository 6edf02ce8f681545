"""The dtypes that the program names on its command line."""

from __future__ import annotations

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}
NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
