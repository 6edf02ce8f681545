"""Malformed calls through Python: the error's kind, the argument's name first, and a library that works afterwards."""

import math

import cases
import flashdelta
import ml_dtypes
import numpy as np
import pytest

CHUNK, RECURRENT = flashdelta.chunk_gated_delta_rule, flashdelta.fused_recurrent_gated_delta_rule
FWD, BWD = flashdelta.chunk_gated_delta_rule_fwd, flashdelta.chunk_gated_delta_rule_bwd
STATE = np.zeros((1, 4, 16, 24), np.float32)
RAW = {"use_gate_in_kernel": True}


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def read_only(array):
    array.flags.writeable = False
    return array


# (the argument that the text names, the error, what is wrong)
BAD = [
    ("q", TypeError, {"q": [[1.0]]}),
    ("q", TypeError, {"q": None}),
    ("q", TypeError, {"q": zeros(1, 70, 2, 16, dtype=np.uint16)}),
    ("q", TypeError, {"q": zeros(1, 70, 2, 16, dtype=np.int32)}),
    ("q", TypeError, {"q": zeros(1, 70, 2, 16, dtype=np.complex64)}),
    ("q", TypeError, {"q": zeros(1, 70, 2, 16, dtype=">f4")}),
    ("q", TypeError, {"q": zeros(1, 70, 2, 16, dtype=object)}),
    ("q", TypeError, {"q": zeros(1, 70, 2, 16, dtype=ml_dtypes.float8_e4m3fn)}),
    ("q", TypeError, {"q": zeros(1, 70, 2, 16, dtype=np.float64), "backend": "cpu"}),
    ("q", ValueError, {"q": zeros(70, 2, 16)}),
    ("q", ValueError, {"q": zeros(1, 70, 2, 32)[..., ::2]}),
    ("q", ValueError, {"q": zeros(1, 70, 0, 16)}),
    ("q", ValueError, {"q": zeros(1, 70, 8, 16)}),
    ("k", TypeError, {"k": None}),
    ("k", TypeError, {"k": zeros(1, 70, 2, 16, dtype=np.float16)}),
    ("k", ValueError, {"k": zeros(1, 70, 4, 16)}),
    ("k", ValueError, {"k": zeros(1, 71, 2, 16)}),
    ("k", ValueError, {"k": zeros(1, 70, 2, 17)}),
    ("v", TypeError, {"v": "values"}),
    ("v", TypeError, {"v": zeros(1, 70, 4, 24, dtype=np.int8)}),
    ("v", ValueError, {"v": zeros(70, 4, 24)}),
    ("v", ValueError, {"v": zeros(1, 70, 3, 24)}),
    ("v", ValueError, {"v": zeros(1, 70, 4, 0)}),
    ("g", TypeError, {"g": 0.5}),
    ("g", TypeError, {"g": zeros(1, 70, 4, dtype=np.int64)}),
    ("g", ValueError, {"g": zeros(1, 70, 2)}),
    ("g", ValueError, {"g": zeros(1, 70, 4, 16)}),
    ("g", ValueError, {"g": None, **RAW, "A_log": zeros(4)}),
    ("beta", TypeError, {"beta": zeros(1, 70, 4, dtype=bool)}),
    ("beta", ValueError, {"beta": zeros(1, 70, 4, 24)}),
    ("beta", ValueError, {"beta": None, "use_beta_sigmoid_in_kernel": True}),
    ("scale", TypeError, {"scale": "1"}),
    ("scale", ValueError, {"scale": math.nan}),
    ("scale", ValueError, {"scale": -math.inf}),
    ("scale", ValueError, {"scale": 10**400}),
    ("initial_state", TypeError, {"initial_state": STATE.astype(np.int32)}),
    ("initial_state", ValueError, {"initial_state": zeros(2, 4, 16, 24)}),
    ("initial_state", ValueError, {"initial_state": zeros(1, 4, 24, 16)}),
    ("initial_state", ValueError, {"initial_state": STATE, "state_v_first": True}),
    ("initial_state", ValueError, {"initial_state": STATE, "cu_seqlens": [0, 5, 70]}),
    ("cu_seqlens", TypeError, {"cu_seqlens": [0.0, 70.0]}),
    ("cu_seqlens", TypeError, {"cu_seqlens": 70}),
    ("cu_seqlens", TypeError, {"cu_seqlens": "all"}),
    ("cu_seqlens", TypeError, {"cu_seqlens": [[0, 1], [2]]}),
    ("cu_seqlens", TypeError, {"cu_seqlens": np.array([0, 70], np.int16)}),
    ("cu_seqlens", ValueError, {"cu_seqlens": []}),
    ("cu_seqlens", ValueError, {"cu_seqlens": [-1, 70]}),
    ("cu_seqlens", ValueError, {"cu_seqlens": [0, 71]}),
    ("cu_seqlens", ValueError, {"cu_seqlens": [0, 50, 20, 70]}),
    ("cu_seqlens", ValueError, {"cu_seqlens": [[0, 70]]}),
    ("A_log", ValueError, {**RAW}),
    ("A_log", ValueError, {"A_log": zeros(4)}),
    ("A_log", ValueError, {**RAW, "A_log": zeros(2)}),
    ("A_log", TypeError, {**RAW, "A_log": 1.0}),
    ("dt_bias", ValueError, {"dt_bias": zeros(4)}),
    ("dt_bias", ValueError, {**RAW, "A_log": zeros(4), "dt_bias": zeros(4, 1)}),
    ("use_qk_l2norm_in_kernel", TypeError, {"use_qk_l2norm_in_kernel": "yes"}),
    ("use_qk_l2norm_in_kernel", ValueError, {"use_qk_l2norm_in_kernel": 2}),
    ("allow_neg_eigval", ValueError, {"allow_neg_eigval": True}),
    ("context_parallel", ValueError, {"context_parallel": "always"}),
    ("context_parallel", TypeError, {"context_parallel": 1}),
    ("context_parallel_tolerance", ValueError, {"context_parallel_tolerance": 1.0}),
    ("context_parallel_tolerance", ValueError, {"context_parallel_tolerance": math.nan}),
    ("context_parallel_tolerance", TypeError, {"context_parallel_tolerance": "small"}),
    ("num_segments", ValueError, {"num_segments": 65}),
    ("num_segments", ValueError, {"num_segments": 2, "context_parallel": "off"}),
    ("num_segments", TypeError, {"num_segments": 1.5}),
    ("backend", ValueError, {"backend": "tpu"}),
    ("backend", ValueError, {"backend": "cuda"}),
    ("num_threads", ValueError, {"num_threads": -1}),
    ("num_threads", ValueError, {"num_threads": 2**40}),
    ("instruction_set", ValueError, {"instruction_set": "sse9"}),
    ("final_state_dtype", TypeError, {"final_state_dtype": "float31", "output_final_state": True}),
    ("final_state", TypeError, {"final_state_dtype": np.int32, "output_final_state": True}),
    ("final_state", ValueError, {"final_state": zeros(1, 4, 16, 25)}),
    ("final_state", ValueError, {"final_state": read_only(zeros(1, 4, 16, 24))}),
    ("o", ValueError, {"o": zeros(1, 70, 4, 23)}),
    ("o", TypeError, {"o": zeros(1, 70, 4, 24, dtype=np.float16), "backend": "cpu"}),
    ("o", TypeError, {"o": [0.0]}),
    ("q", ValueError, {"q": np.lib.stride_tricks.as_strided(zeros(9000), (1, 70, 2, 16), (6, 128, 64, 4))}),
]


@pytest.mark.parametrize("function", [CHUNK, RECURRENT], ids=("chunk", "recurrent"))
@pytest.mark.parametrize(("name", "kind", "wrong"), BAD, ids=range(len(BAD)))
def test_malformed_calls_name_the_argument(function, name, kind, wrong):
    x = {**cases.inputs(), "backend": "reference", **wrong}
    with pytest.raises(kind) as caught:
        function(**x)
    assert type(caught.value) is kind
    # Overlapping strides are harmless in an input; an unaligned one is refused under whatever words, but by name.
    assert str(caught.value).startswith(f"{name}:"), caught.value
    assert ";" in str(caught.value) or kind is TypeError or "(" in str(caught.value)
    function(**cases.inputs(T=3), backend="reference")


@pytest.mark.parametrize(
    ("function", "name", "kind", "wrong"),
    [
        (CHUNK, "chunk_size", ValueError, {"chunk_size": 128}),
        (CHUNK, "cp_context", ValueError, {"cp_context": object()}),
        (CHUNK, "checkpoint_chunks", ValueError, {"checkpoint_chunks": 65}),
        (RECURRENT, "gk", ValueError, {"gk": zeros(1, 70, 4, 16)}),
        (RECURRENT, "gv", ValueError, {"gv": zeros(1, 70, 4, 24)}),
        (RECURRENT, "initial_state", ValueError, {"inplace_state": True}),
        (RECURRENT, "final_state", ValueError, {"inplace_state": True, "initial_state": STATE, "final_state": STATE.copy()}),
        (RECURRENT, "final_state", ValueError, {"inplace_state": True, "initial_state": read_only(STATE.copy())}),
        (RECURRENT, "inplace_state", TypeError, {"inplace_state": "yes"}),
        (FWD, "k", ValueError, {"k": zeros(1, 70, 3, 16)}),
        (FWD, "segment_counts", ValueError, {"segment_counts": zeros(5, dtype=np.int32)}),
        (FWD, "segment_counts", ValueError, {"segment_counts": zeros(8, dtype=np.int32)[::2]}),
        (FWD, "segment_counts", ValueError, {"segment_counts": read_only(zeros(4, dtype=np.int32))}),
        (FWD, "segment_counts", TypeError, {"segment_counts": zeros(4, dtype=np.int64)}),
        (FWD, "segment_counts", TypeError, {"segment_counts": [0, 0, 0, 0]}),
        (BWD, "h", ValueError, {"backend": "cpu"}),
        (BWD, "h", ValueError, {"h": zeros(3, 4, 16, 24)}),
        (BWD, "h", ValueError, {"h": zeros(2, 4, 16, 24), "checkpoint_chunks": 2}),
        (BWD, "h", TypeError, {"h": zeros(2, 4, 16, 24, dtype=np.float16)}),
        (BWD, "A", ValueError, {"A": zeros(1, 70, 4, 32)}),
        (BWD, "g_cumsum", TypeError, {"g_cumsum": zeros(1, 70, 4, dtype=np.float16)}),
        (BWD, "do", ValueError, {"do": zeros(1, 70, 4, 16)}),
        (BWD, "do", TypeError, {"do": zeros(1, 70, 4, 24, dtype=np.int32)}),
        (BWD, "dht", ValueError, {"dht": zeros(2, 4, 16, 24)}),
    ],
)
def test_malformed_calls_of_one_function(function, name, kind, wrong):
    x = {**cases.inputs(), "backend": "reference", **({"do": zeros(1, 70, 4, 24)} if function is BWD else {}), **wrong}
    with pytest.raises(kind, match=rf"^{name}:"):
        function(**x)


def test_a_failed_call_writes_nothing():
    o, s = np.full((1, 70, 4, 24), 7, np.float32), np.full((1, 4, 16, 24), 7, np.float32)
    with pytest.raises(ValueError, match=r"^cu_seqlens:"):
        CHUNK(**cases.inputs(), o=o, final_state=s, cu_seqlens=[0, 71], backend="reference")
    assert (o == 7).all()
    assert (s == 7).all()


def test_more_query_heads_than_value_heads_is_refused_by_name():
    with pytest.raises(ValueError, match="more q heads than v heads"):
        CHUNK(**cases.inputs(H=4, HV=2), backend="reference")
