"""Console output: tables and results on stdout, progress and errors on stderr. rich is loaded when there is something to draw."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def stdout() -> Console:
    """A console on stdout; colour only on a terminal, no line wrapping when piped (a pipe has no width)."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, markup=False, width=200)
    return console


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, emoji=False, markup=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: float | None) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr that leaves no trace; nothing at all where stderr is no terminal.

    Yields `advance(steps=1, description=None)`.
    """
    if not sys.stderr.isatty():
        yield lambda steps=1, description=None: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(steps: float = 1, description: str | None = None) -> None:
            if description is not None:
                bar.update(task, description=description)
            bar.advance(task, steps)

        yield advance


def table(title: str, *columns: str, numbers: int = 0) -> Table:
    """A table whose last `numbers` columns are right-aligned."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i >= len(columns) - numbers else "left")
    return made


def seconds(value: float) -> str:
    """A duration with three significant digits and its unit."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def count(value: float) -> str:
    """A rate or a count with thousands separators."""
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes with three significant digits in binary units."""
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"
