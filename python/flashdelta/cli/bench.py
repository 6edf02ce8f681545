"""`flashdelta bench`: times, rates and ratios of the three passes, as a table, JSON and a plot."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
from pathlib import Path
from typing import Any

import flashdelta
from flashdelta.cli import device, errors, measure, options, plots, ui
from flashdelta.cli.dtypes import DTYPES
from flashdelta.cli.measure import PASSES, Result, Shape
from flashdelta.cli.models import MODELS, HeadLayout

_DESCRIPTION = """Measures chunked forward, backward and the token-by-token path on random inputs: median time, time per token and value
head, GFLOP/s beside the measured peak of the same instruction set, workspace, and the ratios between the passes. --suite cpu is the table
that bench/results records: 16/16 heads, width 128, 4096 tokens, bf16 and fp32, every instruction set, one thread and all. On a GPU: the
forward alone unless --pass says otherwise, timed by replays of a CUDA graph, beside the least time that an H200's tensor cores or its
memory allow."""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser("bench", help="times, rates and ratios; JSON, table, plot", description=_DESCRIPTION)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        "--model", choices=tuple(MODELS), metavar="NAME", help=f"a model's head layout: {', '.join(MODELS)} (default: qwen3.5-0.8b)"
    )
    shape.add_argument("--heads", type=_heads, metavar="H/HV", help="key heads / value heads, such as 16/32")
    shape.add_argument("--suite", choices=("cpu", "models"), help="cpu: see above; models: every layout of the model table")
    parser.add_argument("--dim", type=_dim, metavar="K[/V]", help="key and value width (default: 128)")
    parser.add_argument("--tokens", type=options.integer(1, 1 << 24), metavar="N", help="per batch row (default: 4096)")
    parser.add_argument("--batch", type=options.integer(1, 1 << 16), metavar="B", help="batch rows (default: 1)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of q, k, v (default: bf16)")
    parser.add_argument("--pass", dest="passes", action="append", choices=PASSES, help="may be repeated (default: all; GPU: forward)")
    parser.add_argument("--repeats", type=options.integer(1, 1000), default=7, metavar="N", help="the median of N is taken (default: 7)")
    options.add_device(parser)
    options.add_cpu(parser)
    parser.add_argument("--json", metavar="FILE", help="write everything measured as JSON, - for standard output instead of the table")
    parser.add_argument("--plot", metavar="FILE", help="write a plot, .png or .svg (needs matplotlib)")
    return parser


def _heads(text: str) -> HeadLayout:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not H/HV, such as 16/32")
    key_heads, value_heads = map(int, match.groups())
    if not 1 <= key_heads <= value_heads <= 65535 or value_heads % key_heads:
        raise argparse.ArgumentTypeError(f"{text}: value heads must be a multiple of key heads, both at least 1")
    return HeadLayout(key_heads, value_heads)


def _dim(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:/(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not K or K/V, such as 128")
    widths = int(match[1]), int(match[2] or match[1])
    if not all(1 <= width <= 256 for width in widths):
        raise argparse.ArgumentTypeError(f"{text}: widths are 1..256")
    return widths


def _shapes(args: argparse.Namespace, place: device.Cpu | device.Cuda) -> list[Shape]:
    def layout(heads: HeadLayout) -> HeadLayout:
        return HeadLayout(heads.key_heads, heads.value_heads, *args.dim) if args.dim else heads

    tokens, batch = args.tokens or 4096, args.batch or 1
    dtypes = [args.dtype or "bf16"]
    sets, counts = [args.instruction_set], [args.threads]
    if place.backend == "cpu":  # what "best" and "all" stand for here
        everything = flashdelta.info()["cpu"]["threads"]
        here = options.instruction_sets_here() or sets
        sets = here[:1] if args.instruction_set == "best" else sets
        counts = [args.threads or everything]
    if args.suite == "cpu":
        if place.backend != "cpu":
            raise errors.UsageError("--suite cpu: runs on the CPU; add --device cpu")
        sets = here if args.instruction_set == "best" else sets
        counts = counts if args.threads else sorted({1, everything})
        dtypes = [args.dtype] if args.dtype else ["bf16", "fp32"]
        layouts = [HeadLayout(16, 16)]
    elif args.suite == "models":
        layouts = [HeadLayout(*pair) for pair in sorted({(heads.key_heads, heads.value_heads) for heads in MODELS.values()})]
    else:
        layouts = [args.heads or MODELS[args.model or "qwen3.5-0.8b"]]
    return [Shape(layout(h), tokens, batch, d, s, n) for h in layouts for d in dtypes for s in sets for n in counts]


def _ratios(results: list[Result]) -> dict[str, float]:
    seconds = {result.operation: result.seconds for result in results}
    ratios = {}
    if {"forward", "recurrent"} <= seconds.keys():
        ratios["chunked_over_token_by_token"] = seconds["recurrent"] / seconds["forward"]
        separate = next((result.separate_seconds for result in results if result.separate_seconds), None)
        if separate is not None:
            ratios["chunked_over_separate_passes"] = separate / seconds["forward"]
    if {"forward", "backward"} <= seconds.keys():
        ratios["backward_over_forward"] = seconds["backward"] / seconds["forward"]
    return ratios


def _ratio_text(result: Result, ratios: dict[str, float]) -> str:
    if result.operation == "forward" and "chunked_over_token_by_token" in ratios:
        text = f"{ratios['chunked_over_token_by_token']:.2f}x token by token"
        separate = ratios.get("chunked_over_separate_passes")
        return text if separate is None else f"{text}, {separate:.2f}x ggml's schedule"
    if result.operation == "backward" and "backward_over_forward" in ratios:
        return f"{ratios['backward_over_forward']:.2f}x forward's time"
    if result.separate_seconds is not None:
        return f"ggml's schedule: {1e6 * result.separate_seconds / result.shape.token_heads:.3f} us/token/head"
    return ""


def _label(shape: Shape) -> str:
    widths = sorted({shape.heads.key_width, shape.heads.value_width}, reverse=True)
    size = f"{shape.batch}x{shape.tokens}"
    return f"{shape.heads} d={'/'.join(map(str, widths))} {size} {shape.dtype}"


def _how(shape: Shape) -> str:
    return f"{shape.instruction_set}, {shape.threads} thr." if shape.threads else ""


def _print_cuda(groups: list[list[Result]], place_text: str) -> None:
    columns = ("shape", "pass", "timed by", "time", "us/token/head", "TFLOP/s", "H200's floor", "set by", "time / floor")
    table = ui.table(place_text, *columns)
    for column in (*table.columns[3:7], table.columns[8]):
        column.justify = "right"
    for result in (result for results in groups for result in results):
        floor, set_by = result.floor
        table.add_row(
            _label(result.shape),
            result.operation,
            result.how,
            ui.seconds(result.seconds),
            f"{result.us_per_token_head:.5f}",
            f"{1e-3 * result.gflops:.1f}",
            ui.seconds(floor),
            set_by,
            f"{result.seconds / floor:.2f}",
        )
    ui.stdout().print(table)


def _print(groups: list[list[Result]], place_text: str) -> None:
    columns = ("shape", "how", "pass", "time", "us/token/head", "GFLOP/s", "of peak", "workspace/thr.", "ratio")
    table = ui.table(place_text, *columns)
    for column in table.columns[3:8]:
        column.justify = "right"
    for results in groups:
        ratios = _ratios(results)
        for i, result in enumerate(results):
            table.add_row(
                _label(result.shape) if i == 0 else "",
                _how(result.shape) if i == 0 else "",
                result.operation,
                ui.seconds(result.seconds),
                f"{result.us_per_token_head:.3f}",
                f"{result.gflops:.1f}",
                "-" if result.floor_share is None else f"{100 * result.floor_share:.0f} % of {result.peak_gflops:.0f}",
                "-" if result.workspace_per_thread is None else ui.size(result.workspace_per_thread),
                _ratio_text(result, ratios),
            )
        table.add_section()
    ui.stdout().print(table)


def _report(groups: list[list[Result]], place: device.Cpu | device.Cuda) -> dict[str, Any]:
    info = flashdelta.info()
    return {
        "flashdelta": info["version"],
        "date": datetime.date.today().isoformat(),
        "backend": place.backend,
        "processor": info["cpu"]["processor"],
        "threads_available": info["cpu"]["threads"],
        "gpus": info["cuda"]["devices"] if place.backend == "cuda" else [],
        "flops": "multiply-add is 2; triangular products count their lower half, on the CPU forward of half chunks (docs/numerics.md)",
        "shapes": [{"passes": [result.as_json() for result in results], **_ratios(results)} for results in groups],
    }


def _plot(path: str, groups: list[list[Result]], title: str) -> None:
    parts = [(*_label(results[0].shape).split(), *_how(results[0].shape).split(", ")) for results in groups]
    common = [part for part in zip(*parts, strict=True) if len(groups) > 1 and len(set(part)) == 1]
    labels = ["\n".join(x for x in part if not any(x == shared[0] for shared in common)) for part in parts]
    title = " ".join([title, *(shared[0] for shared in common)])
    series = {
        operation: [next((r.us_per_token_head for r in results if r.operation == operation), math.nan) for results in groups]
        for operation in dict.fromkeys(result.operation for results in groups for result in results)
    }
    plots.bars(path, title, labels, series, "us per token and value head")


def write_json(path: str, report: dict[str, Any]) -> None:
    """Raises UsageError where `path` cannot be written."""
    try:
        Path(path).write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise errors.UsageError(f"--json: cannot write {path}: {error.strerror}") from error


def main(args: argparse.Namespace) -> int:
    plots.check_path(args.plot, "--plot")
    if args.json != "-":
        plots.check_directory(args.json, "--json")
    options.check_instruction_set(args.instruction_set)
    # What the suite for the CPU measures is for no GPU, however it is called.
    refusal = device.cuda_refusal(DTYPES[args.dtype or "bf16"], *(args.dim or (device.CUDA_WIDTH,) * 2))
    place = device.select("cpu" if args.suite == "cpu" and args.device == "auto" else args.device, refusal)
    shapes = _shapes(args, place)
    passes = tuple(dict.fromkeys(args.passes or (PASSES if place.backend == "cpu" else ("forward",))))
    groups = []
    with errors.library_errors(), ui.progress("measuring", len(shapes)) as advance:
        for shape in shapes:
            advance(0, f"{_label(shape)} {_how(shape)}")
            groups.append(measure.run(shape, passes, place, args.repeats, advance))
    report = _report(groups, place)
    title = f"{report['processor']}" if place.backend == "cpu" else place.describe(flashdelta.info(), "", 0)
    if args.json == "-":
        print(json.dumps(report, indent=2))
    else:
        (_print if place.backend == "cpu" else _print_cuda)(groups, f"{title}, flashdelta {report['flashdelta']}")
        if args.json:
            write_json(args.json, report)
    if args.plot:
        _plot(args.plot, groups, title)
    return errors.OK
