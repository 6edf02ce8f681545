"""What the program's commands share: the layer, the contract's measure, random cases, the size of terms, fits and counts."""

import flashdelta
import numpy as np
import pytest
from flashdelta.cli import cases, chunk_terms, contract, flops, plots, terms, text
from flashdelta.cli.dtypes import DTYPES
from flashdelta.cli.errors import UsageError
from flashdelta.cli.layer import Layer, concatenate
from flashdelta.cli.models import MODELS

TOKENS = np.frombuffer(b"The layer reads bytes of real text, one after another.", np.uint8)


class TestLayer:
    def test_has_the_models_shape(self):
        inputs = Layer().inputs(TOKENS)
        assert inputs.q.shape == inputs.k.shape == inputs.v.shape == (1, len(TOKENS), 16, 128)
        assert inputs.g.shape == inputs.beta.shape == (1, len(TOKENS), 16)
        assert {x.dtype for x in inputs.as_kwargs().values()} == {DTYPES["bf16"]}

    def test_one_token_at_a_time_gives_the_same_bits(self):
        layer = Layer()
        whole = layer.inputs(TOKENS)
        steps = concatenate([layer.inputs(TOKENS[t : t + 1], before=TOKENS[:t]) for t in range(len(TOKENS))])
        for name, x in whole.as_kwargs().items():
            assert x.tobytes() == getattr(steps, name).tobytes(), name

    def test_convolution_blocks_do_not_show(self, monkeypatch):
        from flashdelta.cli import layer as module

        whole = Layer().inputs(TOKENS)
        monkeypatch.setattr(module, "CONV_BLOCK", 7)
        assert Layer().inputs(TOKENS).q.tobytes() == whole.q.tobytes()

    def test_seed_decides(self):
        assert Layer(seed=1).inputs(TOKENS).q.tobytes() == Layer(seed=1).inputs(TOKENS).q.tobytes()
        assert Layer(seed=1).inputs(TOKENS).q.tobytes() != Layer(seed=2).inputs(TOKENS).q.tobytes()

    def test_gate_parameters_are_within_the_familys_ranges(self):
        layer = Layer(MODELS["qwen3.5-27b"])
        assert np.all((np.exp(layer.A_log) >= 1.0) & (np.exp(layer.A_log) <= 16.0))
        steps = np.log1p(np.exp(layer.dt_bias.astype(np.float64)))
        assert np.all((steps >= 0.00099) & (steps <= 0.101))


class TestContract:
    def test_relative_error_of_the_whole_tensor(self):
        exact = np.full((4, 25), 2.0)
        got = exact.astype(np.float32)
        got[0, 0] += 0.2
        assert contract.error("o", got, exact, np.dtype(np.float32)).value == pytest.approx(0.01, rel=1e-5)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_nan_and_inf_fail_whatever_the_bound(self, bad):
        got = np.array([1.0, bad], np.float32)
        error = contract.error("o", got, np.array([1.0, bad]), np.dtype(np.float32))
        assert not error.ok and error.used == float("inf")

    def test_a_wrong_shape_fails(self):
        assert not contract.error("o", np.zeros(3, np.float32), np.zeros(4), np.dtype(np.float32)).ok

    def test_exact_zero_asks_for_zero(self):
        assert contract.error("dg", np.zeros(3, np.float32), np.zeros(3), np.dtype(np.float32)).ok
        assert not contract.error("dg", np.full(3, 1e-6, np.float32), np.zeros(3), np.dtype(np.float32)).ok

    def test_terms_take_over_where_they_cancel(self):
        got = np.full(3, 1e-6, np.float32)
        assert contract.error("dg", got, np.zeros(3), np.dtype(np.float32), terms=1.0).ok
        assert not contract.error("dg", got, np.zeros(3), np.dtype(np.float32), terms=1e-4).ok

    def test_an_output_that_is_rounded_more_coarsely_has_its_own_bound(self):
        bf16 = DTYPES["bf16"]
        assert contract.bound("dg", np.dtype(np.float32), bf16) == contract.BOUNDS["bf16"]["dg"]
        assert contract.bound("dg", bf16, np.dtype(np.float32)) == contract.BOUNDS["bf16"]["dg"]

    def test_fp16_is_not_held_to_what_it_cannot_hold(self):
        exact = np.full(100, 1e-8)
        assert contract.error("o", exact.astype(np.float16), exact, np.dtype(np.float16)).ok

    def test_an_infinity_stands_for_what_fp16_cannot_hold_and_for_nothing_else(self):
        exact = np.array([1e5, -1e5, 65504.0, 1.0])
        fp16 = np.dtype(np.float16)
        assert contract.error("dk", np.array([np.inf, -np.inf, 65504.0, 1.0], np.float16), exact, fp16).ok
        for wrong in ([-np.inf, -np.inf, 65504.0, 1.0], [np.inf, -np.inf, 65504.0, np.inf], [5e4, -5e4, 65504.0, 1.0]):
            assert not contract.error("dk", np.array(wrong, np.float16), exact, fp16).ok

    def test_what_float32_loses_of_a_chunks_terms_is_allowed(self):
        got = np.full(3, 1e-7, np.float32)
        assert contract.error("dg", got, np.zeros(3), np.dtype(np.float32), chunk_terms=1.0).ok
        assert not contract.error("dg", got, np.zeros(3), np.dtype(np.float32), chunk_terms=0.1).ok


class TestCases:
    def test_a_seed_is_a_case(self):
        for seed in range(30):
            one, two = cases.make(seed), cases.make(seed)
            assert one.describe() == two.describe()
            for name, x in one.tensors.items():
                assert (x is None) == (two.tensors[name] is None)
                assert x is None or x.tobytes() == two.tensors[name].tobytes()

    def test_edges_come_up(self):
        made = [cases.make(seed) for seed in range(300)]
        lengths = {case.tensors["q"].shape[1] for case in made}
        assert {0, 1, 63, 64, 65} <= lengths
        assert {case.operation for case in made} == {"chunk", "recurrent"}
        assert any(not case.covered.all() for case in made)
        assert any(case.tensors["v"].shape[2] > case.tensors["q"].shape[2] for case in made)
        assert any(not case.tensors["q"].flags.c_contiguous for case in made)
        gates = [case.tensors["g"] for case in made if case.tensors["g"] is not None]
        assert any(np.isneginf(np.asarray(g, np.float64)).any() for g in gates)

    def test_tokens_of_no_sequence_hold_nan(self):
        case = next(case for case in map(cases.make, range(300)) if not case.covered.all())
        assert np.isnan(np.asarray(case.tensors["q"], np.float64)[:, ~case.covered]).all()


class TestTerms:
    def reference(self, case):
        wide = {n: x.astype(np.float64) if x is not None and n != "cu_seqlens" else x for n, x in case.tensors.items()}
        o, final_state = flashdelta.chunk_gated_delta_rule(**wide, **case.flags, output_final_state=True, backend="reference")
        do, dht = (None if x is None else x.astype(np.float64) for x in (case.do, case.dht))
        gradients = flashdelta.chunk_gated_delta_rule_bwd(**wide, do=do, dht=dht, **case.flags, backend="reference")
        return {"o": o, "final_state": final_state} | {n: x for n, x in gradients._asdict().items() if x is not None}

    def test_are_about_as_large_as_what_they_sum_to(self):
        by_token, by_chunk = {}, {}
        for case in (case for case in map(cases.make, range(60)) if case.operation == "chunk"):
            norms = terms.norms(case)
            for name, x in self.reference(case).items():
                size = np.linalg.norm(np.ravel(x))
                if size > 1e-20:
                    limit = contract.bound(name, case.tensors["q"].dtype, case.tensors["q"].dtype)
                    by_token.setdefault(name, []).append(norms.by_token[name] / size)
                    by_chunk.setdefault(name, []).append(chunk_terms.ROUNDING / limit * norms.by_chunk[name] / size)
        # Otherwise the rule for cancelling terms would loosen the contract for outputs that do not cancel.
        for name in by_token:
            assert 0.3 < np.median(by_token[name]) < 4.0, name
            assert np.median(by_chunk[name]) < 0.1, name


class TestNumbers:
    def test_exponent_of_a_power(self):
        lengths = [1024, 2048, 4096]
        assert plots.exponent(lengths, [3e-6 * n for n in lengths]) == pytest.approx(1.0)
        assert plots.exponent(lengths, [3e-6 * n**2 for n in lengths]) == pytest.approx(2.0)

    def test_text_plot_has_both_axes(self):
        drawn = plots.text([1024, 2048], [1.0, 2.0], "tokens", "ms")
        assert "2k" in drawn and "tokens" in drawn and "ms" in drawn

    def test_flops_of_one_chunk_at_width_128(self):
        # 3 full products of 2.10 MFLOP, and 4 triangular ones of half of 1.05 MFLOP and a diagonal.
        assert 64 * flops.forward_per_token(128, 128) == pytest.approx(3 * 2.097e6 + 4 * 0.532e6, rel=1e-3)
        assert 64 * flops.cpu_forward_per_token(128, 128) == pytest.approx(3 * 2.097e6 + 4 * 0.270e6, rel=1e-3)

    def test_text_is_repeated_to_length(self):
        assert text.tokens(b"abc", 7).tobytes() == b"abcabca"

    def test_documentation_or_the_package_itself_is_at_hand(self):
        _, data = text.load(None)
        assert len(data) > 1000

    def test_plot_paths_are_checked_first(self):
        with pytest.raises(UsageError, match="must end in"):
            plots.check_path("a.pdf", "--plot")
