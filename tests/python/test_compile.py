"""torch.library's own checks of the operators, and tracing without a graph break."""

import pytest
from test_torch import CHUNK, FLAGS, FUNCTIONS, LEAVES, RECURRENT, detached, tensors

torch = pytest.importorskip("torch")

anywhere = pytest.mark.parametrize("backend", ("cpu", "reference"))
anything = pytest.mark.parametrize("function", FUNCTIONS, ids=("chunk", "recurrent"))


def arguments(flags, backend, recorded, **shape):
    """An operator's leading arguments: the nine inputs, then scale, options, tolerance."""
    from flashdelta import _options

    x = tensors(flags, **shape) if recorded else detached(tensors(flags, **shape))
    inputs = [x.get(name) for name in ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens", "A_log", "dt_bias")]
    if inputs[6] is not None:
        inputs[6] = torch.tensor(inputs[6])
    known = {"scale", "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval"}
    known |= {"state_v_first", "checkpoint_chunks", "context_parallel", "num_segments"}
    return [*inputs, *_options.pack(backend=backend, **{name: value for name, value in x.items() if name in known})]


@pytest.fixture(autouse=True, scope="module")
def operators():
    t = torch.ones(1, 1, 1, 1)
    CHUNK(t, t, t, None, None, backend="reference")  # registers them
    return torch.ops.flashdelta


@anywhere
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_opcheck_chunk_forward(operators, backend, flags):
    call = arguments(flags, backend, recorded=True)
    torch.library.opcheck(operators.chunk_forward.default, (*call, torch.float32, 7 if backend == "cpu" else 0))


@anywhere
def test_opcheck_chunk_forward_without_state_or_gradients(operators, backend):
    torch.library.opcheck(operators.chunk_forward.default, (*arguments({}, backend, recorded=False), None, 0))


@anywhere
def test_opcheck_chunk_backward(operators, backend):
    call = arguments({}, backend, recorded=False)
    o, s, *saved = operators.chunk_forward.default(*call, torch.float32, 7 if backend == "cpu" else 0)
    saved = saved if backend == "cpu" else [None] * 3
    torch.library.opcheck(operators.chunk_backward.default, (*call[:9], *saved, o, s, *call[9:], 0b111111))


@anywhere
def test_opcheck_recurrent_forward(operators, backend):
    call = arguments({}, backend, recorded=False, T=3)
    torch.library.opcheck(operators.recurrent_forward.default, (*call, torch.bfloat16))


@anywhere
@pytest.mark.parametrize("operation", ["recurrent_forward_", "recurrent_forward_out", "chunk_forward_out"])
def test_opcheck_of_what_writes_in_place(operators, backend, operation):
    call = arguments({}, backend, recorded=False)
    o, s, counts = torch.empty_like(call[2]), torch.empty_like(call[5]), torch.empty(4, dtype=torch.int32)
    outputs = {"recurrent_forward_": (o,), "recurrent_forward_out": (o, s), "chunk_forward_out": (o, s, None, None, None, counts)}
    torch.library.opcheck(getattr(operators, operation).default, (*call, *outputs[operation]))


@anywhere
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_compiles_as_one_graph_with_the_same_gradients(backend, flags):
    def step(**x):
        o, s = CHUNK(**x, output_final_state=True, backend=backend)
        return o * 2, s + 1

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = tensors(flags)
        o, s = function(**x)
        (o.square().sum() + s.square().sum()).backward()
        results.append([o, s, *(x[name].grad for name in LEAVES if torch.is_tensor(x.get(name)))])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@anywhere
@anything
def test_compiles_with_symbolic_lengths(backend, function):
    torch._dynamo.reset()

    def call(**x):
        return function(**x, output_final_state=True, backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 70, 131):
        x = detached(tensors(T=T))
        for a, b in zip(compiled(**x), call(**x), strict=True):
            assert torch.equal(a, b)


@anywhere
def test_compiles_the_inplace_state(backend):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(**x):
        o, state = RECURRENT(**x, inplace_state=True, backend=backend)
        return o + 1, state * 1

    x = detached(tensors(T=1))
    o, s = RECURRENT(**x, output_final_state=True, backend=backend)
    o_compiled, s_compiled = step(**x)
    assert torch.equal(o_compiled, o + 1)
    assert torch.equal(s_compiled, s)
    assert torch.equal(x["initial_state"], s)


@anywhere
def test_compiles_with_the_default_compiler(backend):
    torch._dynamo.reset()
    x = detached(tensors(T=5))
    compiled = torch.compile(lambda **y: CHUNK(**y, backend=backend)[0], fullgraph=True)
    assert torch.equal(compiled(**x), CHUNK(**x, backend=backend)[0])


def test_first_use_may_be_inside_a_trace(run_python):
    run_python("""
import torch, flashdelta
def f(t):
    return flashdelta.chunk_gated_delta_rule(t, t, t, None, None, backend="reference")[0]
t = torch.ones(1, 3, 1, 4)
assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(t), f(t))
""")
