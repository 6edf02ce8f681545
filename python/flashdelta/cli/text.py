"""Real text for the demo: a file that the user names, or documentation that lies at hand."""

from __future__ import annotations

import contextlib
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

from flashdelta.cli.errors import UsageError


def _checkout_docs() -> list[Path]:
    """This repository's own documentation, where the package runs from a checkout or is installed beside one."""
    roots = [Path(__file__).resolve().parents[3], Path.cwd()]
    for root in roots:
        if (root / "include" / "flashdelta" / "flashdelta.h").is_file() and (root / "README.md").is_file():
            return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]
    return []


def _package_text() -> tuple[str, bytes]:
    """What an installed package always has: its own description and sources."""
    parts = []
    with contextlib.suppress(metadata.PackageNotFoundError):
        parts.append((metadata.metadata("flashdelta").get_payload() or "").encode())
    parts += [path.read_bytes() for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py"))]
    return "the package's description and sources", b"\n".join(parts)


def load(path: str | None) -> tuple[str, bytes]:
    """(where it comes from, the bytes). `path` "-" reads standard input; None takes documentation at hand.

    Raises:
        UsageError: the file cannot be read or is empty.
    """
    if path is None:
        docs = [p for p in _checkout_docs() if p.is_file()]
        if docs:
            return "this repository's documentation", b"\n".join(p.read_bytes() for p in docs)
        return _package_text()
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"--text: cannot read {path}: {error.strerror}") from error
    if not data:
        raise UsageError(f"--text: {path} is empty")
    return path, data


def tokens(data: bytes, length: int) -> np.ndarray:
    """The first `length` bytes as tokens (uint8), the text repeated where it is shorter."""
    return np.resize(np.frombuffer(data, np.uint8), length)
