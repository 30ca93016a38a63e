"""What the benchmarks time is what they say: lengths, layouts, rates that follow from the seconds."""

import numpy as np
import pytest

from hhjax import bench
from hhjax.data.stream import PairSource
from hhjax.model.transformer import RunConfig
from hhjax.roofline import forward_flops, lm_step_flops, pm_step_flops

TINY = {"layers": 1, "width": 32, "heads": 2, "mlp_width": 64, "vocab": 64, "batch": 8, "prompt": 12, "response": 8, "repeats": 1, "warmup": 1}

CEILING = 1e6  # FLOP/s, so low that a share of it has digits


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    monkeypatch.setattr(bench, "matmul_ceiling", lambda *a: CEILING)
    monkeypatch.setattr(bench, "copy_ceiling", lambda *a: 1e10)


def test_comparisons_have_the_lengths_asked_for():
    fixed = PairSource(bench.draw_comparisons(bench.PMBench(**TINY), 5), bench.Numbers(), 20, 4).take(np.arange(4))
    assert fixed.chosen.prompt_len.tolist() == [12] * 4 and fixed.chosen.length.tolist() == fixed.rejected.length.tolist() == [20] * 4
    hh = PairSource(bench.draw_comparisons(bench.PMBench(**TINY | {"lengths": "hh"}), 2000), bench.Numbers(), 2048, 4).take(np.arange(2000))
    prompts, replies = hh.chosen.prompt_len, hh.chosen.length - hh.chosen.prompt_len
    np.testing.assert_allclose(np.quantile(prompts, [0.2, 0.5, 0.8]), [22, 96, 207], rtol=0.15)
    np.testing.assert_allclose([prompts.mean(), replies.mean()], [128, 50], rtol=0.15)


def test_preference_models():
    rows = {packed: bench.pm(bench.PMBench(**TINY | {"batch": 32}, lengths="hh", packed=packed)) for packed in (True, False)}
    assert 0.5 < rows[False]["useful_share"] < rows[True]["useful_share"] <= 1
    full = bench.pm(bench.PMBench(**TINY | {"prompt": 48}))  # 48 + 8 + 8 tokens fill a row of 64
    assert full["useful_share"] == 1.0 and full["shapes"] == 1
    work = pm_step_flops(bench.PMBench(**TINY).shape(), 8, 64, read=2 * 8)
    assert full["share_of_ceiling"] * CEILING * full["mean_s"] == pytest.approx(work, rel=0.02)


def test_the_others():
    lm, drawn, scored, ppo = (f(kind(**TINY)) for f, kind in
                              ((bench.lm, bench.Bench), (bench.sampling, bench.GenerateBench), (bench.score, bench.Bench), (bench.ppo, bench.PPOBench)))  # fmt: skip
    shape = bench.Bench(**TINY).shape()
    assert lm["share_of_ceiling"] * CEILING * lm["mean_s"] == pytest.approx(lm_step_flops(shape, 8, 20), rel=0.02)
    assert scored["share_of_ceiling"] * CEILING * scored["median_s"] == pytest.approx(forward_flops(shape, 8, 20, read=1), rel=0.02)
    assert drawn["prefill_s"] > 0 and ppo["first_step_s"] > ppo["median_s"] > ppo["train_s"]
    assert all(row["memory_gib"] > 0 and row["batch"] == 8 for row in (lm, drawn, scored, ppo))


@pytest.mark.parametrize("kind, wrong, message", [
    (bench.Bench, {"repeats": 0}, "repeats 0; give at least 1"),
    (bench.Bench, {"width": 30, "heads": 4}, "width 30 is no multiple of heads 4"),
    (bench.GenerateBench, {"response": 1}, "at least 2"),
    (bench.GenerateBench, {"copies": 3}, "copies 3 do not divide a batch of 8"),
    (bench.GenerateBench, {"slots": 3}, "do not divide a batch of 8"),
])  # fmt: skip
def test_what_cannot_be_timed_is_refused_at_once(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**TINY | wrong)


def test_more_slots_than_rows_are_the_rows():
    assert bench.GenerateBench(**TINY, slots=99).slots_used() == 8
    row = bench.sampling(bench.GenerateBench(**TINY, slots=99))
    assert row["slot_occupancy"] == 1.0  # no reply stops


def test_ragged_replies_leave_and_make_room():
    few, all_at_once = (bench.sampling(bench.GenerateBench(**TINY | {"batch": 64, "response": 32}, mean_length=6, slots=s)) for s in (8, 0))
    assert few["mean_reply"] == all_at_once["mean_reply"] == pytest.approx(6, rel=0.3)  # the same replies
    assert all_at_once["slot_occupancy"] < 0.4 < 0.6 < few["slot_occupancy"] <= 1


def test_prompts_of_hh_s_lengths_are_packed():
    cfg = bench.PPOBench(**TINY | {"batch": 256, "prompt": 96, "response": 16}, lengths="hh", packed=True)
    plain = (bench.prompt_lengths(cfg, np.random.default_rng(0)) + 16).mean() / (96 + 16)
    assert plain + 0.05 < bench.ppo(cfg)["useful_share"] <= 1


def test_a_trace_is_written(tmp_path):
    bench.score(bench.Bench(**TINY, profile=str(tmp_path)))
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_benchmark_runs_the_model_as_it_is_told():
    told = dict(dtype="float32", remat="full", unroll=2, attention="plain")
    assert bench.Bench(**told).run() == RunConfig(**told)
