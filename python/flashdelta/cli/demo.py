"""`flashdelta demo`: real text through one Gated DeltaNet layer: chunked prefill, then decode, checked and timed."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import flashdelta
from flashdelta.cli import contract, device, errors, options, oracle, plots, text, timing, ui
from flashdelta.cli.dtypes import DTYPES
from flashdelta.cli.layer import Layer, LayerInputs, concatenate

if TYPE_CHECKING:
    from rich.console import Console

LENGTHS = (1024, 2048, 4096, 8192, 16384)

_DESCRIPTION = """Reads text, turns it into the inputs of one Qwen3.5-0.8B-shaped Gated DeltaNet layer (16 key heads, 16 value heads,
width 128; byte embedding, projections, width-4 causal convolution with SiLU, fixed seed), prefills it in chunks, continues token by token
from the final state, and checks both against the float64 oracle. Exits with 1 when an error is outside the numerics contract."""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser("demo", help="real text through one layer: prefill, decode, check, time", description=_DESCRIPTION)
    parser.add_argument("--text", metavar="FILE", help="text to read, - for standard input (default: documentation at hand)")
    options.add_device(parser)
    parser.add_argument("--tokens", type=options.integer(1, 1 << 20), default=4096, metavar="N", help="bytes to prefill (default: 4096)")
    parser.add_argument(
        "--decode", type=options.integer(1, 1 << 14), default=64, metavar="N", help="bytes decoded one at a time (default: 64)"
    )
    parser.add_argument(
        "--check-tokens",
        type=options.integer(1, 1 << 20),
        default=4096,
        metavar="N",
        help="prefilled tokens that the oracle follows, a second or less per thousand on two cores (default: 4096)",
    )
    parser.add_argument("--no-scan", action="store_true", help="leave out the plot of time against length")
    options.add_dtype(parser)
    options.add_cpu(parser)
    options.add_seed(parser, 0, "of the layer's weights (default: 0)")
    return parser


@dataclass
class _Runner:
    """The two operations on one device with the layer's constants."""

    place: device.Cpu | device.Cuda
    layer: Layer
    threads: int
    instruction_set: str

    def __post_init__(self) -> None:
        self._constants = {name: self.place.put(x) for name, x in self.layer.kwargs().items()}
        self._constants.update(backend=self.place.backend, num_threads=self.threads, instruction_set=self.instruction_set)

    def put(self, inputs: LayerInputs) -> dict[str, Any]:
        return {name: self.place.put(x) for name, x in inputs.as_kwargs().items()}

    def chunked(self, tokens: dict[str, Any], **kwargs: Any) -> tuple[Any, Any]:
        return flashdelta.chunk_gated_delta_rule(**tokens, **self._constants, output_final_state=True, **kwargs)

    def recurrent(self, tokens: dict[str, Any], **kwargs: Any) -> tuple[Any, Any]:
        return flashdelta.fused_recurrent_gated_delta_rule(**tokens, **self._constants, output_final_state=True, **kwargs)


@dataclass
class _Decoded:
    inputs: LayerInputs
    o: np.ndarray
    final_state: np.ndarray
    seconds: float


def _decode(runner: _Runner, tokens: np.ndarray, start: int, count: int, state: Any) -> _Decoded:
    """Tokens start .. start + count one at a time, each projected, convolved and stepped when its turn comes."""
    inputs, outputs, spent = [], [], 0.0
    for at in range(start, start + count):
        step = runner.layer.inputs(tokens[at : at + 1], before=tokens[:at])
        placed = runner.put(step)
        runner.place.synchronize()
        begin = time.perf_counter()
        o, state = runner.recurrent(placed, initial_state=state)
        runner.place.synchronize()
        spent += time.perf_counter() - begin
        inputs.append(step)
        outputs.append(runner.place.get(o))
    return _Decoded(concatenate(inputs), np.concatenate(outputs, axis=1), runner.place.get(state), spent)


@dataclass
class _Speed:
    chunked: float  # seconds for the prefill
    recurrent: float  # seconds for the same tokens, token by token
    decode: float  # seconds for the decoded tokens, one call each


def _check(runner: _Runner, args: argparse.Namespace, tokens: np.ndarray) -> tuple[list[tuple[str, contract.Error]], _Speed]:
    """Runs prefill, decode and the token-by-token path; compares all three with the oracle."""
    prompt = runner.layer.inputs(tokens[: args.tokens])
    checked = min(args.tokens, args.check_tokens)
    get = runner.place.get

    placed = runner.put(prompt)
    o, state = runner.chunked(placed)
    o_recurrent, _ = runner.recurrent(placed)
    speed = _Speed(
        timing.median_seconds(lambda: runner.chunked(placed), runner.place, warm=False),
        timing.median_seconds(lambda: runner.recurrent(placed), runner.place, repeats=3, warm=False),
        0.0,
    )
    prefix = prompt[slice(0, checked)]
    if checked < args.tokens:  # the oracle stops earlier than the prefill: decode continues from where it stops
        _, state = runner.chunked(runner.put(prefix))
    _, state_recurrent = runner.recurrent(runner.put(prefix))
    decoded = _decode(runner, tokens, checked, args.decode, state)
    speed.decode = decoded.seconds

    threads = args.threads
    constants = runner.layer.kwargs()
    with ui.progress("float64 oracle, tokens", checked + args.decode) as advance:
        exact, exact_state = oracle.prefill(prefix.as_kwargs(), constants, None, threads, advance)
        exact_decoded, exact_decoded_state = oracle.prefill(decoded.inputs.as_kwargs(), constants, exact_state, threads, advance)

    dtype = runner.layer.dtype
    results = [
        ("prefill, chunked", "o", get(o)[:, :checked], exact),
        ("prefill, chunked", "final_state", get(state), exact_state),
        ("prefill, token by token", "o", get(o_recurrent)[:, :checked], exact),
        ("prefill, token by token", "final_state", get(state_recurrent), exact_state),
        ("decode after prefill", "o", decoded.o, exact_decoded),
        ("decode after prefill", "final_state", decoded.final_state, exact_decoded_state),
    ]
    return [(path, contract.error(name, got, want, dtype)) for path, name, got, want in results], speed


def _scan(runner: _Runner, data: bytes) -> list[float]:
    """Seconds of a chunked prefill for each of LENGTHS."""
    tokens = text.tokens(data, LENGTHS[-1])
    with ui.progress("time against length", len(LENGTHS) + 1) as advance:
        inputs = runner.layer.inputs(tokens)
        advance()
        times = []
        for length in LENGTHS:
            placed = runner.put(inputs[slice(0, length)])
            times.append(timing.median_seconds(lambda placed=placed: runner.chunked(placed), runner.place, repeats=5))
            advance()
    return times


def _print_errors(console: Console, rows: list[tuple[str, contract.Error]]) -> None:
    table = ui.table("error against the float64 oracle", "path", "output", "error", "contract", "", numbers=3)
    for path, error in rows:
        table.add_row(path, error.name, f"{error.value:.2e}", f"{error.bound:.1e}", "ok" if error.ok else "OUTSIDE")
    console.print(table)


def _print_speed(console: Console, speed: _Speed, args: argparse.Namespace, backend: str) -> None:
    table = ui.table("speed of the layer's delta rule", "path", "tokens", "time", "tokens/s", numbers=3)
    table.add_row("prefill, chunked", ui.count(args.tokens), ui.seconds(speed.chunked), ui.count(args.tokens / speed.chunked))
    table.add_row("prefill, token by token", ui.count(args.tokens), ui.seconds(speed.recurrent), ui.count(args.tokens / speed.recurrent))
    table.add_row("decode, one call per token", ui.count(args.decode), ui.seconds(speed.decode), ui.count(args.decode / speed.decode))
    console.print(table)
    if backend == "cuda":
        console.print(
            "on a GPU the token-by-token call runs the chunked kernels; prefill is timed by CUDA graphs, decode with Python's part"
        )
    else:
        console.print(f"chunked prefill is {speed.recurrent / speed.chunked:.2f}x as fast as token by token")


def main(args: argparse.Namespace) -> int:
    options.check_instruction_set(args.instruction_set)
    place = device.select(args.device, device.cuda_refusal(DTYPES[args.dtype]))
    source, data = text.load(args.text)
    console = ui.stdout()
    layer = Layer(dtype=args.dtype, seed=args.seed)
    runner = _Runner(place, layer, args.threads, args.instruction_set)
    tokens = text.tokens(data, args.tokens + args.decode)
    repeated = " (repeated to that length)" if len(data) < len(tokens) else ""

    console.print(f"device: {place.backend} ({place.describe(flashdelta.info(), args.instruction_set, args.threads)})")
    console.print(f"text:   {source}, {ui.count(len(data))} bytes; {ui.count(len(tokens))} used{repeated}")
    console.print(f"layer:  Qwen3.5-0.8B's Gated DeltaNet, {layer.heads} heads, K = V = 128, {args.dtype}, seed {args.seed}")
    with errors.library_errors():
        rows, speed = _check(runner, args, tokens)
        _print_errors(console, rows)
        _print_speed(console, speed, args, place.backend)
        if not args.no_scan:
            times = _scan(runner, data)
            console.print()
            console.print(plots.text(LENGTHS, [1e3 * t for t in times], "tokens", "ms"))
            console.print(f"chunked prefill: time grows as length^{plots.exponent(LENGTHS, times):.2f} (1 is linear)")
    outside = [f"{path}: {error.name}" for path, error in rows if not error.ok]
    if outside:
        ui.stderr().print(f"{args.prog}: outside the numerics contract: {'; '.join(outside)}")
        return errors.FAILED
    return errors.OK
