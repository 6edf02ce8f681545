"""The libraries of the side-by-side benchmark: how each is loaded and called, and where its results lie.

A library's class raises on construction where it cannot be imported. `bind` prepares everything that a caller would have prepared
(another layout, another dtype of the offsets, exp of the gate) and returns the bare call, so that only the library is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import ClassVar

import torch
from rows import WIDTH, Inputs

Result = tuple[torch.Tensor, torch.Tensor]
Call = Callable[[], Result]


class Library:
    """What all of them share.

    Attributes:
        label: how it is called in tables.
        distributions: Python distributions whose versions matter to its speed.
        compiles_to_disk: it compiles while it runs, one head layout after the other, and keeps the result on disk.
        state_v_first: its states are [N, HV, V, K].
    """

    name: ClassVar[str]
    label: ClassVar[str]
    distributions: ClassVar[tuple[str, ...]]
    compiles_to_disk: ClassVar[bool] = False
    state_v_first: ClassVar[bool] = False

    def bind(self, inputs: Inputs) -> Call:
        """A call without arguments that returns (o, final state) in the library's own shapes."""
        raise NotImplementedError

    def result(self, result: Result) -> Result:
        """Those as o [T, HV, V] and final state [N, HV, K, V]."""
        o, state = result
        return o.reshape(-1, *o.shape[-2:]), state.mT if self.state_v_first else state

    def versions(self) -> dict[str, str]:
        """Versions of its distributions, without those that are not installed as such."""
        found = {}
        for distribution in self.distributions:
            try:
                found[distribution] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
        return found


def _bound(function: Callable[..., Result], x: Inputs, **offsets: torch.Tensor | None) -> Call:
    # FLA's names, which the others have as well.
    return partial(function, x.q, x.k, x.v, x.g, x.beta, initial_state=x.initial_state, output_final_state=True, **offsets)


class Flashdelta(Library):
    """This library."""

    name, label, distributions = "flashdelta", "flashdelta", ("apache-tvm-ffi",)

    def __init__(self) -> None:
        import flashdelta

        flashdelta.info()  # loads the shared library
        self.module = flashdelta

    def versions(self) -> dict[str, str]:
        return {"flashdelta": self.module.__version__, **super().versions()}

    def bind(self, inputs: Inputs) -> Call:
        packed = len(inputs.row.sequences) > 1
        return _bound(self.module.chunk_gated_delta_rule, inputs, cu_seqlens=inputs.offsets.int32 if packed else None)


class Fla(Library):
    """flash-linear-attention's own kernels, in Triton."""

    name, label = "fla", "FLA"
    distributions = ("fla-core", "flash-linear-attention", "triton")
    compiles_to_disk = True

    def __init__(self) -> None:
        # With flash-qla installed it would hand the call on to that; the variable is read at every call.
        os.environ["FLA_FLASH_QLA"] = "0"
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        self.function = chunk_gated_delta_rule

    def bind(self, inputs: Inputs) -> Call:
        if len(inputs.row.sequences) == 1:
            return _bound(self.function, inputs, cu_seqlens=None, cu_seqlens_cpu=None)
        return _bound(self.function, inputs, cu_seqlens=inputs.offsets.int64, cu_seqlens_cpu=inputs.offsets.host)


class FlashQla(Library):
    """FlashQLA, in TileLang; it decides by itself whether to split sequences over the machine."""

    name, label = "flash_qla", "FlashQLA"
    distributions = ("flash-qla", "tilelang")
    compiles_to_disk = True

    def __init__(self) -> None:
        from flash_qla import chunk_gated_delta_rule

        self.function = chunk_gated_delta_rule

    def bind(self, inputs: Inputs) -> Call:
        # Without offsets it would make int32 ones itself.
        return _bound(self.function, inputs, cu_seqlens=inputs.offsets.int32)


class FlashInfer(Library):
    """FlashInfer, in CuTe DSL: linear gates, [T, heads, 128], states with V first; it splits sequences by itself as well."""

    name, label = "flashinfer", "FlashInfer"
    distributions = ("flashinfer-python", "nvidia-cutlass-dsl")
    state_v_first = True

    def __init__(self) -> None:
        from flashinfer.gdn_prefill import chunk_gated_delta_rule

        self.function = chunk_gated_delta_rule

    def bind(self, inputs: Inputs) -> Call:
        function, x = self.function, inputs
        q, k, v = (t.view(-1, t.shape[2], WIDTH) for t in (x.q, x.k, x.v))
        alpha, beta, state = x.alpha[0], x.beta[0], x.initial_state_v_first
        longest = max(x.row.sequences)
        return lambda: function(
            q,
            k,
            v,
            alpha,
            beta,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=x.offsets.int32,
            max_seqlen=longest,
        )


LIBRARIES: dict[str, type[Library]] = {library.name: library for library in (Flashdelta, Fla, FlashQla, FlashInfer)}


def reason(error: BaseException, limit: int = 200) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def load(names: list[str]) -> tuple[dict[str, Library], dict[str, str]]:
    """The libraries that can be imported, and why the others cannot."""
    loaded, absent = {}, {}
    for name in names:
        try:
            loaded[name] = LIBRARIES[name]()
        except Exception as error:  # an import may fail in any way: a missing package, GPU, compiler
            absent[name] = reason(error)
    return loaded, absent
