"""Plots: as text for a terminal (plotext), as PNG or SVG (matplotlib). Both are imported when asked for: neither is quick to load."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flashdelta.cli.errors import UsageError

FORMATS = (".png", ".svg")


def exponent(lengths: Sequence[float], times: Sequence[float]) -> float:
    """e of the least-squares fit time = c * length^e: 1 is linear cost, 2 quadratic."""
    return float(np.polyfit(np.log(lengths), np.log(times), 1)[0])


def text(x: Sequence[float], y: Sequence[float], x_label: str, y_label: str, width: int = 76, height: int = 14) -> str:
    """y over x, both axes from 0, as plain characters."""
    from plotext import figure

    figure.clear()
    figure.theme("colorless")
    figure.plot_size(width, height)
    line = figure.signal(list(x), list(y), marker="dot")
    line.lines()
    figure.draw(line)
    points = figure.signal(list(x), list(y), marker="o")
    figure.draw(points)
    for axis, values, label in (("x", x, x_label), ("y", y, y_label)):
        figure.ruler(axis).lim(0, 1.05 * max(values))
        figure.label(label, axis)
    figure.ruler("x").ticks(list(x), [f"{int(v) // 1024}k" if v % 1024 == 0 else str(v) for v in x])
    return str(figure.build().string(colorless=True))


def check_path(path: str | None, option: str) -> None:
    """Refuses a plot path that cannot be written, before time is spent on what it would show."""
    if path is None:
        return
    if Path(path).suffix.lower() not in FORMATS:
        raise UsageError(f"{option}: {path} must end in .png or .svg")
    check_directory(path, option)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{option}: needs the Python package matplotlib (pip install 'flashdelta[plot]')")


def check_directory(path: str | None, option: str) -> None:
    """Refuses an output path whose directory is not there."""
    if path is not None and not Path(path).resolve().parent.is_dir():
        raise UsageError(f"{option}: the directory of {path} does not exist")


def bars(path: str, title: str, labels: Sequence[str], series: dict[str, Sequence[float]], y_label: str) -> None:
    """Grouped bars, one group per label and one bar per series; NaN leaves a gap."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(figsize=(max(6.0, 1.2 * len(labels)), 4.5), layout="constrained")
    at = np.arange(len(labels))
    width = 0.8 / max(len(series), 1)
    for i, (name, values) in enumerate(series.items()):
        drawn = axes.bar(at + (i - (len(series) - 1) / 2) * width, values, width, label=name)
        axes.bar_label(drawn, fmt="%.3g", fontsize=7)
    axes.set_xticks(at, labels)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend()
    fig.savefig(path, dpi=150)
    pyplot.close(fig)
