#!/usr/bin/env python3
"""Tables and plots of a side-by-side result: python3 bench/report.py RESULT.json writes RESULT.md and the two RESULT-*.svg again.

Needs neither torch nor a GPU; matplotlib for the plots.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

OURS = "flashdelta"
LABELS = {"flashdelta": "flashdelta", "fla": "FLA", "flash_qla": "FlashQLA", "flashinfer": "FlashInfer"}
# Distinguishable without colour vision too; the markers repeat the distinction.
_STYLES = {"flashdelta": ("#d55e00", "o"), "fla": ("#999999", "s"), "flash_qla": ("#0072b2", "^"), "flashinfer": ("#009e73", "D")}
_PLOTTED_HEADS = ("2/8", "16/64")  # few heads and many


def geometric_mean(values: list[float]) -> float | None:
    """None of no values."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def libraries(report: dict) -> list[str]:
    """Names of the libraries that took part, this one first."""
    return [name for name in LABELS if any(name in row["libraries"] for row in report["rows"])]


def _us(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def cell(entry: dict | None, row: dict) -> str:
    """One library on one row: microseconds, us*SM per chunk-head, % of the floor; `e` marks eager calls; or why there is none."""
    if entry is None:
        return ""
    if "us" not in entry:
        return entry["error"]
    text = f"{_us(entry['us'])}{'e' if entry['mode'] == 'eager' else ''}"
    if entry.get("us_sm_per_chunk_head") is not None:
        text += f" / {entry['us_sm_per_chunk_head']:.2f}"
    if row.get("floor_us") is not None:
        text += f" / {100 * row['floor_us'] / entry['us']:.0f} %"
    return text


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _columns(report: dict) -> tuple[str, ...]:
    return ("heads", "lengths", "floor us", *(LABELS[name] for name in libraries(report)), "ratio")


def _lines(report: dict, limit: int) -> list[tuple[str, ...]]:
    lines = []
    for row in report["rows"]:
        floor = "-" if row.get("floor_us") is None else _us(row["floor_us"])
        cells = [_short(cell(row["libraries"].get(name), row), limit) for name in libraries(report)]
        ratio = "-" if row.get("ratio") is None else f"{row['ratio']:.2f}x ({LABELS[row['best_peer']]})"
        lines.append((row["heads"], row["lengths"], floor, *cells, ratio))
    return lines


def _first_call_lines(report: dict) -> list[tuple[str, ...]]:
    lines = []
    for name, times in report.get("first_call", {}).get("libraries", {}).items():
        if "error" in times:
            lines.append((LABELS[name], times["error"], "", ""))
        else:
            values = (f"{1e3 * times[key]:.1f} ms" for key in ("import_s", "first_call_s", "second_call_s"))
            lines.append((LABELS[name], *values))
    return lines


def _head(report: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['device']['name']}, {report['date']}; {versions}"


def _worst_errors(report: dict, name: str) -> str | None:
    # Of all rows that were measured.
    cells = [row["libraries"][name] for row in report["rows"] if "error_o" in row["libraries"].get(name, {})]
    if not cells:
        return None
    o, state = (max(cell[key] for cell in cells) for key in ("error_o", "error_final_state"))
    return f"{LABELS[name]}: relative error of o at most {o:.1e}, of the final state {state:.1e}, on {len(cells)} rows."


def _summary(report: dict) -> list[str]:
    lines = []
    if (mean := report.get("geometric_mean")) is not None:
        lines.append(f"Geometric mean of the ratios over {mean['rows']} rows: {mean['ratio']:.3f}x.")
    lines += [line for name in libraries(report) if (line := _worst_errors(report, name))]
    lines += [f"{LABELS[name]} is absent: {why}" for name, why in report["absent"].items()]
    return lines


_FIRST_CALL = ("library", "import", "first call", "second call")
_LEGEND = "us / us*SM per chunk-head / % of floor; e: eager, not a graph; ratio: best other library over flashdelta"


def markdown(report: dict) -> str:
    """The report as Markdown tables."""
    parts = [_head(report), "", _LEGEND, ""]
    columns = _columns(report)
    lines = [columns, ("---",) * len(columns), *_lines(report, 80)]
    parts += [f"| {' | '.join(x.replace('|', '/') for x in line)} |" for line in lines]
    parts += ["", *(f"- {line}" for line in _summary(report))]
    if first := _first_call_lines(report):
        parts += ["", f"First call in a fresh process, nothing compiled before ({report['first_call']['row']}):", ""]
        parts += [f"| {' | '.join(line)} |" for line in (_FIRST_CALL, ("---",) * 4, *first)]
    return "\n".join(parts) + "\n"


def show(report: dict) -> None:
    """The report on the terminal, with rich where it is installed."""
    if importlib.util.find_spec("rich") is None:
        print(markdown(report))
        return
    from rich.console import Console
    from rich.table import Table

    # What is piped into a file keeps whole lines.
    console = Console(width=None if sys.stdout.isatty() else 180, markup=False, highlight=False)
    table = Table(title=_head(report), caption=_LEGEND)
    for name in _columns(report):
        table.add_column(name, justify="left" if name in ("heads", "lengths") else "right", overflow="fold")
    for line in _lines(report, 40):
        table.add_row(*line)
    console.print(table)
    for line in _summary(report):
        console.print(line)
    if first := _first_call_lines(report):
        table = Table(title=f"First call in a fresh process, nothing compiled before ({report['first_call']['row']})")
        for name in _FIRST_CALL:
            table.add_column(name)
        for line in first:
            table.add_row(*line)
        console.print(table)


def _figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4.5)):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def _plot_lengths(report: dict, path: Path) -> bool:
    # Time against the length of a single sequence.
    rows = [row for row in report["rows"] if len(row["sequences"]) == 1]
    layouts = [heads for heads in _PLOTTED_HEADS if any(row["heads"] == heads for row in rows)]
    if not layouts:
        return False
    figure, axes = _figure(1, len(layouts), (5.5 * len(layouts), 4.5))
    for at, heads in zip(axes[0], layouts, strict=True):
        shown = sorted((row for row in rows if row["heads"] == heads), key=lambda row: row["tokens"])
        for name in libraries(report):
            points = [(row["tokens"], row["libraries"][name]["us"]) for row in shown if "us" in row["libraries"].get(name, {})]
            if points:
                colour, marker = _STYLES[name]
                at.plot(*zip(*points, strict=True), color=colour, marker=marker, label=LABELS[name])
        floors = [(row["tokens"], row["floor_us"]) for row in shown if row.get("floor_us") is not None]
        if floors:
            at.plot(*zip(*floors, strict=True), color="black", linestyle="--", linewidth=1, label="floor")
        at.set_xscale("log", base=2)
        at.set_yscale("log")
        ticks = sorted({row["tokens"] for row in shown})
        at.set_xticks(ticks, [f"{t // 1024}k" if t % 1024 == 0 else str(t) for t in ticks])
        at.set_title(f"{heads} key/value heads, one sequence")
        at.set_xlabel("tokens")
        at.set_ylabel("microseconds")
        at.grid(alpha=0.3)
        at.legend()
    figure.suptitle(f"{report['device']['name']}, {report['date']}: forward, bf16, width 128")
    figure.savefig(path)
    return True


def _plot_ratios(report: dict, path: Path) -> bool:
    rows = [row for row in report["rows"] if row.get("ratio") is not None]
    if not rows:
        return False
    figure, axes = _figure(size=(max(6.0, 0.42 * len(rows) + 1.5), 5))
    at = axes[0][0]
    colours = [_STYLES[row["best_peer"]][0] for row in rows]
    bars = at.bar(range(len(rows)), [row["ratio"] for row in rows], color=colours)
    at.bar_label(bars, fmt="%.2f", fontsize=7)
    at.axhline(1, color="black", linewidth=1)
    at.set_xticks(range(len(rows)), [f"{row['heads']}\n{row['lengths']}" for row in rows], rotation=90, fontsize=7)
    at.set_ylabel("time of the best other library / time of flashdelta")
    at.set_title(f"{report['device']['name']}, {report['date']}: forward, bf16, width 128")
    for name in dict.fromkeys(row["best_peer"] for row in rows):
        at.bar(0, 0, color=_STYLES[name][0], label=f"best other: {LABELS[name]}")
    at.grid(axis="y", alpha=0.3)
    at.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path)
    return True


def plot(report: dict, stem: Path) -> list[Path]:
    """Writes STEM-length.svg and STEM-ratio.svg, each where there is something to show; returns what was written."""
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plots (bench/report.py draws them later from the JSON file)", file=sys.stderr)
        return []
    targets = ((_plot_lengths, f"{stem.name}-length.svg"), (_plot_ratios, f"{stem.name}-ratio.svg"))
    return [path for draw, name in targets if draw(report, path := stem.with_name(name))]


def write(report: dict, stem: Path) -> list[Path]:
    """Writes STEM.md and the plots; returns their paths."""
    table = stem.with_name(f"{stem.name}.md")
    table.write_text(markdown(report))
    return [table, *plot(report, stem)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    print(*write(json.loads(source.read_text()), source.with_suffix("")), sep="\n")
