"""The package under test: the installed one, else python/ of this checkout with the library that $FLASHDELTA_LIBRARY names."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
if importlib.util.find_spec("flashdelta") is None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "python"))


@pytest.fixture
def run_python():
    """Runs a program text in a fresh interpreter that finds the same package; gives its standard output."""
    import flashdelta

    def run(text: str, **environment: str) -> str:
        paths = [str(Path(flashdelta.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
        done = subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
