#!/usr/bin/env python3
"""Prepares the CUDA compiler of the nvidia-cuda-* Python packages for use from CMake, and prints the path of its nvcc.

The packages of one CUDA release share the folder nvidia/cuNN of site-packages: bin/nvcc with its helpers, nvvm/, include/ and lib/. nvcc
looks for its libraries in lib64, which the packages lack, so a link is made. Run it with the Python that has the packages.
"""

import argparse
import os
import stat
import sys
import sysconfig
from pathlib import Path


def prepare(site_packages: Path) -> Path:
    """Returns the path of a working nvcc below `site_packages`; raises FileNotFoundError naming what is missing."""
    toolkits = sorted(site_packages.glob("nvidia/cu[0-9]*/bin/nvcc"))
    if not toolkits:
        raise FileNotFoundError(f"{site_packages}/nvidia/cu*/bin/nvcc")
    nvcc = toolkits[-1]
    root = nvcc.parent.parent
    for needed in (
        "bin/ptxas",
        "nvvm/bin/cicc",
        "include/cuda_runtime.h",
        "include/crt/host_config.h",
        "include/cccl/nv/target",
        "lib/libcudart_static.a",
    ):
        if not (root / needed).exists():
            raise FileNotFoundError(root / needed)
    if not (root / "lib64").exists():
        (root / "lib64").symlink_to("lib")
    for folder in (root / "bin", root / "nvvm/bin"):
        for program in folder.iterdir():
            if program.is_file() and not os.access(program, os.X_OK):
                program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return nvcc


def main() -> int:
    parser = argparse.ArgumentParser(description="Prepare the CUDA compiler of the Python packages and print where its nvcc is.")
    parser.add_argument("--site-packages", type=Path, default=Path(sysconfig.get_paths()["platlib"]))
    try:
        print(prepare(parser.parse_args().site_packages))
    except FileNotFoundError as error:
        print(f"error: the CUDA compiler's Python packages are incomplete: {error} is missing", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
