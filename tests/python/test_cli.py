"""The program `flashdelta`: what each subcommand prints and writes, its exit codes and its errors."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import flashdelta
import ml_dtypes
import numpy as np
import pytest
from flashdelta.cli import main
from safetensors.numpy import save_file

# Small enough for seconds, long enough for several chunks.
DEMO = ["demo", "--device", "cpu", "--tokens", "200", "--check-tokens", "150", "--decode", "3", "--no-scan"]
BENCH = ["bench", "--device", "cpu", "--heads", "1/2", "--dim", "16/24", "--tokens", "70", "--repeats", "1"]


def one_line(capsys):
    """The only line on stderr."""
    error = capsys.readouterr().err
    assert error.endswith("\n") and error.count("\n") == 1, error
    return error


def tensors(length=5, heads=1, value_heads=2, key_width=8, value_width=6, dtype=np.float32):
    rng = np.random.default_rng(0)
    k = rng.standard_normal((1, length, heads, key_width))
    return {
        "q": rng.standard_normal((1, length, heads, key_width)).astype(dtype),
        "k": (k / np.linalg.norm(k, axis=-1, keepdims=True)).astype(dtype),
        "v": rng.standard_normal((1, length, value_heads, value_width)).astype(dtype),
        "g": -rng.random((1, length, value_heads)).astype(np.float32),
        "beta": rng.random((1, length, value_heads)).astype(np.float32),
    }


def save(path, values):
    save_file(values, path)
    return str(path)


def load(path):
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class TestCommandLine:
    def test_runs_as_a_process_of_its_own(self):
        code = "import sys; from flashdelta.cli import main; sys.exit(main())"
        done = subprocess.run([sys.executable, "-c", code, "info", "--json"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["version"] == flashdelta.info()["version"]

    def test_runs_as_a_module(self):
        done = subprocess.run([sys.executable, "-m", "flashdelta", "--version"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert flashdelta.info()["version"] in done.stdout

    @pytest.mark.parametrize("command", [[], ["info"], ["demo"], ["verify"], ["bench"], ["run"]])
    def test_help_is_given_and_succeeds(self, command, capsys):
        assert main([*command, "--help"]) == 0
        assert "usage" in capsys.readouterr().out.lower()

    def test_version(self, capsys):
        assert main(["--version"]) == 0
        assert flashdelta.info()["version"] in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ([], "COMMAND"),
            (["nothing"], "nothing"),
            (["info", "--no-such-option"], "--no-such-option"),
            (["demo", "--tokens", "0"], "--tokens"),
            (["demo", "--tokens", "many"], "'many'"),
            (["demo", "--threads", "1025"], "--threads"),
            (["demo", "--dtype", "fp8"], "fp8"),
            (["demo", "--text", "/no/such/file"], "/no/such/file"),
            (["verify", "--seconds", "-1"], "--seconds"),
            (["verify", "--seconds", "nan"], "--seconds"),
            (["verify", "--replay", "x"], "--replay"),
            (["bench", "--heads", "16"], "H/HV"),
            (["bench", "--heads", "4/6"], "multiple"),
            (["bench", "--dim", "257"], "1..256"),
            (["bench", "--model", "qwen9"], "qwen9"),
            (["bench", "--model", "qwen3.5-0.8b", "--heads", "1/1"], "--heads"),
            (["bench", "--plot", "times.gif"], ".png or .svg"),
            (["bench", "--json", "/no/such/folder/a.json"], "/no/such/folder"),
            (["bench", "--pass", "sideways"], "sideways"),
            (["run", "in.safetensors"], "--out"),
            (["run", "/no/such/file.safetensors", "--out", "out.safetensors"], "/no/such/file"),
        ],
    )
    def test_bad_usage_is_one_line_and_exit_code_2(self, arguments, named, capsys):
        assert main(arguments) == 2
        line = one_line(capsys)
        assert line.startswith("flashdelta") and "error:" in line and named in line

    def test_cuda_is_refused_by_name_where_it_cannot_run(self, capsys):
        if flashdelta.info()["cuda"]["devices"]:
            pytest.skip("this machine has a GPU")
        assert main(["demo", "--device", "cuda"]) == 2
        assert "--device cuda" in one_line(capsys)

    def test_an_instruction_set_that_this_machine_lacks_is_refused(self, capsys):
        from flashdelta.cli.options import instruction_sets_here

        missing = [name for name in ("baseline", "avx2", "avx512") if name not in instruction_sets_here()]
        if not missing:
            pytest.skip("this machine runs every instruction set")
        assert main(["bench", "--device", "cpu", "--instruction-set", missing[0]]) == 2
        assert missing[0] in one_line(capsys)


class TestInfo:
    def test_table_names_the_backends(self, capsys):
        assert main(["info"]) == 0
        out = capsys.readouterr().out
        assert "cpu" in out and "reference" in out and flashdelta.info()["version"] in out

    def test_json_holds_what_the_library_says_and_versions(self, capsys):
        assert main(["info", "--json"]) == 0
        info = json.loads(capsys.readouterr().out)
        assert info["versions"]["numpy"] == np.__version__
        assert {name: info[name] for name in flashdelta.info()} == flashdelta.info()


class TestDemo:
    def test_text_of_a_file_is_checked_and_timed(self, tmp_path, capsys):
        text = tmp_path / "text.txt"
        text.write_text("Real text, read by the demo. " * 20)
        assert main([*DEMO, "--text", str(text)]) == 0
        out = capsys.readouterr().out
        assert str(text) in out and "OUTSIDE" not in out
        for path in ("prefill, chunked", "prefill, token by token", "decode after prefill"):
            assert path in out
        assert "as fast as token by token" in out

    def test_short_text_is_repeated_and_says_so(self, tmp_path, capsys):
        text = tmp_path / "text.txt"
        text.write_text("abc")
        assert main([*DEMO, "--text", str(text)]) == 0
        assert "repeated" in capsys.readouterr().out

    def test_empty_text_is_refused(self, tmp_path, capsys):
        text = tmp_path / "text.txt"
        text.write_text("")
        assert main([*DEMO, "--text", str(text)]) == 2
        assert "is empty" in one_line(capsys)

    @pytest.mark.parametrize("dtype", ["fp16", "fp32"])
    def test_other_dtypes(self, dtype):
        assert main([*DEMO, "--dtype", dtype]) == 0

    def test_scan_draws_time_against_length(self, monkeypatch, capsys):
        from flashdelta.cli import demo

        monkeypatch.setattr(demo, "LENGTHS", (64, 128, 256))
        assert main(DEMO[:-1]) == 0
        assert "time grows as length^" in capsys.readouterr().out

    def test_an_error_outside_the_contract_fails(self, monkeypatch, capsys):
        from flashdelta.cli import contract

        monkeypatch.setitem(contract.BOUNDS["bf16"], "o", 1e-9)
        assert main(DEMO) == 1
        assert "outside the numerics contract" in one_line(capsys)


class TestVerify:
    def test_a_few_cases_hold(self, capsys):
        assert main(["verify", "--device", "cpu", "--seed", "7", "--cases", "12"]) == 0
        assert "12 cases" in capsys.readouterr().out

    def test_a_failure_prints_its_seed_and_replays(self, monkeypatch, capsys):
        right = flashdelta.fused_recurrent_gated_delta_rule

        def wrong(*args, **kwargs):
            o, final_state = right(*args, **kwargs)
            if kwargs["backend"] != "reference" and o.size:
                o = o + np.ones((), o.dtype)
            return o, final_state

        monkeypatch.setattr(flashdelta, "fused_recurrent_gated_delta_rule", wrong)
        assert main(["verify", "--device", "cpu", "--seed", "0", "--cases", "50", "--max-failures", "1"]) == 1
        out = capsys.readouterr().out
        assert "OUTSIDE" in out and "--replay" in out
        seed = out.split("--replay ")[1].split()[0]
        assert main(["verify", "--device", "cpu", "--replay", seed]) == 1
        assert f"seed {seed}" in capsys.readouterr().out
        monkeypatch.undo()
        assert main(["verify", "--device", "cpu", "--replay", seed]) == 0

    def test_what_the_library_refuses_is_a_failure(self, monkeypatch, capsys):
        def refuses(*args, **kwargs):
            raise ValueError("q: refused")

        monkeypatch.setattr(flashdelta, "chunk_gated_delta_rule_fwd", refuses)
        assert main(["verify", "--device", "cpu", "--seed", "0", "--cases", "20"]) == 1
        assert "ValueError: q: refused" in capsys.readouterr().out


class TestBench:
    def test_table_json_and_plot(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        report, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
        assert main([*BENCH, "--json", str(report), "--plot", str(plot)]) == 0
        assert "1/2" in capsys.readouterr().out
        assert plot.read_text().lstrip().startswith("<?xml")
        (shape,) = json.loads(report.read_text())["shapes"]
        assert [entry["pass"] for entry in shape["passes"]] == ["forward", "backward", "recurrent"]
        forward = shape["passes"][0]
        assert (forward["key_width"], forward["value_width"], forward["tokens"]) == (16, 24, 70)
        assert forward["seconds"] > 0 and forward["gflops"] > 0 and forward["workspace_bytes"] > 0
        assert 0 < forward["share_of_peak"] < 1.5
        assert shape["chunked_over_token_by_token"] > 0 and shape["backward_over_forward"] > 0

    def test_json_on_stdout_is_all_that_is_there(self, capsys):
        assert main([*BENCH, "--pass", "forward", "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out)["shapes"][0]["passes"][0]["pass"] == "forward"

    def test_cpu_suite_measures_every_instruction_set(self, tmp_path):
        from flashdelta.cli.options import instruction_sets_here

        report = tmp_path / "bench.json"
        suite = ["bench", "--device", "cpu", "--suite", "cpu", "--tokens", "64", "--dim", "8", "--repeats", "1", "--threads", "1"]
        assert main([*suite, "--json", str(report)]) == 0
        measured = [entry["passes"][0]["instruction_set"] for entry in json.loads(report.read_text())["shapes"]]
        assert measured == 2 * (instruction_sets_here() or ["best"])


class TestRun:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
    @pytest.mark.parametrize("operation", ["chunk", "recurrent"])
    def test_results_are_those_of_the_python_call(self, operation, dtype, tmp_path):
        values = tensors(dtype=dtype)
        out = tmp_path / "out.safetensors"
        assert (
            main(["run", save(tmp_path / "in.safetensors", values), "--out", str(out), "--operation", operation, "--backend", "cpu"]) == 0
        )
        call = flashdelta.chunk_gated_delta_rule if operation == "chunk" else flashdelta.fused_recurrent_gated_delta_rule
        o, final_state = call(**values, output_final_state=True, backend="cpu")
        got = load(out)
        assert got["o"].dtype == dtype
        np.testing.assert_array_equal(got["o"].astype(np.float64), o.astype(np.float64))
        np.testing.assert_array_equal(got["final_state"], final_state)

    def test_flags_offsets_and_states_reach_the_call(self, tmp_path):
        values = tensors(length=7)
        values |= {
            "cu_seqlens": np.array([1, 4, 4, 6], np.int32),
            "initial_state": np.ones((3, 2, 6, 8), np.float32),
            "A_log": np.zeros(2, np.float32),
            "dt_bias": np.ones(2, np.float32),
        }
        flags = [
            "--use-qk-l2norm-in-kernel",
            "--use-gate-in-kernel",
            "--use-beta-sigmoid-in-kernel",
            "--allow-neg-eigval",
            "--state-v-first",
        ]
        out = tmp_path / "out.safetensors"
        arguments = [save(tmp_path / "in.safetensors", values), "--out", str(out), "--scale", "0.5", "--backend", "reference", *flags]
        assert main(["run", *arguments]) == 0
        named = {flag[2:].replace("-", "_"): True for flag in flags}
        o, final_state = flashdelta.chunk_gated_delta_rule(**values, **named, scale=0.5, output_final_state=True, backend="reference")
        np.testing.assert_array_equal(load(out)["o"], o)
        np.testing.assert_array_equal(load(out)["final_state"], final_state)

    def refused(self, values, tmp_path, capsys, *extra):
        out = tmp_path / "out.safetensors"
        out.write_bytes(b"before")
        assert main(["run", save(tmp_path / "in.safetensors", values), "--out", str(out), *extra]) == 2
        assert out.read_bytes() == b"before"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]
        return one_line(capsys)

    def test_unknown_tensors_are_refused_by_name(self, tmp_path, capsys):
        assert "unknown tensor w;" in self.refused(tensors() | {"w": np.zeros(1, np.float32)}, tmp_path, capsys)

    def test_a_missing_tensor_is_refused_by_name(self, tmp_path, capsys):
        values = tensors()
        del values["v"]
        assert "v is missing" in self.refused(values, tmp_path, capsys)

    def test_the_librarys_refusal_is_shown(self, tmp_path, capsys):
        values = tensors()
        values["v"] = values["v"][:, :-1].copy()
        assert "error: v:" in self.refused(values, tmp_path, capsys)

    def test_a_wrong_dtype_is_refused(self, tmp_path, capsys):
        values = tensors()
        values["beta"] = np.zeros(values["beta"].shape, np.int32)
        assert "beta" in self.refused(values, tmp_path, capsys)

    def test_a_scale_that_is_no_number_is_refused(self, tmp_path, capsys):
        assert "--scale" in self.refused(tensors(), tmp_path, capsys, "--scale", "nan")

    @pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64])
    def test_what_is_no_safetensors_file_is_refused(self, content, tmp_path, capsys):
        path = tmp_path / "in.safetensors"
        path.write_bytes(content)
        assert main(["run", str(path), "--out", str(tmp_path / "out.safetensors")]) == 2
        assert "in.safetensors" in one_line(capsys)
        assert not (tmp_path / "out.safetensors").exists()

    def test_a_directory_is_no_output(self, tmp_path, capsys):
        assert main(["run", save(tmp_path / "in.safetensors", tensors()), "--out", str(tmp_path)]) == 2
        assert "is a directory" in one_line(capsys)

    def test_output_is_an_ordinary_file(self, tmp_path):
        out = tmp_path / "out.safetensors"
        assert main(["run", save(tmp_path / "in.safetensors", tensors()), "--out", str(out), "--backend", "reference"]) == 0
        other = tmp_path / "other"
        other.touch()
        assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(Path(other).stat().st_mode)
