"""The torch face: the same bits as NumPy's, gradients against the float64 oracle, and a caller's every mode."""

import threading

import cases
import flashdelta
import numpy as np
import pytest

torch = pytest.importorskip("torch")

CHUNK, RECURRENT = flashdelta.chunk_gated_delta_rule, flashdelta.fused_recurrent_gated_delta_rule
FUNCTIONS = (CHUNK, RECURRENT)
LEAVES = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# algebra's contract for dq, dk, dv, dh0; and for dbeta, dg and what derives from it
GRADIENT_TOLERANCE = {torch.float32: (5e-5, 1e-4), torch.float16: (3e-3, 6e-3), torch.bfloat16: (8e-3, 1.5e-2)}

anything = pytest.mark.parametrize("function", FUNCTIONS, ids=("chunk", "recurrent"))
anywhere = pytest.mark.parametrize("backend", ("cpu", "reference"))

FLAGS = (
    {},
    {"scale": 0.3},
    {"g": None},
    {"beta": None},
    {"use_qk_l2norm_in_kernel": True},
    {"use_beta_sigmoid_in_kernel": True},
    {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True},
    {"use_gate_in_kernel": True},
    {"use_gate_in_kernel": True, "dt_bias": None},
    {"state_v_first": True},
    {"cu_seqlens": [2, 30, 30, 68]},
    {"checkpoint_chunks": 2},
    {"initial_state": None},
    {"context_parallel": "exact", "num_segments": 2},
)


def tensors(flags=None, dtype=torch.float32, **shape):
    """Arguments as tensors, leaves recorded. The flags complete them: gates get their parameters, states one per sequence."""
    flags = dict(flags or {})
    x = cases.with_flags(flags, **shape)
    if flags.get("state_v_first"):
        x["initial_state"] = np.ascontiguousarray(x["initial_state"].swapaxes(2, 3))
    x = {name: torch.from_numpy(array) for name, array in x.items()}
    for name in ("q", "k", "v"):
        x[name] = x[name].to(dtype)
    return {name: value.requires_grad_() if torch.is_tensor(value) else value for name, value in (x | flags).items()}


def doubled(x):
    return {
        name: value.detach().double().requires_grad_(value.requires_grad) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in x.items()
    }


def detached(x):
    return {name: value.detach() if torch.is_tensor(value) else value for name, value in x.items()}


def gradients_of(x, o, s, seed=5):
    rng = torch.Generator().manual_seed(seed)
    weights = [torch.randn(y.shape, generator=rng, dtype=torch.float64) for y in (o, s)]
    loss = sum((y.double() * w).sum() for y, w in zip((o, s), weights, strict=True))
    leaves = [name for name in LEAVES if torch.is_tensor(x.get(name))]
    return dict(zip(leaves, torch.autograd.grad(loss, [x[name] for name in leaves]), strict=True))


@anything
@anywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_as_numpys(function, backend, dtype):
    x = detached(tensors(dtype=dtype))
    o, s = function(**x, output_final_state=True, backend=backend)
    assert (o.dtype, s.dtype) == (dtype, torch.float32)
    if dtype == torch.bfloat16:
        import ml_dtypes

        arrays = {name: y.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if y.dtype == dtype else y.numpy() for name, y in x.items()}
    else:
        arrays = {name: y.numpy() for name, y in x.items()}
    o_numpy, s_numpy = function(**arrays, output_final_state=True, backend=backend)
    assert np.array_equal(o.float().numpy(), o_numpy.astype(np.float32))
    assert np.array_equal(s.numpy(), s_numpy)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_gradient_on_the_cpu_is_the_oracles(flags, dtype):
    x = tensors(flags, dtype, B=1 if "cu_seqlens" in flags else 2)
    exact = doubled(x)
    found = gradients_of(x, *CHUNK(**x, output_final_state=True, backend="cpu"))
    expected = gradients_of(exact, *CHUNK(**exact, output_final_state=True, backend="reference"))
    matrices, gates = GRADIENT_TOLERANCE[dtype]
    for name, gradient in found.items():
        assert gradient.dtype == x[name].dtype, name
        tolerance = matrices if name in ("q", "k", "v", "initial_state") else gates
        assert cases.relative_error(gradient.float(), expected[name]) < tolerance, name


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_autograd_of_the_reference_is_the_numerical_derivative(flags):
    flags = dict(flags)
    if "cu_seqlens" in flags:
        flags["cu_seqlens"] = [1, 3, 3, 5]
    x = doubled(tensors(flags, T=6))
    leaves = {name: x.pop(name) for name in LEAVES if torch.is_tensor(x.get(name))}

    def call(*values):
        return CHUNK(**dict(zip(leaves, values, strict=True)), **x, output_final_state=True, backend="reference")

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)


@anywhere
@pytest.mark.parametrize("through", ["o", "final_state"])
def test_gradients_flow_through_either_output_alone(backend, through):
    x = tensors()
    o, s = CHUNK(**x, output_final_state=True, backend=backend)
    (o if through == "o" else s).square().sum().backward()
    exact = doubled(x)
    o, s = CHUNK(**exact, output_final_state=True, backend="reference")
    (o if through == "o" else s).square().sum().backward()
    for name in ("q", "k", "v", "g", "beta", "initial_state"):
        if through == "final_state" and name == "q":
            assert not x[name].grad.any()
        else:
            assert cases.relative_error(x[name].grad, exact[name].grad) < 1e-4, name


@anywhere
@pytest.mark.parametrize("alone", ["q", "g", "initial_state"])
def test_only_the_wanted_gradients_are_made(backend, alone):
    x = {name: y.requires_grad_(name == alone) for name, y in detached(tensors()).items()}
    everything = tensors()
    for y in (x, everything):
        CHUNK(**y, backend=backend)[0].sum().backward()
    assert torch.equal(x[alone].grad, everything[alone].grad)
    assert [name for name, y in x.items() if y.grad is not None] == [alone]


@anywhere
def test_backward_runs_again_with_the_same_bits(backend):
    x = tensors()
    o, s = CHUNK(**x, output_final_state=True, backend=backend)
    loss = o.sum() + s.sum()
    leaves = [x[name] for name in LEAVES if name in x]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@anywhere
def test_a_second_derivative_is_refused_clearly(backend):
    x = tensors()
    (dq,) = torch.autograd.grad(CHUNK(**x, backend=backend)[0].sum(), [x["q"]], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dq.sum().backward()


@anywhere
def test_recurrent_has_no_gradient_and_says_so(backend):
    o, _ = RECURRENT(**tensors(), backend=backend)
    with pytest.raises(RuntimeError, match="use chunk_gated_delta_rule for training"):
        o.sum().backward()


@anywhere
def test_non_leaf_inputs_and_expanded_gradients(backend):
    x = tensors()
    scaled = x | {"q": x["q"] * 2, "v": x["v"].transpose(1, 2).contiguous().transpose(1, 2)}
    CHUNK(**scaled, backend=backend)[0].sum().backward()  # the gradient of a sum is one element, expanded
    exact = doubled(x)
    CHUNK(**(exact | {"q": exact["q"] * 2}), backend="reference")[0].sum().backward()
    for name in ("q", "v"):
        assert cases.relative_error(x[name].grad, exact[name].grad) < 1e-4


@anything
@anywhere
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_recording(function, backend, mode):
    x = tensors()
    with mode():
        o, s = function(**x, output_final_state=True, backend=backend)
    assert not o.requires_grad
    assert not s.requires_grad
    assert torch.equal(o, function(**x, backend=backend)[0])


@anywhere
def test_activation_checkpointing(backend):
    from torch.utils.checkpoint import checkpoint

    x, y = tensors(), tensors()
    CHUNK(**x, backend=backend)[0].sum().backward()
    checkpoint(lambda: CHUNK(**y, backend=backend)[0], use_reentrant=False).sum().backward()
    assert torch.equal(x["k"].grad, y["k"].grad)


@anything
@anywhere
def test_a_default_dtype_and_device_of_the_caller(function, backend):
    x = detached(tensors()) | {"cu_seqlens": [0, 70], "output_final_state": True}
    expected = function(**x, backend=backend)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found = function(**x, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert [y.dtype for y in found] == [torch.float32] * 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@anything
@anywhere
@pytest.mark.parametrize(
    "make",
    [
        list,
        lambda c: torch.tensor(c, dtype=torch.int32),
        lambda c: torch.tensor(c, dtype=torch.int64),
        lambda c: np.array(c, np.int32),
        lambda c: torch.tensor(c).repeat_interleave(2)[::2],
    ],
    ids=("list", "int32", "int64", "numpy", "strided"),
)
def test_every_kind_of_cu_seqlens(function, backend, make):
    x = detached(tensors({"cu_seqlens": [3, 3, 20, 64, 64]}))
    offsets = x.pop("cu_seqlens")
    o, _ = function(**x, cu_seqlens=make(offsets), backend=backend)
    expected, _ = cases.recurrence(**{name: y.numpy() for name, y in x.items()}, cu_seqlens=offsets)
    assert cases.relative_error(o, expected) < 1e-5


@anything
@anywhere
def test_slices_of_a_packed_projection_give_the_same_bits(function, backend):
    x = detached(tensors())
    packed = torch.cat([x["q"].flatten(2), x["k"].flatten(2), x["v"].flatten(2)], -1)
    q, k, v = packed.split([32, 32, 96], -1)
    views = x | {"q": q.unflatten(-1, (2, 16)), "k": k.unflatten(-1, (2, 16)), "v": v.unflatten(-1, (4, 24))}
    assert torch.equal(function(**views, backend=backend)[0], function(**x, backend=backend)[0])


@anything
@anywhere
def test_the_callers_buffers(function, backend):
    x = tensors()
    with torch.no_grad():
        o, s = torch.full_like(x["v"], torch.nan), torch.full_like(x["initial_state"], torch.nan)
        got = function(**x, o=o, final_state=s, backend=backend)
        expected = function(**x, output_final_state=True, backend=backend)
    assert got[0] is o
    assert got[1] is s
    assert torch.equal(o, expected[0])
    assert torch.equal(s, expected[1])
    with pytest.raises(RuntimeError, match=r"^o: "):
        function(**x, o=o, backend=backend)
    with pytest.raises(RuntimeError, match=r"^final_state: "):
        function(**x, final_state=s, backend=backend)


@anywhere
def test_inplace_state(backend):
    x = detached(tensors(B=2, T=1))
    expected = RECURRENT(**x, output_final_state=True, backend=backend)
    state = x["initial_state"]
    o, s = RECURRENT(**x, inplace_state=True, backend=backend)
    assert s is state
    assert torch.equal(o, expected[0])
    assert torch.equal(s, expected[1])
    with pytest.raises(RuntimeError, match=r"^inplace_state: "):
        RECURRENT(**tensors(B=2, T=1), inplace_state=True, backend=backend)


@anything
@anywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_final_state_dtype(function, backend, dtype):
    _, s = function(**detached(tensors()), output_final_state=True, final_state_dtype=dtype, backend=backend)
    assert s.dtype == dtype


@anything
@anywhere
@pytest.mark.parametrize("shape", [{"T": 0}, {"B": 0}], ids=str)
def test_empty_calls(function, backend, shape):
    x = detached(tensors(**shape))
    o, s = function(**x, output_final_state=True, backend=backend)
    assert o.shape == x["v"].shape
    assert torch.equal(s, x["initial_state"])


@anywhere
@pytest.mark.parametrize("shape", [{"T": 0}, {"B": 0}], ids=str)
def test_gradients_of_empty_calls(backend, shape):
    x = tensors(**shape)
    o, s = CHUNK(**x, output_final_state=True, backend=backend)
    (o.sum() + s.sum()).backward()
    assert torch.equal(x["initial_state"].grad, torch.ones_like(s))


@anywhere
def test_threads_of_the_caller(backend):
    x = [tensors(seed=i) for i in range(4)]
    y = [tensors(seed=i) for i in range(4)]

    def work(z):
        for _ in range(3):
            CHUNK(**z, backend=backend)[0].sum().backward()

    for z in x:
        work(z)
    threads = [threading.Thread(target=work, args=(z,)) for z in y]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(x, y, strict=True):
        assert torch.equal(a["q"].grad, b["q"].grad)


def test_low_level_calls_take_tensors_too():
    x = detached(tensors())
    forward = flashdelta.chunk_gated_delta_rule_fwd(**x, output_h=True, output_g_cumsum=True, output_A=True, backend="cpu")
    do, dht = torch.ones_like(forward.o), torch.ones_like(forward.final_state)
    found = flashdelta.chunk_gated_delta_rule_bwd(**x, do=do, dht=dht, h=forward.h, A=forward.A, g_cumsum=forward.g_cumsum, backend="cpu")
    y = tensors()
    o, s = CHUNK(**y, output_final_state=True, backend="cpu")
    (o.sum() + s.sum()).backward()
    for gradient, name in ((found.dq, "q"), (found.dk, "k"), (found.dv, "v"), (found.dg, "g"), (found.dbeta, "beta")):
        assert torch.equal(gradient, y[name].grad), name
    assert torch.equal(found.dh0, y["initial_state"].grad)


def test_segment_counts():
    x = detached(tensors(T=700))  # eleven chunks, four heads
    x["g"] = torch.full_like(x["g"], -1000)
    counts = torch.full((4,), -1, dtype=torch.int32)
    for options, expected in (({"context_parallel": "exact"}, [12, 0, 8, 0]), ({}, [12, 4, 4, 4])):
        version = counts._version
        flashdelta.chunk_gated_delta_rule_fwd(**x, **options, num_segments=3, segment_counts=counts)
        assert counts.tolist() == expected
        assert counts._version > version


def test_segment_counts_through_the_operator():
    x = detached(tensors())
    counts = torch.full((4,), -1, dtype=torch.int32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(counts, **x):
        return flashdelta.chunk_gated_delta_rule_fwd(**x, segment_counts=counts).o + 0

    torch._dynamo.reset()
    assert torch.equal(call(counts, **x), CHUNK(**x)[0])
    assert counts.tolist() == [4, 0, 0, 0]


def test_segment_counts_are_refused_by_name():
    x = detached(tensors())
    for kind, wrong in (
        (ValueError, torch.zeros(5, dtype=torch.int32)),
        (TypeError, torch.zeros(4)),
        (TypeError, np.zeros(4, np.int32)),
    ):
        with pytest.raises(kind, match=r"^segment_counts:"):
            flashdelta.chunk_gated_delta_rule_fwd(**x, segment_counts=wrong)
    with pytest.raises(RuntimeError, match=r"^segment_counts:"):
        flashdelta.chunk_gated_delta_rule_fwd(**tensors(), segment_counts=torch.zeros(4, dtype=torch.int32))


@pytest.mark.parametrize(
    ("name", "kind", "wrong"),
    [
        ("q", TypeError, {"q": torch.zeros(1, 70, 2, 16, dtype=torch.int32)}),
        ("q", TypeError, {"q": torch.zeros(1, 70, 2, 16, dtype=torch.uint16)}),
        ("q", ValueError, {"q": torch.zeros(70, 2, 16)}),
        ("q", ValueError, {"q": torch.zeros(1, 70, 16, 2).transpose(2, 3)}),
        ("k", TypeError, {"k": np.zeros((1, 70, 2, 16), np.float32)}),
        ("k", TypeError, {"k": None}),
        ("k", ValueError, {"k": torch.zeros(1, 70, 3, 16)}),
        ("v", TypeError, {"v": torch.zeros(1, 70, 4, 24, dtype=torch.int32)}),
        ("v", ValueError, {"v": torch.zeros(1, 70, 24)}),
        ("g", TypeError, {"g": 1.0}),
        ("beta", ValueError, {"beta": torch.zeros(1, 70, 4, 24)}),
        ("initial_state", ValueError, {"initial_state": torch.zeros(3, 4, 16, 24)}),
        ("cu_seqlens", TypeError, {"cu_seqlens": [0.5, 2]}),
        ("cu_seqlens", TypeError, {"cu_seqlens": 3}),
        ("cu_seqlens", ValueError, {"cu_seqlens": []}),
        ("cu_seqlens", ValueError, {"cu_seqlens": torch.tensor([0, 90])}),
        ("scale", ValueError, {"scale": float("nan")}),
        ("final_state_dtype", TypeError, {"final_state_dtype": np.float32, "output_final_state": True}),
        ("final_state", TypeError, {"final_state_dtype": torch.int32, "output_final_state": True}),
        ("o", TypeError, {"o": np.zeros(3)}),
        ("o", ValueError, {"o": torch.zeros(1, 70, 4, 25)}),
    ],
)
@anything
def test_malformed_calls_name_the_argument(function, name, kind, wrong):
    x = detached(tensors()) | {"backend": "reference"} | wrong
    with pytest.raises(kind) as caught:
        function(**x)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{name}:"), caught.value


@anything
@pytest.mark.parametrize("name", ["q", "k", "initial_state"])
def test_tensors_of_two_devices_are_refused(function, name):
    x = detached(tensors())
    with pytest.raises(ValueError, match=r"is on (meta|cpu), but q is on (meta|cpu)"):
        function(**(x | {name: x[name].to("meta")}), output_final_state=True)


@anything
def test_shapes_of_meta_tensors(function):
    x = {name: y.to("meta") for name, y in detached(tensors()).items()}
    o, s = function(**x, output_final_state=True, state_v_first=True)
    assert (o.shape, o.dtype, o.device.type) == (x["v"].shape, torch.float32, "meta")
    assert s.shape == (1, 4, 24, 16)
