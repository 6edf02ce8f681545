"""Torch tensors on a GPU: the contract against the float64 oracle on the CPU, and a caller's every mode."""

import shutil
import threading

import cases
import flashdelta
import numpy as np
import pytest

torch = pytest.importorskip("torch")

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
if "cuda" not in flashdelta.info()["backends"]:
    pytest.skip(f"no cuda backend: {flashdelta.info()['cuda']['problem'] or 'not in this build'}", allow_module_level=True)

DEVICE = "cuda"
CHUNK, RECURRENT = flashdelta.chunk_gated_delta_rule, flashdelta.fused_recurrent_gated_delta_rule
DTYPES = (torch.bfloat16, torch.float16)
# docs/numerics.md: of o, of the final state
TOLERANCE = {torch.bfloat16: (5e-3, 4e-3), torch.float16: (1e-3, 1e-3)}

anything = pytest.mark.parametrize("function", (CHUNK, RECURRENT), ids=("chunk", "recurrent"))
any_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

FLAGS = (
    {},
    {"scale": 0.3},
    {"g": None},
    {"beta": None},
    {"initial_state": None},
    {"use_qk_l2norm_in_kernel": True},
    {"use_beta_sigmoid_in_kernel": True},
    {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True},
    {"use_gate_in_kernel": True},
    {"use_gate_in_kernel": True, "dt_bias": None},
    {"state_v_first": True},
    {"cu_seqlens": [2, 30, 30, 131, 190]},
    {"context_parallel": "exact"},
    {"context_parallel": "off"},
    {"batch_invariant": True},
)


def tensors(flags=None, dtype=torch.bfloat16, device=None, T=200, H=2, HV=4, **shape):
    """Arguments on the device; the flags complete them: gates get their parameters, states one per sequence."""
    flags = dict(flags or {})
    x = cases.with_flags(flags, T=T, H=H, HV=HV, K=128, V=128, **shape)
    x = {name: torch.from_numpy(array).to(device or DEVICE) for name, array in x.items()}
    return x | {name: x[name].to(dtype) for name in ("q", "k", "v")} | flags


def on_cpu(x):
    return {name: y.cpu().double() if torch.is_tensor(y) and y.is_floating_point() else y for name, y in x.items()}


def oracle(x, function=CHUNK):
    return function(**on_cpu(x), output_final_state=True, backend="reference")


def assert_contract(found, expected, dtype):
    for y, exact, tolerance, name in zip(found, expected, TOLERANCE[dtype], ("o", "final_state"), strict=True):
        assert cases.relative_error(y.cpu().double(), exact) <= tolerance, name


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or torch.equal(a, b)


@anything
@any_dtype
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_flag_holds_the_contract(function, dtype, flags):
    x = tensors(flags, dtype)
    o, s = function(**x, output_final_state=True)
    assert (o.dtype, s.dtype, o.device.type, s.device.type) == (dtype, torch.float32, "cuda", "cuda")
    assert_contract((o, s), oracle(x, function), dtype)


@any_dtype
@pytest.mark.parametrize("narrow", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_gates_and_states_of_every_dtype(dtype, narrow):
    x = tensors({"use_gate_in_kernel": True}, dtype, B=2)
    for name in ("g", "beta", "A_log", "dt_bias", "initial_state"):
        x[name] = x[name].to(narrow)
    assert_contract(CHUNK(**x, output_final_state=True), oracle(x), dtype)
    s = CHUNK(**x, output_final_state=True, final_state_dtype=narrow)[1]
    assert s.dtype == narrow
    assert torch.equal(s, CHUNK(**x, output_final_state=True)[1].to(narrow))


@anything
def test_arguments_by_position(function):
    x = tensors()
    if function is CHUNK:
        found = CHUNK(x["q"], x["k"], x["v"], x["g"], x["beta"], 0.5, x["initial_state"], True)
    else:
        found = RECURRENT(x["q"], x["k"], x["v"], x["g"], None, None, x["beta"], 0.5, x["initial_state"], True)
    assert_same(found, function(**x, scale=0.5, output_final_state=True))


@anything
def test_no_state_unless_it_is_asked_for(function):
    o, s = function(**tensors())
    assert s is None
    assert o.is_cuda


@anything
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_recording(function, mode):
    x = tensors()
    x["q"].requires_grad_()
    with mode():
        found = function(**x, output_final_state=True)
    assert not any(y.requires_grad for y in found)
    assert_same(found, function(**x, output_final_state=True))


@anything
def test_no_input_changes_and_the_same_call_gives_the_same_bits(function):
    x = tensors()
    before = {name: y.clone() for name, y in x.items()}
    first = function(**x, output_final_state=True)
    for _ in range(3):
        assert_same(function(**x, output_final_state=True), first)
    assert all(torch.equal(x[name], y) for name, y in before.items())


# Memory


@anything
def test_views_of_any_layout_give_the_same_bits(function):
    x = tensors(B=2)
    expected = function(**x, output_final_state=True)
    packed = torch.cat([x["q"].flatten(2), x["k"].flatten(2), x["v"].flatten(2)], -1)
    q, k, v = packed.split([256, 256, 512], -1)
    views = x | {"q": q.unflatten(-1, (2, 128)), "k": k.unflatten(-1, (2, 128)), "v": v.unflatten(-1, (4, 128))}
    assert_same(function(**views, output_final_state=True), expected)
    swapped = {name: x[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v", "g", "beta")}
    swapped["initial_state"] = x["initial_state"].mT.contiguous().mT
    assert not any(y.is_contiguous() for y in swapped.values())
    assert_same(function(**(x | swapped), output_final_state=True), expected)


@anything
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_strides_that_are_no_multiples_of_16_bytes_are_refused(function, name):
    x = tensors()
    B, T, heads, width = x[name].shape
    x[name] = torch.zeros(B, T, heads, width + 4, dtype=x[name].dtype, device=DEVICE)[..., :width]
    with pytest.raises(ValueError, match=rf"^{name}: .*16") as caught:
        function(**x)
    assert type(caught.value) is ValueError


@anything
def test_the_callers_buffers(function):
    x = tensors()
    o, s = torch.full_like(x["v"], torch.nan), torch.full_like(x["initial_state"], torch.nan)
    got = function(**x, o=o, final_state=s)
    assert got[0] is o
    assert got[1] is s
    assert_same(got, function(**x, output_final_state=True))


def test_inplace_state():
    x = tensors(B=3, T=1)
    expected = RECURRENT(**x, output_final_state=True)
    o, s = RECURRENT(**x, inplace_state=True)
    assert s is x["initial_state"]
    assert_same((o, s), expected)


def test_no_memory_is_kept():
    x = tensors()
    CHUNK(**x, output_final_state=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        CHUNK(**x, output_final_state=True)
    assert torch.cuda.memory_allocated() == before


# Sequences


@anything
@pytest.mark.parametrize(
    "make",
    [
        list,
        lambda c: torch.tensor(c, dtype=torch.int32),
        lambda c: torch.tensor(c, dtype=torch.int64),
        lambda c: torch.tensor(c, dtype=torch.int32, device=DEVICE),
        lambda c: torch.tensor(c, dtype=torch.int64, device=DEVICE),
        lambda c: np.array(c, np.int32),
        lambda c: torch.tensor(c, device=DEVICE).repeat_interleave(2)[::2],
    ],
    ids=("list", "cpu32", "cpu64", "gpu32", "gpu64", "numpy", "strided"),
)
def test_every_kind_of_cu_seqlens(function, make):
    offsets = [3, 3, 20, 64, 64, 199]
    x = tensors({"cu_seqlens": offsets})
    expected = oracle(x, function)
    found = function(**(x | {"cu_seqlens": make(offsets)}), output_final_state=True)
    assert_contract(found, expected, torch.bfloat16)
    assert not found[0][:, :3].any()
    assert not found[0][:, 199:].any()


@anything
def test_malformed_offsets_on_the_host_are_refused(function):
    x = tensors({"cu_seqlens": [0, 100, 200]})
    for wrong in ([0, 150, 100], [-1, 100, 200], [0, 100, 201]):
        with pytest.raises(ValueError, match=r"^cu_seqlens"):
            function(**(x | {"cu_seqlens": wrong}))


def test_no_call_waits_for_the_device():
    x = tensors({"cu_seqlens": [0, 50, 200]})
    on_device = x | {"cu_seqlens": torch.tensor([0, 50, 200], device=DEVICE)}
    CHUNK(**x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for y in (x, on_device):
            CHUNK(**y, output_final_state=True)
            RECURRENT(**y, output_final_state=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Streams, devices, threads


@anything
def test_a_call_runs_in_the_current_stream(function):
    x = tensors()
    expected = function(**x, output_final_state=True)
    right = x["v"].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x["v"].fill_(torch.nan)
        torch.cuda._sleep(50_000_000)  # clock cycles: what a call in another stream would overtake
        x["v"].copy_(right)
        found = function(**x, output_final_state=True)
    stream.synchronize()
    assert_same(found, expected)


def test_threads_with_streams_of_their_own():
    x = [tensors(seed=seed) for seed in range(4)]
    expected = [CHUNK(**y, output_final_state=True) for y in x]
    torch.cuda.synchronize()
    found = [None] * len(x)

    def work(i):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(10):
                found[i] = CHUNK(**x[i], output_final_state=True)
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(x))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


@anything
def test_tensors_on_any_device_of_the_machine_run_there(function):
    expected = function(**tensors(), output_final_state=True)
    current = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        found = function(**tensors(device=device), output_final_state=True)
        assert torch.cuda.current_device() == current
        assert [y.device for y in found] == [device] * 2
        assert_same([y.cpu() for y in found], [y.cpu() for y in expected])


@anything
def test_a_tensor_on_the_cpu_runs_on_the_cpu(function):
    x = {name: y.cpu() for name, y in tensors().items()}
    found = function(**x, output_final_state=True)
    assert {y.device.type for y in found} == {"cpu"}
    assert_same(found, function(**x, output_final_state=True, backend="cpu"))


@anything
@pytest.mark.parametrize("name", ["k", "v", "g", "initial_state"])
def test_tensors_of_two_devices_are_refused(function, name):
    x = tensors()
    with pytest.raises(ValueError, match=rf"^{name}: is on cpu, but q is on cuda"):
        function(**(x | {name: x[name].cpu()}))


@anything
@pytest.mark.parametrize(
    ("name", "kind", "change"),
    [
        ("q", TypeError, lambda x: {n: x[n].float() for n in "qkv"}),
        ("q", ValueError, lambda x: {n: x[n][..., :64].contiguous() for n in "qk"}),
        ("v", ValueError, lambda x: {"v": x["v"][..., :64].contiguous(), "initial_state": None}),
        ("k", TypeError, lambda x: {"k": x["k"].half()}),
        ("g", TypeError, lambda x: {"g": x["g"].double()}),
        ("o", TypeError, lambda x: {"o": torch.empty_like(x["v"], dtype=torch.float32)}),
        ("backend", ValueError, lambda x: {"backend": "cpu"}),
    ],
)
def test_what_the_gpu_does_not_take_is_refused_by_name(function, name, kind, change):
    x = tensors()
    with pytest.raises(kind) as caught:
        function(**(x | change(x)))
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{name}:"), caught.value


@anything
def test_a_default_dtype_and_device_of_the_caller(function):
    x = tensors({"cu_seqlens": [0, 70, 200]}) | {"output_final_state": True}
    expected = function(**x)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found = function(**x)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert_same(found, expected)


# Gradients


def test_the_forward_runs_where_gradients_are_recorded_and_the_backward_says_what_is_missing():
    x = tensors()
    expected = CHUNK(**x, output_final_state=True)
    for name in ("q", "k", "v", "g", "beta", "initial_state"):
        x[name].requires_grad_()
    found = CHUNK(**x, output_final_state=True)
    assert_same([y.detach() for y in found], expected)
    with pytest.raises(RuntimeError, match=r"backward is not yet available on the cuda backend"):
        found[0].float().sum().backward()


def test_recurrent_has_no_gradient_and_says_so():
    x = tensors()
    o, _ = RECURRENT(**(x | {"q": x["q"].requires_grad_()}))
    with pytest.raises(RuntimeError, match="use chunk_gated_delta_rule for training"):
        o.float().sum().backward()


@any_dtype
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_the_low_level_call_saves_what_the_cpus_saves(dtype, every, packed):
    x = tensors({"cu_seqlens": [2, 30, 30, 131, 190]} if packed else {}, dtype)
    wanted = {"output_h": True, "output_g_cumsum": True, "output_A": True, "checkpoint_chunks": every}
    found = flashdelta.chunk_gated_delta_rule_fwd(**x, **wanted)
    expected = flashdelta.chunk_gated_delta_rule_fwd(**{n: y.cpu() if torch.is_tensor(y) else y for n, y in x.items()}, **wanted)
    assert_same([found.o, found.final_state], CHUNK(**x, output_final_state=True))
    tolerances = {"g_cumsum": 1e-5, "A": 4e-3, "h": TOLERANCE[dtype][1]}
    for name, tolerance in tolerances.items():
        assert cases.relative_error(getattr(found, name).cpu(), getattr(expected, name)) <= tolerance, name


# torch.compile, torch.library, torch.cuda.graph


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@anything
def test_compiles_as_one_graph(function, flags):
    torch._dynamo.reset()
    x = tensors(flags)
    if "cu_seqlens" in x:
        x["cu_seqlens"] = torch.tensor(x["cu_seqlens"], device=DEVICE)

    def step(**y):
        o, s = function(**y, output_final_state=True)
        return o * 2, s + 1

    assert_same(torch.compile(step, fullgraph=True, backend="aot_eager")(**x), step(**x))


@anything
def test_compiles_with_symbolic_lengths(function):
    torch._dynamo.reset()

    def call(**y):
        return function(**y, output_final_state=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 70, 131):
        x = tensors(T=T)
        assert_same(compiled(**x), call(**x))


def test_compiles_the_inplace_state():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(**y):
        o, state = RECURRENT(**y, inplace_state=True)
        return o + 1, state * 1

    x = tensors(T=1, B=2)
    o, s = RECURRENT(**x, output_final_state=True)
    assert_same(step(**x), (o + 1, s))
    assert torch.equal(x["initial_state"], s)


@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="the default compiler needs a C compiler")
def test_compiles_with_the_default_compiler():
    torch._dynamo.reset()
    x = tensors(T=70)
    compiled = torch.compile(lambda **y: CHUNK(**y)[0] * 2, fullgraph=True)
    assert torch.equal(compiled(**x), CHUNK(**x)[0] * 2)


def operator_arguments(flags, **shape):
    """An operator's leading arguments: the nine inputs, then scale, options, tolerance."""
    from flashdelta import _options

    x = tensors(flags, **shape)
    inputs = [x.get(name) for name in ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens", "A_log", "dt_bias")]
    if inputs[6] is not None:
        inputs[6] = torch.tensor(inputs[6], device=DEVICE)
    known = {"scale", "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval"}
    known |= {"state_v_first", "context_parallel", "batch_invariant"}
    return [*inputs, *_options.pack(**{name: value for name, value in x.items() if name in known})]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_opcheck_chunk_forward(flags):
    CHUNK(**tensors(T=1))  # registers the operators
    for save in (0, 7):
        torch.library.opcheck(torch.ops.flashdelta.chunk_forward.default, (*operator_arguments(flags), torch.float32, save))


@pytest.mark.parametrize("operation", ["chunk_forward_out", "recurrent_forward", "recurrent_forward_out", "recurrent_forward_"])
def test_opcheck_of_the_other_forwards(operation):
    CHUNK(**tensors(T=1))
    call = operator_arguments({}, T=70)
    o, s = torch.empty_like(call[2]), torch.empty_like(call[5])
    counts = torch.empty(4, dtype=torch.int32, device=o.device)
    outputs = {
        "chunk_forward_out": (o, s, None, None, None, counts),
        "recurrent_forward": (torch.bfloat16,),
        "recurrent_forward_out": (o, s),
        "recurrent_forward_": (o,),
    }
    torch.library.opcheck(getattr(torch.ops.flashdelta, operation).default, (*call, *outputs[operation]))


def captured(call):
    """A CUDA graph of the call, after it has run once, and what the replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


@anything
def test_a_captured_call_replays_with_other_sequences_and_values(function):
    first = [0, 50, 114, 150, 200]
    x = tensors({"cu_seqlens": first})
    x["cu_seqlens"] = torch.tensor(first, device=DEVICE)
    graph, outputs = captured(lambda: function(**x, output_final_state=True))
    for seed, offsets in enumerate(([0, 0, 0, 200, 200], [0, 200, 200, 200, 200], [7, 8, 72, 136, 190], [0, 0, 0, 0, 0], first), start=10):
        other = tensors({"cu_seqlens": offsets}, seed=seed)
        for name, y in other.items():
            x[name].copy_(y if torch.is_tensor(y) else torch.tensor(y))
        for y in outputs:
            y.fill_(torch.nan)
        graph.replay()
        assert_same(outputs, function(**other, output_final_state=True))
        assert_contract(outputs, oracle(other, function), torch.bfloat16)


def test_a_captured_decode_goes_on_step_by_step():
    x = tensors(B=3, T=1)
    start = x["initial_state"].clone()
    graph, (o, state) = captured(lambda: RECURRENT(**x, inplace_state=True))
    state.copy_(start)
    expected = x | {"initial_state": start.clone()}
    for _ in range(4):
        graph.replay()
        assert_same((o, state), RECURRENT(**expected, inplace_state=True))


def test_offsets_on_the_host_cannot_be_captured():
    x = tensors({"cu_seqlens": [0, 50, 200]})
    CHUNK(**x)
    with pytest.raises(RuntimeError, match=r"cu_seqlens: is on the CPU"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        CHUNK(**x)
    torch.cuda.synchronize()
    CHUNK(**x)
