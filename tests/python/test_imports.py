"""What importing and using the package brings along."""

import os

import pytest

NUMPY_USE = """
import numpy as np
import flashdelta
x = np.ones((1, 3, 1, 4), np.float32)
o, _ = flashdelta.chunk_gated_delta_rule(x, x, x, None, None, backend="reference")
r, _ = flashdelta.fused_recurrent_gated_delta_rule(x, x, x, backend="reference")
h = flashdelta.chunk_gated_delta_rule_bwd(x, x, x, None, None, o, backend="reference")
assert np.isfinite(o).all() and np.array_equal(o, r) and np.isfinite(h.dq).all()
flashdelta.info()
"""


def test_numpy_use_imports_no_torch(run_python):
    assert run_python(NUMPY_USE + "import sys; print('torch' in sys.modules)").strip() == "False"


def test_works_where_torch_is_not_installed(run_python):
    run_python("import sys; sys.modules['torch'] = None\n" + NUMPY_USE)


def test_works_where_ml_dtypes_is_not_imported(run_python):
    assert run_python(NUMPY_USE + "import sys; print('ml_dtypes' in sys.modules)").strip() == "False"


def test_a_torch_argument_after_numpy_use_works(run_python):
    pytest.importorskip("torch")
    run_python(
        NUMPY_USE + "import torch\nt = torch.ones(1, 3, 1, 4)\n"
        "p, _ = flashdelta.chunk_gated_delta_rule(t, t, t, None, None, backend='reference')\n"
        "assert np.array_equal(p.numpy(), o)"
    )


def test_operators_are_there_from_the_start_where_torch_is_loaded(run_python):
    pytest.importorskip("torch")
    program = "import sys, torch, flashdelta; print('flashdelta._torch' in sys.modules, hasattr(torch.ops.flashdelta, 'chunk_forward'))"
    assert run_python(program).split() == ["True", "True"]


def test_package_imports_where_torch_is_loaded_and_the_library_is_missing(run_python):
    pytest.importorskip("torch")
    run_python("import torch, flashdelta", FLASHDELTA_LIBRARY=os.path.join(os.sep, "nowhere", "libflashdelta_ffi.so"))


def test_missing_library_is_an_import_error_that_says_what_to_do(run_python):
    program = """
import flashdelta
try:
    flashdelta.info()
except ImportError as error:
    print(error)
"""
    text = run_python(program, FLASHDELTA_LIBRARY=os.path.join(os.sep, "nowhere", "libflashdelta_ffi.so"))
    assert "/nowhere/libflashdelta_ffi.so does not exist" in text
    assert "FLASHDELTA_LIBRARY" in text


def test_package_is_typed():
    from pathlib import Path

    import flashdelta

    assert Path(flashdelta.__file__).with_name("py.typed").exists()
