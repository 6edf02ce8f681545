"""The NumPy face: every argument reaches the operation, every dtype and stride passes, nothing is changed that must not be."""

import threading

import cases
import flashdelta
import ml_dtypes
import numpy as np
import pytest

BACKENDS = ("cpu", "reference")
FUNCTIONS = (flashdelta.chunk_gated_delta_rule, flashdelta.fused_recurrent_gated_delta_rule)
TOLERANCE = {np.float32: 1e-5, np.float16: 1e-3, ml_dtypes.bfloat16: 5e-3}

anything = pytest.mark.parametrize("function", FUNCTIONS, ids=("chunk", "recurrent"))
anywhere = pytest.mark.parametrize("backend", BACKENDS)


@anything
@anywhere
@pytest.mark.parametrize(
    ("flags", "meaning"),
    [
        ({}, {}),
        ({"scale": 0.3}, {"scale": 0.3}),
        ({"scale": 0}, {"scale": 0}),
        ({"g": None}, {"g": None}),
        ({"beta": None}, {"beta": None}),
        ({"use_qk_l2norm_in_kernel": True}, {"l2norm": True}),
        ({"use_beta_sigmoid_in_kernel": True}, {"logits": True}),
        ({"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}, {"logits": True, "twice": True}),
        ({"use_gate_in_kernel": True, "A_log": "A"}, {"A_log": "A"}),
        ({"use_gate_in_kernel": True, "A_log": "A", "dt_bias": "d"}, {"A_log": "A", "dt_bias": "d"}),
        ({"context_parallel": "exact", "num_segments": 2}, {}),
        ({"context_parallel": "off"}, {}),
        ({"context_parallel": "auto", "context_parallel_tolerance": 1e-7, "batch_invariant": True, "num_threads": 1}, {}),
        ({"instruction_set": "baseline"}, {}),
    ],
    ids=str,
)
def test_every_option_means_what_the_recurrence_says(function, backend, flags, meaning):
    extra = {"A": np.linspace(-2, 0, 4, dtype=np.float32), "d": np.linspace(-1, 1, 4, dtype=np.float32)}
    flags, meaning = ({k: extra.get(v, v) if isinstance(v, str) else v for k, v in d.items()} for d in (flags, meaning))
    x = cases.inputs(B=2)
    h0 = cases.state(N=2)
    o, s = function(**(x | flags), initial_state=h0, output_final_state=True, backend=backend)
    expected_o, expected_s = cases.recurrence(**(x | meaning), initial_state=h0)
    assert o.shape == x["v"].shape
    assert (o.dtype, s.dtype) == (np.float32, np.float32)
    assert cases.relative_error(o, expected_o) < 1e-5
    assert cases.relative_error(s, expected_s) < 1e-5


@anything
@anywhere
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: np.dtype(d).name)
def test_every_dtype_passes_read_only(function, backend, dtype):
    x = cases.inputs(dtype=dtype)
    x["g"], x["beta"] = x["g"].astype(dtype), x["beta"].astype(dtype)
    for array in x.values():
        array.flags.writeable = False
    o, s = function(**x, output_final_state=True, backend=backend)
    expected_o, expected_s = cases.recurrence(**x)
    assert o.dtype == dtype
    assert s.dtype == np.float32
    assert cases.relative_error(o, expected_o) < TOLERANCE[dtype]
    assert cases.relative_error(s, expected_s) < TOLERANCE[dtype]


@anything
def test_float64_goes_through_the_reference(function):
    x = cases.inputs(dtype=np.float64)
    o, s = function(**x, output_final_state=True, backend="reference")
    expected_o, expected_s = cases.recurrence(**x)
    assert (o.dtype, s.dtype) == (np.float64, np.float64)
    assert cases.relative_error(o, expected_o) < 1e-13
    assert cases.relative_error(s, expected_s) < 1e-13


@anything
@anywhere
def test_strided_views_give_the_same_bits(function, backend):
    x = cases.inputs(B=2, H=4)
    packed = np.concatenate([x["q"], x["k"]], axis=-1)
    gates = np.stack([x["g"], x["beta"]], axis=-1)
    views = {
        "q": packed[..., :16],
        "k": packed[..., 16:],
        "v": np.ascontiguousarray(x["v"].transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3),
        "g": gates[..., 0],
        "beta": gates[..., 1],
    }
    for name, view in views.items():
        assert not view.flags.c_contiguous, name
    for a, b in zip(
        function(**views, output_final_state=True, backend=backend), function(**x, output_final_state=True, backend=backend), strict=True
    ):
        assert np.array_equal(a, b)


@anything
@anywhere
@pytest.mark.parametrize(
    "make", [list, tuple, lambda c: np.array(c, np.int32), lambda c: np.array(c, np.int64)], ids=("list", "tuple", "int32", "int64")
)
def test_every_kind_of_cu_seqlens(function, backend, make):
    offsets = [3, 3, 20, 64, 64]  # tokens before and after every sequence, empty ones among them
    x, h0 = cases.inputs(), cases.state(N=4)
    o, s = function(**x, initial_state=h0, output_final_state=True, cu_seqlens=make(offsets), backend=backend)
    expected_o, expected_s = cases.recurrence(**x, initial_state=h0, cu_seqlens=offsets)
    assert cases.relative_error(o, expected_o) < 1e-5
    assert cases.relative_error(s, expected_s) < 1e-5
    assert not o[:, :3].any()
    assert not o[:, 64:].any()
    assert np.array_equal(s[0], h0[0])


@anything
@anywhere
def test_a_cpu_torch_tensor_serves_as_cu_seqlens(function, backend):
    torch = pytest.importorskip("torch")
    x = cases.inputs()
    o, _ = function(**x, cu_seqlens=torch.tensor([0, 30, 70]), backend=backend)
    assert np.array_equal(o, function(**x, cu_seqlens=[0, 30, 70], backend=backend)[0])


@anything
@anywhere
def test_state_v_first_is_the_transposed_layout(function, backend):
    x, h0 = cases.inputs(), cases.state()
    o, s = function(**x, initial_state=h0, output_final_state=True, backend=backend)
    turned = np.ascontiguousarray(h0.swapaxes(2, 3))
    o_v, s_v = function(**x, initial_state=turned, output_final_state=True, state_v_first=True, backend=backend)
    assert np.array_equal(o, o_v)
    assert np.array_equal(s, s_v.swapaxes(2, 3))


@anything
@anywhere
def test_without_output_final_state_there_is_none(function, backend):
    assert function(**cases.inputs(), backend=backend)[1] is None


@anything
@anywhere
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=lambda d: np.dtype(d).name)
def test_final_state_dtype(function, backend, dtype):
    x = cases.inputs()
    _, s = function(**x, output_final_state=True, final_state_dtype=dtype, backend=backend)
    assert s.dtype == dtype
    assert cases.relative_error(s, cases.recurrence(**x)[1]) < 4e-3


@anything
@anywhere
def test_the_callers_buffers_are_written_completely_and_returned(function, backend):
    x = cases.inputs()
    o, s = np.full_like(x["v"], np.nan), np.full((1, 4, 16, 24), np.nan, ml_dtypes.bfloat16)
    got_o, got_s = function(**x, o=o, final_state=s, cu_seqlens=[0, 60], backend=backend)
    assert got_o is o
    assert got_s is s
    expected_o, expected_s = cases.recurrence(**x, cu_seqlens=[0, 60])
    assert cases.relative_error(o, expected_o) < 1e-5
    assert cases.relative_error(s, expected_s) < 4e-3


@anywhere
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=lambda d: np.dtype(d).name)
def test_inplace_state_is_the_out_of_place_state(backend, dtype):
    x = cases.inputs(B=3, T=2)
    state = cases.state(N=3, dtype=dtype)
    expected_o, expected_s = flashdelta.fused_recurrent_gated_delta_rule(
        **x, initial_state=state.copy(), output_final_state=True, final_state_dtype=dtype, backend=backend
    )
    o, s = flashdelta.fused_recurrent_gated_delta_rule(**x, initial_state=state, inplace_state=True, backend=backend)
    assert s is state
    assert np.array_equal(o, expected_o)
    assert np.array_equal(s, expected_s)


@anything
@anywhere
def test_inputs_are_never_changed(function, backend):
    x = cases.inputs() | {"initial_state": cases.state(N=2), "cu_seqlens": np.array([0, 33, 70])}
    before = {name: array.copy() for name, array in x.items()}
    function(**x, output_final_state=True, backend=backend)
    for name, array in x.items():
        assert np.array_equal(array, before[name]), name


@anything
@anywhere
@pytest.mark.parametrize("shape", [{"T": 0}, {"B": 0}, {"B": 0, "T": 0}], ids=str)
def test_empty_calls(function, backend, shape):
    x = cases.inputs(**shape)
    n = x["q"].shape[0]
    h0 = cases.state(N=n)
    o, s = function(**x, initial_state=h0, output_final_state=True, backend=backend)
    assert o.shape == x["v"].shape
    assert np.array_equal(s, h0)


@anything
@anywhere
def test_no_sequences_at_all(function, backend):
    x = cases.inputs(T=7)
    o, s = function(**x, cu_seqlens=[7], output_final_state=True, backend=backend)
    assert not o.any()
    assert s.shape == (0, 4, 16, 24)


def test_the_cpu_backward_works_from_saved_tensors_alone():
    x, h0 = cases.inputs(), cases.state()
    do, dht = np.ones_like(x["v"]), np.ones_like(h0)
    forward = flashdelta.chunk_gated_delta_rule_fwd(
        **x, initial_state=h0, output_h=True, output_g_cumsum=True, output_A=True, backend="cpu"
    )
    assert forward.h.shape == (70 // 64 + 1, 4, 16, 24)
    assert forward.A.shape == (1, 70, 4, 64)
    expected = np.concatenate([np.cumsum(x["g"][:, :64], axis=1), np.cumsum(x["g"][:, 64:], axis=1)], axis=1)
    assert cases.relative_error(forward.g_cumsum, expected) < 1e-6
    saved = {"h": forward.h, "g_cumsum": forward.g_cumsum, "A": forward.A}
    gradients = flashdelta.chunk_gated_delta_rule_bwd(**x, do=do, dht=dht, initial_state=h0, **saved, backend="cpu")
    oracle = flashdelta.chunk_gated_delta_rule_bwd(**x, do=do, dht=dht, initial_state=h0, backend="reference")
    for name in ("dq", "dk", "dv", "dg", "dbeta", "dh0"):
        assert cases.relative_error(getattr(gradients, name), getattr(oracle, name)) < 1e-4, name
    assert gradients.dA_log is None
    assert gradients.ddt_bias is None


def test_low_level_forward_gives_only_what_is_asked_for():
    out = flashdelta.chunk_gated_delta_rule_fwd(**cases.inputs(), output_final_state=False, backend="reference")
    assert (out.g_cumsum, out.A, out.h, out.final_state) == (None,) * 4


def test_segment_counts():
    x = cases.inputs(T=700)  # eleven chunks, four heads
    counts = np.full(4, -1, np.int32)
    for options, expected in (
        ({"context_parallel": "off"}, (4, 0, 0, 0)),
        ({"context_parallel": "exact", "num_segments": 3}, (12, 0, 8, 0)),
        ({"context_parallel": "exact", "num_segments": 3, "backend": "reference"}, (4, 0, 0, 0)),
    ):
        flashdelta.chunk_gated_delta_rule_fwd(**x, **options, segment_counts=counts)
        assert tuple(counts) == expected
    x["g"][:] = -1000
    flashdelta.chunk_gated_delta_rule_fwd(**x, num_segments=3, segment_counts=counts)
    assert tuple(counts) == (12, 4, 4, 4)


def test_the_default_tolerance_is_that_of_the_dtype():
    x = cases.inputs(T=700)
    x["g"][:] = -12 / 64  # exp(-12) over a chunk lies between 1e-5 and 1e-6
    counts = np.empty(4, np.int32)
    for dtype, chunks in ((np.float32, 8), (np.float16, 4)):
        narrow = {name: value.astype(dtype) if name in ("q", "k", "v") else value for name, value in x.items()}
        flashdelta.chunk_gated_delta_rule_fwd(**narrow, num_segments=3, use_qk_l2norm_in_kernel=True, segment_counts=counts)
        assert tuple(counts) == (12, 4, 4, chunks)


@anywhere
def test_threads_of_the_caller(backend):
    x = [cases.inputs(seed) for seed in range(8)]
    expected = [flashdelta.chunk_gated_delta_rule(**y, backend=backend)[0] for y in x]
    found = [None] * 8

    def work(i):
        for _ in range(5):
            found[i] = flashdelta.chunk_gated_delta_rule(**x[i], backend=backend)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)


def test_info_names_backends_and_version():
    info = flashdelta.info()
    assert {"cpu", "reference"} <= set(info["backends"])
    assert info["version"].count(".") == 2
