"""From Python's options to the numbers of flashdelta_options. Only Python types are converted here: the library checks the values."""

from __future__ import annotations

import numbers
import operator
from typing import Any, NamedTuple

CONTEXT_PARALLEL = {"auto": 0, "exact": 1, "off": 2}
BACKEND = {"auto": 0, "cpu": 1, "cuda": 2, "reference": 3}
INSTRUCTION_SET = {"best": 0, "baseline": 1, "avx2": 2, "avx512": 3}

CHUNK = 64  # tokens; FLASHDELTA_CHUNK
_INT32 = 2**31


class Options(NamedTuple):
    """``integers`` are in the order of ``_lib.INTEGER_OPTIONS``."""

    scale: float | None
    integers: tuple[int, ...]
    tolerance: float

    @property
    def state_v_first(self) -> bool:
        return self.integers[4] == 1

    @property
    def is_reference(self) -> bool:
        return self.integers[8] == BACKEND["reference"]

    @property
    def chunks_per_state(self) -> int:
        # At least 1 also for a value that the library is about to refuse: outputs are allocated before it sees them.
        return max(self.integers[11], 1)


def _kind(value: Any) -> str:
    return type(value).__name__


def _number(name: str, value: Any) -> float:
    if isinstance(value, (float, int, numbers.Real)):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name}: is an integer of {value.bit_length()} bits; it must fit a double") from None
    raise TypeError(f"{name}: is a {_kind(value)}; it must be a number or None")


def _integer(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: is a {_kind(value)}; it must be an integer") from None
    # Saturated: no option's range comes near, so the library refuses it by name.
    return max(-_INT32, min(number, _INT32 - 1))


def flag(name: str, value: Any) -> int:
    """True, False, 0, 1, NumPy's bool; None means False."""
    if value is True:
        return 1
    if value is False or value is None:
        return 0
    if isinstance(value, numbers.Integral):
        return _integer(name, value)
    if _kind(value) in ("bool", "bool_"):
        return int(value)
    raise TypeError(f"{name}: is a {_kind(value)}; it must be True or False")


def _choice(name: str, value: Any, choices: dict[str, int]) -> int:
    if not isinstance(value, str):
        raise TypeError(f"{name}: is a {_kind(value)}; it must be one of {', '.join(choices)}")
    if value not in choices:
        raise ValueError(f"{name}: is {value!r}; it must be one of {', '.join(choices)}")
    return choices[value]


def pack(
    *,
    scale: Any = None,
    use_qk_l2norm_in_kernel: Any = False,
    use_gate_in_kernel: Any = False,
    use_beta_sigmoid_in_kernel: Any = False,
    allow_neg_eigval: Any = False,
    state_v_first: Any = False,
    context_parallel: Any = "auto",
    context_parallel_tolerance: Any = None,
    num_segments: Any = 0,
    batch_invariant: Any = False,
    backend: Any = "auto",
    num_threads: Any = 0,
    instruction_set: Any = "best",
    checkpoint_chunks: Any = 0,
) -> Options:
    """Raises TypeError for a Python type that an option does not take, ValueError for an unknown choice, both naming the option."""
    return Options(
        None if scale is None else _number("scale", scale),
        (
            flag("use_qk_l2norm_in_kernel", use_qk_l2norm_in_kernel),
            flag("use_gate_in_kernel", use_gate_in_kernel),
            flag("use_beta_sigmoid_in_kernel", use_beta_sigmoid_in_kernel),
            flag("allow_neg_eigval", allow_neg_eigval),
            flag("state_v_first", state_v_first),
            _choice("context_parallel", context_parallel, CONTEXT_PARALLEL),
            _integer("num_segments", num_segments),
            flag("batch_invariant", batch_invariant),
            _choice("backend", backend, BACKEND),
            _integer("num_threads", num_threads),
            _choice("instruction_set", instruction_set, INSTRUCTION_SET),
            _integer("checkpoint_chunks", checkpoint_chunks),
        ),
        0.0 if context_parallel_tolerance is None else _number("context_parallel_tolerance", context_parallel_tolerance),
    )
