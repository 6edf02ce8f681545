#!/usr/bin/env python3
"""Prints the hash of everything that decides what the GPU tests test.

It covers path and content of every file in src/cuda, include and tests/gpu (the record and texts, *.md, aside), sorted by path, so that it
depends neither on git nor on the order in which a file system lists them. The build compiles it into flashdelta_gpu_tests, and
tools/check_gpu_record.py compares it with the one in tests/gpu/record.json.
"""

import argparse
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("include", "src/cuda", "tests/gpu")
RECORD = "tests/gpu/record.json"


def gpu_source_hash(root: Path = ROOT) -> str:
    """Hex SHA-256 over (path, length, content) of every hashed file below `root`."""
    paths = [path.relative_to(root) for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file()]
    # Editors' and systems' leftovers are no sources; they start with a dot or end with a tilde.
    sources = (p for p in paths if p.suffix != ".md" and not any(part.startswith(".") or part.endswith("~") for part in p.parts))
    names = sorted(p.as_posix() for p in sources)
    digest = hashlib.sha256()
    for name in names:
        if name == RECORD:
            continue
        content = (root / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def write_header(path: Path, value: str) -> None:
    """Writes a C++ header with the hash; leaves an equal file alone, so that nothing is rebuilt for it."""
    text = f'#pragma once\n\ninline constexpr char kGpuSourceHash[] = "{value}";\n'
    if path.is_file() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Hash of the CUDA sources and their tests.")
    parser.add_argument("--header", type=Path, help="write a C++ header that holds it, instead of printing it")
    arguments = parser.parse_args()
    value = gpu_source_hash()
    if arguments.header:
        write_header(arguments.header, value)
    else:
        print(value)


if __name__ == "__main__":
    main()
