"""How the torch face reaches the library: past the dispatcher or through an operator, on which device and stream, with which offsets."""

import contextlib

import flashdelta
import pytest
from test_torch import CHUNK, RECURRENT, detached, tensors

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def face():
    t = torch.ones(1, 1, 1, 1)
    CHUNK(t, t, t, None, None, backend="reference")  # imports it
    from flashdelta import _torch

    return _torch


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class TestOperators:
    @pytest.mark.parametrize(
        ("call", "operator"),
        [
            (lambda x: CHUNK(**x), "flashdelta::chunk_forward_out"),
            (lambda x: RECURRENT(**x), "flashdelta::recurrent_forward_out"),
            (lambda x: RECURRENT(**x, inplace_state=True), "flashdelta::recurrent_forward_"),
        ],
        ids=("chunk", "recurrent", "inplace"),
    )
    def test_a_mode_sees_the_operator_and_gets_the_same_bits(self, face, call, operator):
        x = detached(tensors())
        state = x["initial_state"].clone()
        plain = [y for y in call(x) if y is not None]
        x["initial_state"] = state
        with Seen() as mode:
            seen = [y for y in call(x) if y is not None]
        assert operator in mode.names
        assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))

    def test_a_plain_call_needs_no_dispatcher(self, face, monkeypatch):
        monkeypatch.setattr(face, "_OPS", None)
        x = detached(tensors())
        assert torch.equal(CHUNK(**x)[0], CHUNK(**x, o=torch.empty_like(x["v"]))[0])
        RECURRENT(**x, inplace_state=True)

    @pytest.mark.parametrize("missing", ["_modes", "_transforms"])
    def test_a_torch_that_cannot_be_asked_takes_the_operators(self, face, monkeypatch, missing):
        x = detached(tensors())
        o, s = CHUNK(**x, output_final_state=True)
        monkeypatch.setattr(face, missing, None)
        called = []
        monkeypatch.setattr(face, "_run", lambda *arguments, run=face._run: called.append(len(arguments)) or run(*arguments))
        o_operator, s_operator = CHUNK(**x, output_final_state=True)
        assert called and torch.equal(o, o_operator) and torch.equal(s, s_operator)

    def test_subclasses_of_tensor_take_the_operators(self, face):
        class Named(torch.Tensor):
            pass

        x = detached(tensors())
        expected = CHUNK(**x)[0]
        assert not face._unobserved((x["q"].as_subclass(Named),))
        assert torch.equal(CHUNK(**(x | {"q": x["q"].as_subclass(Named)}))[0], expected)

    def test_a_function_transform_takes_the_operators(self, face):
        inside = []
        torch.func.grad(lambda t: (inside.append(face._unobserved((t,))), t.sum())[1])(torch.ones(2))
        assert inside == [False]

    @pytest.mark.parametrize("written", ["o", "final_state", "initial_state"])
    def test_autograd_sees_that_a_buffer_was_written(self, face, written):
        x = detached(tensors())
        buffers = {"o": torch.zeros_like(x["v"]), "final_state": torch.zeros_like(x["initial_state"])}
        buffer = x["initial_state"] if written == "initial_state" else buffers[written]
        weight = torch.ones(buffer.shape, requires_grad=True)
        loss = (weight * buffer).sum()  # keeps the buffer for weight's gradient
        if written == "initial_state":
            RECURRENT(**x, inplace_state=True)
        else:
            CHUNK(**x, **{written: buffer})
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class TestDevices:
    """The calls that a GPU would get, on a machine that need not have one."""

    @pytest.fixture
    def gpu(self, face, monkeypatch):
        """Two devices of which the first is current, each with a stream of its own; what the library is asked is kept."""
        entered = []

        @contextlib.contextmanager
        def device(chosen):
            entered.append(chosen.index)
            monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen.index)
            yield
            monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", device)
        monkeypatch.setattr(face, "_raw_stream", lambda index: 1000 + index)
        return entered

    @pytest.mark.parametrize("index", [0, 1])
    def test_a_call_runs_with_its_tensors_device_current_and_on_that_devices_stream(self, face, gpu, index):
        asked = []

        def function(*arguments):
            asked.append((torch.cuda.current_device(), arguments[-2], arguments[-1]))
            return 0

        face._run(function, (), None, (), 0.0, torch.device("cuda", index))
        assert asked == [(index, 1000 + index, None)]
        assert gpu == ([] if index == 0 else [1])
        assert torch.cuda.current_device() == 0

    def test_without_the_raw_stream_the_stream_object_is_asked(self, face, gpu, monkeypatch):
        class Stream:
            cuda_stream = 77

        monkeypatch.setattr(face, "_raw_stream", None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        asked = []
        face._run(lambda *arguments: asked.append(arguments[-2]), (), None, (), 0.0, torch.device("cuda", 0))
        assert asked == [77]

    def test_the_workspace_comes_from_torchs_allocator_on_the_tensors_device(self, face, gpu, monkeypatch):
        made = []
        monkeypatch.setattr(torch, "empty", lambda size, **how: made.append((size, how)) or "workspace")
        answers = [4096, 0]
        given = []

        def function(*arguments):
            given.append(arguments[-1])
            return answers.pop(0)

        face._run(function, (), None, (), 0.0, torch.device("cuda", 0))
        assert made == [(4096, {"dtype": torch.uint8, "device": torch.device("cuda", 0)})]
        assert given == [None, "workspace"]


class TestOffsets:
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_move_with_their_dtype(self, face, dtype):
        cu_seqlens = torch.tensor([0, 3, 3, 9], dtype=dtype)
        moved = torch.ops.flashdelta.offsets_to(cu_seqlens[::1], 9, torch.device("cpu"))
        assert torch.equal(moved, cu_seqlens) and moved.dtype == dtype and moved.data_ptr() != cu_seqlens.data_ptr()

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_opcheck(self, face, dtype):
        operator = torch.ops.flashdelta.offsets_to.default
        torch.library.opcheck(operator, (torch.tensor([0, 3, 3, 9], dtype=dtype), 9, torch.device("cpu")))

    @pytest.mark.parametrize(
        ("offsets", "error", "text"),
        [
            ([0, 4, 3], ValueError, "entry 2 is 3, below entry 1 = 4"),
            ([0, 10], ValueError, "entry 1 is 10; it must be at most T = 9"),
            ([-1, 9], ValueError, "entry 0 is -1"),
            ([[0, 9]], ValueError, "has 2 axes"),
            ([0.0, 9.0], TypeError, "dtype is float32"),
        ],
    )
    def test_on_their_way_to_a_gpu_are_checked_where_they_can_be_read(self, face, offsets, error, text):
        with pytest.raises(error, match=f"cu_seqlens: {text}"):
            torch.ops.flashdelta.offsets_to(torch.tensor(offsets), 9, torch.device("cuda", 0))

    def test_on_the_cpu_are_refused_while_a_graph_is_captured(self, face, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="cu_seqlens: is on the CPU while a CUDA graph is captured"):
            face._offsets_to(torch.tensor([0, 9]), 9, torch.device("cuda", 0))

    @pytest.mark.parametrize("given", [[0, 3, 9], (0, 3, 9), torch.tensor([0, 3, 9], dtype=torch.int32)], ids=("list", "tuple", "tensor"))
    def test_beside_tensors_on_another_device_go_there(self, face, given):
        moved = face._offsets(given, torch.empty(1, 9, 1, 128, device="meta"))
        assert moved.device.type == "meta" and moved.shape == (3,)

    def test_on_the_tensors_device_are_taken_as_they_are(self, face):
        cu_seqlens = torch.tensor([0, 9])
        assert face._offsets(cu_seqlens, torch.empty(1, 9, 1, 8)) is cu_seqlens

    def test_are_traced(self, face):
        def step(q, k, v, g, beta):
            return flashdelta.chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens=[0, 30, 70])[0] + 1

        x = detached(tensors())
        call = [x[name] for name in ("q", "k", "v", "g", "beta")]
        torch._dynamo.reset()
        assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*call), step(*call))
