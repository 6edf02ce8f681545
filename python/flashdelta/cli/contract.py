"""The numerics contract: how an error is measured, and the bound it is held to (docs/numerics.md)."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from flashdelta.cli.chunk_terms import ROUNDING
from flashdelta.cli.dtypes import NAMES

# Relative error allowed per output, by dtype.
BOUNDS: dict[str, dict[str, float]] = {
    "bf16": {"o": 5e-3, "final_state": 4e-3, "dq": 8e-3, "dk": 8e-3, "dv": 8e-3, "dh0": 8e-3, "dbeta": 1.5e-2, "dg": 1.5e-2},
    "fp16": {"o": 1e-3, "final_state": 1e-3, "dq": 3e-3, "dk": 3e-3, "dv": 3e-3, "dh0": 3e-3, "dbeta": 6e-3, "dg": 6e-3},
    "fp32": {"o": 1e-5, "final_state": 1e-5, "dq": 5e-5, "dk": 5e-5, "dv": 5e-5, "dh0": 5e-5, "dbeta": 1e-4, "dg": 1e-4},
}
for _row in BOUNDS.values():
    _row["dA_log"] = _row["ddt_bias"] = _row["dg"]  # they are sums of dg

# What an element of an output cannot resolve whatever the arithmetic: half the distance of neighbours at zero (fp16), or magnitudes
# that leave the range of the float32 the kernels compute in. Both are absolute, per element.
_ABSOLUTE = {"fp16": 2.0**-25, "bf16": 1e-30, "fp32": 1e-30}


@dataclass(frozen=True)
class Error:
    """One output's error beside its bound; `ok` is False for NaN and Inf as well."""

    name: str
    value: float
    bound: float

    @property
    def ok(self) -> bool:
        return bool(self.value <= self.bound)

    @property
    def used(self) -> float:
        """Share of the bound that the error takes; infinite where it is no number."""
        return self.value / self.bound if np.isfinite(self.value) else float("inf")


def bound(name: str, input_dtype: np.dtype, output_dtype: np.dtype) -> float:
    """The bound of output `name`: by q's dtype, or by the output's own where rounding to that costs more."""
    return max(BOUNDS[NAMES[np.dtype(d)]][name] for d in (input_dtype, output_dtype))


def _within_range(values: np.ndarray, exact: np.ndarray, dtype: np.dtype, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Both as `dtype` can tell them apart: what it cannot hold is its largest number, and so is the infinity that stands for it."""
    largest = float(ml_dtypes.finfo(dtype).max)
    overflown = np.isinf(values) & np.isfinite(exact) & (np.sign(values) == np.sign(exact)) & (np.abs(exact) >= (1.0 - limit) * largest)
    return np.where(overflown, np.sign(exact) * largest, values), np.clip(exact, -largest, largest)


def error(name: str, got: np.ndarray, exact: np.ndarray, input_dtype: np.dtype, terms: float = 0.0, chunk_terms: float = 0.0) -> Error:
    """Relative error of one output over the whole tensor.

    ||got - exact|| / max(||exact||, terms, ROUNDING / bound * chunk_terms): the latter two, the 2-norms of what the output sums token by
    token and by chunks, take over only where it cancels, so that an exact result of (nearly) zero does not ask for infinite precision.
    What the output's dtype cannot resolve near zero is taken off the difference first.

    Args:
        got: what the library gave, in its own dtype.
        exact: float64, the oracle's.
        input_dtype: q's dtype.
    """
    limit = bound(name, input_dtype, got.dtype)
    if got.shape != exact.shape:
        return Error(name, float("inf"), limit)
    values, exact = _within_range(np.asarray(got, np.float64), exact, got.dtype, limit)
    if not np.all(np.isfinite(values)):
        return Error(name, float("nan"), limit)
    difference = float(np.linalg.norm(np.ravel(values - exact)))
    difference -= _ABSOLUTE[NAMES[got.dtype]] * np.sqrt(exact.size)
    if difference <= 0.0:
        return Error(name, 0.0, limit)
    size = max(float(np.linalg.norm(np.ravel(exact))), terms, ROUNDING / limit * chunk_terms)
    return Error(name, difference / size if size > 0.0 else float("inf"), limit)
