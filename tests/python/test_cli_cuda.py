"""The program's road to a GPU, walked on the CPU: a stand-in device keeps torch tensors there, everything else is as on a GPU."""

import json

import flashdelta
import numpy as np
import pytest
from flashdelta.cli import cases, device, flops, main, terms, timing, verify
from flashdelta.cli.dtypes import DTYPES
from flashdelta.cli.errors import UsageError
from test_cli import DEMO, load, one_line, save, tensors

torch = pytest.importorskip("torch")


class Stand(device.Cuda):
    """What `device.Cuda` does, with torch's CPU in the GPU's place and the cpu backend in the cuda backend's."""

    def __init__(self):
        super().__init__(torch, "cpu")

    def synchronize(self):
        pass

    def timer(self, call, warm=True):
        return timing.WallClock(call, warm)

    def describe(self, info, instruction_set, threads):
        return "a GPU"


@pytest.fixture
def gpu(monkeypatch):
    """--device cuda gives the stand-in; calls for the cuda backend go to the cpu backend after what the cuda backend would refuse."""

    def on_cpu(function):
        def call(*args, **kwargs):
            if kwargs.get("backend") == "cuda":
                assert all(not isinstance(x, np.ndarray) for x in (*args, *kwargs.values()))
                assert kwargs["q"].dtype in (torch.bfloat16, torch.float16) and kwargs["q"].shape[3] == kwargs["v"].shape[3] == 128
                for name in ("q", "k", "v"):
                    strides = zip(kwargs[name].shape, kwargs[name].stride(), strict=True)
                    assert all(2 * stride % 16 == 0 for size, stride in list(strides)[:3] if size > 1), name
                kwargs["backend"] = "cpu"
            return function(*args, **kwargs)

        return call

    for name in ("chunk_gated_delta_rule", "chunk_gated_delta_rule_fwd", "fused_recurrent_gated_delta_rule"):
        monkeypatch.setattr(flashdelta, name, on_cpu(getattr(flashdelta, name)))
    asked = []
    monkeypatch.setattr(device, "select", lambda name, refusal="": asked.append((name, refusal)) or Stand())
    return asked


class TestPlacing:
    @pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
    def test_values_and_strides_arrive_and_gaps_hold_nan(self, dtype):
        place = Stand()
        whole = np.arange(2 * 3 * 40, dtype=np.float32).astype(DTYPES[dtype]).reshape(2, 3, 40)
        for x in (whole, whole[:, :, 8:16], whole[:, ::2], whole.swapaxes(0, 1), np.asfortranarray(whole), whole[:1, :, :0]):
            put = place.put(x)
            assert put.shape == x.shape
            assert x.flags.c_contiguous or put.stride() == tuple(stride // x.itemsize for stride in x.strides)
            assert place.get(put).tobytes() == x.tobytes() and place.get(put).dtype == x.dtype
        part = place.put(whole[:, :, 8:16])
        beyond = torch.as_strided(part, (9,), (1,))
        assert torch.isnan(beyond[8]) and not torch.isnan(beyond[:8]).any()

    def test_what_is_no_array_is_left_alone(self):
        assert Stand().put(None) is None and Stand().get(3) == 3

    def test_offsets_keep_their_integers(self):
        put = Stand().put(np.array([0, 3, 9], np.int32))
        assert put.dtype == torch.int32 and put.tolist() == [0, 3, 9]


class TestSelecting:
    @pytest.fixture
    def a_gpu(self, monkeypatch):
        info = flashdelta.info()
        info["backends"] = [*info["backends"], "cuda"]
        monkeypatch.setattr(flashdelta, "info", lambda: info)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def test_auto_takes_the_gpu(self, a_gpu):
        assert device.select("auto").backend == device.select("cuda").backend == "cuda"

    def test_auto_leaves_what_the_cuda_backend_does_not_take_to_the_cpu(self, a_gpu):
        assert device.select("auto", device.cuda_refusal(DTYPES["fp32"])).backend == "cpu"
        with pytest.raises(UsageError, match="--device cuda: the cuda backend takes q, k, v in bf16 or fp16, not fp32"):
            device.select("cuda", device.cuda_refusal(DTYPES["fp32"]))

    def test_refusals_name_what_is_taken(self):
        assert device.cuda_refusal(DTYPES["bf16"]) == device.cuda_refusal(DTYPES["fp16"], 128, 128) == ""
        assert "128, not 64 and 128" in device.cuda_refusal(DTYPES["bf16"], 64, 128)
        assert "not float64" in device.cuda_refusal(np.dtype(np.float64))

    def test_a_gpu_without_torchs_cuda_is_none(self, a_gpu, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UsageError, match="torch sees no CUDA device"):
            device.select("cuda")


class TestCases:
    def test_are_what_the_cuda_backend_takes(self):
        for seed in range(150):
            case = cases.make(seed, "cuda")
            q, v = case.tensors["q"], case.tensors["v"]
            assert device.cuda_refusal(q.dtype, q.shape[3], v.shape[3]) == "" and v.dtype == q.dtype
            assert case.do is None and case.dht is None
            for x in (q, case.tensors["k"], v):
                assert all(stride % 16 == 0 for size, stride in zip(x.shape[:3], x.strides[:3], strict=True) if size > 1)

    def test_reach_the_edges(self):
        made = [cases.make(seed, "cuda") for seed in range(300)]
        lengths = {case.tensors["q"].shape[1] for case in made}
        assert {0, 1, 63, 64, 65} <= lengths and max(lengths) > 256
        packs = [case.tensors["cu_seqlens"] for case in made if case.tensors["cu_seqlens"] is not None]
        assert any((np.diff(pack) == 0).any() for pack in packs) and {pack.dtype.name for pack in packs} == {"int32", "int64"}
        assert {case.flags["state_v_first"] for case in made} == {True, False}
        states = [case.tensors["initial_state"] for case in made]
        assert {None if x is None else x.dtype.name for x in states} == {None, "float32", "bfloat16", "float16"}
        assert {case.operation for case in made} == {"chunk", "recurrent"}
        assert {case.tensors["v"].shape[2] // case.tensors["q"].shape[2] for case in made} >= {1, 2, 3, 4}

    def test_leave_those_of_the_cpu_as_they_were(self):
        assert cases.make(5).describe() == cases.make(5, "cpu").describe() != cases.make(5, "cuda").describe()
        assert all(cases.make(seed).backward for seed in range(20))

    def test_terms_of_the_forward_are_those_that_nothing_flowing_back_gives(self):
        for case in (c for c in (cases.make(seed, "cuda") for seed in range(40)) if c.operation == "chunk"):
            if not 0 < case.tensors["v"].size < 20000:
                continue
            alone = terms.norms(case)
            case.backward = True
            with_zeros = terms.norms(case)
            for name in ("o", "final_state"):
                assert alone.by_token[name] == with_zeros.by_token[name] and alone.by_chunk[name] == with_zeros.by_chunk[name]


class TestCommands:
    def test_demo_runs_its_whole_job(self, gpu, monkeypatch, capsys):
        from flashdelta.cli import demo

        monkeypatch.setattr(demo, "LENGTHS", (64, 128, 256))
        arguments = [x for x in DEMO if x != "--no-scan"]
        assert main(["cuda" if x == "cpu" else x for x in arguments]) == 0
        out = capsys.readouterr().out
        assert "device: cuda (a GPU)" in out and "OUTSIDE" not in out
        assert "decode after prefill" in out and "time grows as length^" in out and "runs the chunked kernels" in out
        assert gpu == [("cuda", "")]

    def test_verify_runs_cases_for_cuda_and_replays_them(self, gpu, capsys):
        assert main(["verify", "--device", "cuda", "--seed", "3", "--cases", "8"]) == 0
        out = capsys.readouterr().out
        assert "8 cases" in out and "fp32" not in out and "dq" not in out
        assert main(["verify", "--device", "cuda", "--replay", "3"]) == 0
        assert cases.make(3, "cuda").describe() in capsys.readouterr().out

    def test_verify_tells_of_bits_that_change_and_of_inputs_that_do(self, gpu, monkeypatch):
        right = flashdelta.chunk_gated_delta_rule_fwd
        made = (cases.make(seed, "cuda") for seed in range(50))
        case = min((c for c in made if c.operation == "chunk" and c.tensors["q"].size), key=lambda c: c.tensors["v"].size)
        calls = []

        def wrong(**kwargs):
            calls.append(1)
            forward = right(**kwargs)
            kwargs["q"].zero_()
            return forward._replace(o=forward.o + len(calls))

        monkeypatch.setattr(flashdelta, "chunk_gated_delta_rule_fwd", wrong)
        faults = verify.run(case, Stand(), "best").faults
        assert "o: other bits in a second run" in faults and "an input was changed" in faults

    def test_bench_prints_the_floor_and_the_ratio(self, gpu, tmp_path, capsys):
        report = tmp_path / "bench.json"
        assert main(["bench", "--device", "cuda", "--heads", "1/2", "--tokens", "70", "--repeats", "1", "--json", str(report)]) == 0
        out = capsys.readouterr().out
        assert "a GPU" in out and "H200's floor" in out and "time / floor" in out
        (shape,) = json.loads(report.read_text())["shapes"]
        (forward,) = shape["passes"]
        assert forward["pass"] == "forward" and forward["timed_by"] == "wall clock" and forward["floor_set_by"] in ("tensor", "bytes")
        # q, k; v, o; g, beta; A_log, dt_bias; the final state
        moved = 70 * 128 * 2 * (2 * 1 + 2 * 2) + 70 * 2 * 2 * 2 + 2 * 2 * 4 + 2 * 128 * 128 * 4
        assert forward["floor_seconds"] == pytest.approx(flops.cuda_floor(4, moved)[0])

    def test_bench_of_the_cpus_suite_stays_on_the_cpu(self, gpu, capsys):
        assert main(["bench", "--suite", "cpu", "--tokens", "64", "--repeats", "1"]) == 2
        assert gpu == [("cpu", "")] and "--suite cpu" in one_line(capsys)

    @pytest.mark.parametrize(
        ("options", "asked"),
        [([], "auto"), (["--device", "cuda"], "cuda"), (["--backend", "cuda"], "cuda"), (["--backend", "reference"], "cpu")],
    )
    def test_run_places_tensors_where_the_backend_computes(self, gpu, options, asked, tmp_path):
        values = tensors(key_width=128, value_width=128, dtype=DTYPES["bf16"])
        out = tmp_path / "out.safetensors"
        assert main(["run", save(tmp_path / "in.safetensors", values), "--out", str(out), *options]) == 0
        assert gpu == [(asked, "")]
        assert load(out)["o"].shape == values["v"].shape

    def test_run_refuses_a_backend_of_another_device(self, tmp_path, capsys):
        values = save(tmp_path / "in.safetensors", tensors())
        out = str(tmp_path / "out.safetensors")
        assert main(["run", values, "--out", out, "--device", "cuda", "--backend", "cpu"]) == 2
        assert "--device cuda: --backend cpu computes on cpu" in one_line(capsys)


class TestFloor:
    def test_is_the_larger_of_two(self):
        # 64 value heads, 4 sequences of 8192 tokens, 16 key heads: as wide as the tensor cores can be kept busy.
        chunk_heads = 4 * 128 * 64
        moved = 4 * 8192 * 128 * 2 * (2 * 16 + 2 * 64)
        assert flops.cuda_floor(chunk_heads, moved) == (pytest.approx(435e-6, rel=2e-3), "tensor")
        assert flops.cuda_floor(1, 426_000_000) == (pytest.approx(1e-4), "bytes")


class TestEvents:
    class FakeCuda:
        """What CudaEvents asks of torch.cuda: each run of the graph takes 0.5 ms, each eager call 1 ms."""

        def __init__(self, captures):
            self.captures, self.clock = captures, 0.0
            outer = self

            class Event:
                def __init__(self, enable_timing):
                    assert enable_timing

                def record(self):
                    self.at = outer.clock

                def synchronize(self):
                    pass

                def elapsed_time(self, end):
                    return 1e3 * (end.at - self.at)

            class Stream:
                def wait_stream(self, other):
                    pass

            class Graph:
                def replay(self):
                    outer.clock += 5e-4

            class Context:
                def __init__(self, thing):
                    self.refuses = isinstance(thing, Graph) and not captures

                def __enter__(self):
                    if self.refuses:
                        raise RuntimeError("operation not permitted when stream is capturing")

                def __exit__(self, *error):
                    return False

            self.cuda = self
            self.Event, self.Stream, self.CUDAGraph, self.stream, self.graph = Event, Stream, Graph, Context, Context

        def current_stream(self):
            return self.Stream()

        def synchronize(self):
            pass

    @pytest.mark.parametrize(("captures", "how", "seconds"), [(True, "graph", 5e-4), (False, "eager", 1e-3)])
    def test_replays_a_graph_or_calls_where_it_cannot_be_captured(self, captures, how, seconds):
        fake = self.FakeCuda(captures)

        def call():
            fake.clock += 1e-3

        timer = timing.CudaEvents(fake, call)
        assert timer.how == how and timer() == pytest.approx(seconds)
        assert timing.medians({"x": timer}, 3) == {"x": pytest.approx(seconds)}
