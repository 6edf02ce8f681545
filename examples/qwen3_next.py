#!/usr/bin/env python3
"""A small Qwen3-Next or Qwen3.5 of Hugging Face transformers, with its own torch path and with flashdelta in its place.

    python3 examples/qwen3_next.py [TEXT] [--device cpu|cuda|auto]

The weights are random, the layers are those of the published models but fewer, and the tokens are the bytes of a text (by default this
repository's documentation). Both paths prefill the same tokens, then take some more one by one from the cache. The logits must agree as
closely as bfloat16 lets two ways of computing them agree; otherwise the program exits with an error.

transformers is used as installed. It looks the operation up by name when a layer runs, either in the layer (chunk_gated_delta_rule) or in
the model's module (torch_chunk_gated_delta_rule): that name is all that is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flashdelta
import torch

_ROOT = Path(__file__).resolve().parents[1]
# package, configuration, model; the first that the installed transformers has
_MODELS = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM"),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
}
# Two results of which each is within e of the float32 model's are within 2 e of each other.
_APART = 2.0
# Both paths round the same tensors to bfloat16 in front of and behind the operation; what lies between may not add much to that.
_FARTHER = 1.25
# float32 has no coarser rounding to hide behind: docs/numerics.md allows 1e-5 per call, and a few layers carry it on.
_FLOAT32 = 1e-4


class Sizes(NamedTuple):
    hidden: int
    key_heads: int
    value_heads: int
    tokens: int


_SIZES = {"cuda": Sizes(1024, 16, 32, 8192), "cpu": Sizes(256, 2, 4, 1024)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, help="file whose bytes are the tokens (default: this repository's documentation)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", choices=("auto", *_MODELS), default="auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="float32: on the CPU")
    parser.add_argument("--tokens", type=int, default=None, help="tokens of the prefill (default: 8192 on a GPU, 1024 on the CPU)")
    parser.add_argument("--decode", type=int, default=8, help="tokens after that, one by one (default: 8)")
    parser.add_argument("--layers", type=int, default=4, help="every fourth is full attention (default: 4)")
    parser.add_argument("--repeats", type=int, default=5, help="timed prefills of each path (default: 5)")
    arguments = parser.parse_args()
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() and "cuda" in flashdelta.info()["backends"] else "cpu"
    if min(arguments.tokens or 1, arguments.layers, arguments.repeats) < 1 or arguments.decode < 0:
        parser.error("--tokens, --layers and --repeats must be at least 1, --decode at least 0")
    return arguments


def _text(path: Path | None) -> bytes:
    if path is not None:
        return path.read_bytes()
    return b"\n".join(p.read_bytes() for p in (_ROOT / "README.md", _ROOT / "CONTRIBUTING.md", *sorted((_ROOT / "docs").glob("*.md"))))


def _tokens(text: bytes, count: int) -> torch.Tensor:
    if not text:
        raise SystemExit("the text is empty")
    return torch.frombuffer(bytearray((text * (count // len(text) + 1))[:count]), dtype=torch.uint8).long()[None]


def _find(wanted: str) -> tuple[Any, type, type]:
    # (modeling module, configuration class, model class)
    for name, (config, model) in _MODELS.items():
        if wanted not in ("auto", name):
            continue
        try:
            modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
            configuration = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
            return modeling, getattr(configuration, config), getattr(modeling, model)
        except (ImportError, AttributeError) as error:
            print(f"{name}: not in the installed transformers ({error})")
    raise SystemExit("the installed transformers has none of " + ", ".join(_MODELS))


def _build(config_class: type, model_class: type, sizes: Sizes, layers: int, device: str, dtype: torch.dtype) -> Any:
    config = config_class(
        vocab_size=256,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=layers,
        layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=sizes.key_heads,
        linear_num_value_heads=sizes.value_heads,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        # A router would turn a rounding error into another choice of experts: dense layers.
        num_experts=0,
        mlp_only_layers=list(range(layers)),
        max_position_embeddings=1 << 20,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    # With transformers' own start the state is forgotten within a few tokens and would hardly matter. These are Mamba 2's steps.
    for module in model.modules():
        if hasattr(module, "dt_bias"):
            step = torch.exp(torch.empty_like(module.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)))
            module.dt_bias.data.copy_(step + torch.log(-torch.expm1(-step)))
    return model.to(device, dtype)


class ImportPoint(NamedTuple):
    """A name by which transformers calls the operation, and the torch code that it stands for."""

    holder: Any
    name: str
    torch_path: Callable
    function: Callable


def _import_points(model: torch.nn.Module, modeling: Any) -> list[ImportPoint]:
    operations = (
        ("chunk_gated_delta_rule", "torch_chunk_gated_delta_rule", flashdelta.chunk_gated_delta_rule),
        ("recurrent_gated_delta_rule", "torch_recurrent_gated_delta_rule", flashdelta.fused_recurrent_gated_delta_rule),
    )
    points = []
    for attribute, name, function in operations:
        # Newer versions wrap the torch code in what chooses an implementation.
        torch_path = inspect.unwrap(getattr(modeling, name))
        layers = [module for module in model.modules() if attribute in vars(module)]
        points += [ImportPoint(layer, attribute, torch_path, function) for layer in layers]
        if not layers:
            points.append(ImportPoint(modeling, name, torch_path, function))
    return points


def _takes(function: Callable) -> Callable:
    # transformers passes its own keywords on to every implementation, which takes those that it knows. Its torch convolution leaves
    # q, k and v with the tokens innermost; like flash-linear-attention, we copy what is not contiguous along a head.
    known = inspect.signature(function).parameters

    def call(*qkv, **kwargs):
        qkv = (x if x.stride(-1) == 1 else x.contiguous() for x in qkv)
        return function(*qkv, **{name: value for name, value in kwargs.items() if name in known})

    return call


def _theirs(point: ImportPoint) -> Callable:
    return point.torch_path


def _ours(point: ImportPoint) -> Callable:
    return _takes(point.function)


@contextlib.contextmanager
def _using(points: list[ImportPoint], implementation: Callable[[ImportPoint], Callable]) -> Iterator[None]:
    before = [getattr(point.holder, point.name) for point in points]
    for point in points:
        setattr(point.holder, point.name, implementation(point))
    try:
        yield
    finally:
        for point, value in zip(points, before, strict=True):
            setattr(point.holder, point.name, value)


def _logits(model: Any, tokens: torch.Tensor, prefill: int) -> torch.Tensor:
    # Of the prefill and of the tokens after it, one by one: [T, 256].
    out = model(tokens[:, :prefill], use_cache=True)
    parts, cache = [out.logits], out.past_key_values
    for at in range(prefill, tokens.shape[1]):
        out = model(tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
        cache = out.past_key_values
    return torch.cat(parts, dim=1)[0].double()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _seconds(model: Any, tokens: torch.Tensor, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = _now(tokens.device)
        model(tokens, use_cache=True)
        times.append(_now(tokens.device) - start)
    return statistics.median(times)


def _operation_seconds(model: Any, tokens: torch.Tensor, repeats: int, points: list[ImportPoint], implementation: Callable) -> float:
    # Of all layers of a prefill, measured apart: waiting for each layer's operation takes time itself.
    spent = [0.0]

    def clocked(point: ImportPoint) -> Callable:
        function = implementation(point)

        def call(*args, **kwargs):
            start = _now(tokens.device)
            result = function(*args, **kwargs)
            spent[-1] += _now(tokens.device) - start
            return result

        return call

    with _using(points, clocked):
        for _ in range(repeats):
            model(tokens, use_cache=True)
            spent.append(0.0)
    return statistics.median(spent[:-1])


def _relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


def _check(ours: torch.Tensor, theirs: torch.Tensor, float32: torch.Tensor | None) -> bool:
    """Prints the differences; returns whether they are within tolerance. `float32`: logits of the float32 model, None if that is it."""
    apart = _relative(ours, theirs)
    agree = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    largest, up_to = float((ours - theirs).abs().max()), float(theirs.abs().max())
    print(f"logits: largest difference {largest:.2e} of up to {up_to:.2f}, relative {apart:.2e}")
    print(f"most likely next byte: the same for {100 * agree:.2f} % of the tokens")
    if not bool(torch.isfinite(ours).all()):
        print("FAILED: not all logits are finite")
        return False
    if float32 is None:
        print(f"allowed: relative {_FLOAT32:.0e}")
        return apart <= _FLOAT32
    own, other = _relative(ours, float32), _relative(theirs, float32)
    print(f"relative error against the float32 model: torch path {other:.2e}, flashdelta {own:.2e} (allowed: {_FARTHER * other:.2e})")
    print(f"relative difference of the two: {apart:.2e} (allowed: {_APART * other:.2e})")
    return own <= _FARTHER * other and apart <= _APART * other


@torch.inference_mode()
def main() -> int:
    """Returns 0, or 1 where the logits differ by more than the tolerance."""
    arguments = _arguments()
    transformers = importlib.import_module("transformers")
    dtype, sizes = getattr(torch, arguments.dtype), _SIZES[arguments.device]
    modeling, config_class, model_class = _find(arguments.model)
    model = _build(config_class, model_class, sizes, arguments.layers, arguments.device, dtype)
    points = _import_points(model, modeling)
    where = f"the layers' {points[0].name}" if isinstance(points[0].holder, torch.nn.Module) else f"{modeling.__name__}.{points[0].name}"
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    print(f"{model_class.__name__} of transformers {transformers.__version__}, {arguments.dtype}, on {device}; replaced: {where}")
    print(f"{arguments.layers} layers, hidden size {sizes.hidden}, {sizes.key_heads} key and {sizes.value_heads} value heads of width 128")

    prefill = arguments.tokens or sizes.tokens
    tokens = _tokens(_text(arguments.text), prefill + arguments.decode).to(arguments.device)
    logits, seconds = {}, {}
    for path, implementation in (("torch path", _theirs), ("flashdelta", _ours)):
        timed = (model, tokens[:, :prefill], arguments.repeats)
        with _using(points, implementation):
            logits[path] = _logits(model, tokens, prefill)
            whole = _seconds(*timed)
        operation = _operation_seconds(*timed, points, implementation)
        seconds[path] = (whole, operation)
        times = f"{1e3 * whole:.1f} ms, {1e3 * operation:.1f} ms of it in the operation"
        print(f"{path}: {prefill / whole:.0f} tokens/s; prefill of {prefill} tokens {times}")
    faster, alone = (theirs / ours for theirs, ours in zip(seconds["torch path"], seconds["flashdelta"], strict=True))
    print(f"flashdelta over torch path: whole model {faster:.2f}x, the operation {alone:.2f}x")

    float32 = None
    if dtype != torch.float32:
        with _using(points, _theirs):
            float32 = _logits(model.float(), tokens, prefill)
    good = _check(logits["flashdelta"], logits["torch path"], float32)
    print("OK" if good else "FAILED: the logits differ by more than the tolerance")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
