"""The drop-in promise: flash-linear-attention 0.6.0's names, order and defaults, written out."""

import inspect
import warnings

import cases
import flashdelta
import numpy as np
import pytest

REQUIRED = inspect.Parameter.empty

CHUNK = (
    ("q", REQUIRED),
    ("k", REQUIRED),
    ("v", REQUIRED),
    ("g", REQUIRED),
    ("beta", REQUIRED),
    ("scale", None),
    ("initial_state", None),
    ("output_final_state", False),
    ("use_qk_l2norm_in_kernel", False),
    ("use_beta_sigmoid_in_kernel", False),
    ("allow_neg_eigval", False),
    ("state_v_first", False),
    ("cu_seqlens", None),
    ("cu_seqlens_cpu", None),
    ("chunk_indices", None),
    ("cp_context", None),
)
CHUNK_KEYWORDS = ("use_gate_in_kernel", "A_log", "dt_bias", "chunk_size", "transpose_state_layout", "head_first")
RECURRENT = (
    ("q", REQUIRED),
    ("k", REQUIRED),
    ("v", REQUIRED),
    ("g", None),
    ("gk", None),
    ("gv", None),
    ("beta", None),
    ("scale", None),
    ("initial_state", None),
    ("output_final_state", False),
    ("use_qk_l2norm_in_kernel", False),
    ("use_gate_in_kernel", False),
    ("A_log", None),
    ("dt_bias", None),
    ("use_beta_sigmoid_in_kernel", False),
    ("allow_neg_eigval", False),
    ("state_v_first", False),
    ("cu_seqlens", None),
)
OWN_OPTIONS = (
    ("context_parallel", "auto"),
    ("context_parallel_tolerance", None),
    ("num_segments", 0),
    ("batch_invariant", False),
    ("backend", "auto"),
    ("num_threads", 0),
    ("instruction_set", "best"),
)

FACES = {flashdelta.chunk_gated_delta_rule: CHUNK, flashdelta.fused_recurrent_gated_delta_rule: RECURRENT}


@pytest.mark.parametrize("function", FACES, ids=lambda f: f.__name__)
def test_positional_arguments_are_the_fields(function):
    parameters = inspect.signature(function).parameters.values()
    positional = tuple((p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    assert positional == FACES[function]


@pytest.mark.parametrize("function", FACES, ids=lambda f: f.__name__)
def test_own_options_are_keyword_only(function):
    parameters = inspect.signature(function).parameters
    for name, default in OWN_OPTIONS:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == default


def test_what_the_field_takes_by_kwargs_is_named_for_callers_that_filter():
    assert set(CHUNK_KEYWORDS) <= set(inspect.signature(flashdelta.chunk_gated_delta_rule).parameters)
    assert {"transpose_state_layout", "head_first"} <= set(inspect.signature(flashdelta.fused_recurrent_gated_delta_rule).parameters)


@pytest.mark.parametrize("name", flashdelta.__all__)
def test_everything_public_has_a_docstring(name):
    assert getattr(flashdelta, name).__doc__


@pytest.mark.parametrize(
    "function",
    [
        flashdelta.chunk_gated_delta_rule,
        flashdelta.fused_recurrent_gated_delta_rule,
        flashdelta.chunk_gated_delta_rule_fwd,
        flashdelta.chunk_gated_delta_rule_bwd,
    ],
    ids=lambda f: f.__name__,
)
def test_docstrings_describe_every_argument(function):
    for parameter in inspect.signature(function).parameters:
        assert f"        {parameter}: " in function.__doc__ or f"        **{parameter}: " in function.__doc__, parameter


def both(**more):
    x = cases.inputs(T=5) | more
    return [
        flashdelta.chunk_gated_delta_rule(**x, backend="reference"),
        flashdelta.fused_recurrent_gated_delta_rule(**x, backend="reference"),
    ]


def test_documented_no_ops_pass():
    plain, noted = both(), both(cu_seqlens_cpu=np.array([0, 5]), chunk_indices=np.zeros((1, 2)))
    for (o, _), (expected, _) in zip(noted, plain, strict=True):
        assert np.array_equal(o, expected)


@pytest.mark.parametrize("chunk_size", [None, 16, 32, 64])
def test_chunk_size_does_not_change_the_result(chunk_size):
    x = cases.inputs()
    o, _ = flashdelta.chunk_gated_delta_rule(**x, chunk_size=chunk_size, backend="reference")
    assert np.array_equal(o, flashdelta.chunk_gated_delta_rule(**x, backend="reference")[0])


def test_unknown_keyword_of_none_passes_and_of_a_value_does_not():
    both(some_future_option=None)
    for function in FACES:
        with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got an unexpected keyword argument 'some_future_option'"):
            function(**cases.inputs(T=5), some_future_option=1)


def test_head_first_raises_for_chunk_and_is_ignored_by_recurrent():
    x = cases.inputs(T=5)
    for value in (True, False):
        with pytest.raises(DeprecationWarning, match="head_first"):
            flashdelta.chunk_gated_delta_rule(**x, head_first=value)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            flashdelta.fused_recurrent_gated_delta_rule(**x, head_first=value, backend="reference")


@pytest.mark.parametrize("function", FACES, ids=lambda f: f.__name__)
def test_transpose_state_layout_warns_and_means_state_v_first(function):
    x = cases.inputs(T=5) | {"output_final_state": True, "backend": "reference"}
    with pytest.warns(DeprecationWarning, match="state_v_first") as seen:
        _, renamed = function(**x, transpose_state_layout=True)
    assert seen[0].filename == __file__
    assert np.array_equal(renamed, function(**x, state_v_first=True)[1])
    with pytest.raises(ValueError, match="state_v_first"):
        function(**x, state_v_first=True, transpose_state_layout=True)


def test_positional_calls_work():
    x = cases.inputs(T=5)
    h0 = cases.state()
    o, s = flashdelta.chunk_gated_delta_rule(
        *x.values(), 0.5, h0, True, True, True, True, False, [0, 5], None, None, None, backend="reference"
    )
    expected = flashdelta.chunk_gated_delta_rule(
        **x,
        scale=0.5,
        initial_state=h0,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True,
        cu_seqlens=[0, 5],
        backend="reference",
    )
    assert np.array_equal(o, expected[0])
    assert np.array_equal(s, expected[1])


def test_version_is_the_librarys():
    assert flashdelta.__version__ == flashdelta.info()["version"]
