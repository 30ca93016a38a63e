"""What the benchmarks time is what they say: lengths, layouts, rates that follow from the seconds."""

import numpy as np
import pytest

from hhjax import bench
from hhjax.data.stream import PairSource

TINY = {"layers": 1, "width": 32, "heads": 2, "mlp_width": 64, "vocab": 64, "batch": 8, "prompt": 12, "response": 8, "repeats": 1, "warmup": 1}


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    monkeypatch.setattr(bench, "matmul_ceiling", lambda *a: 1e12)
    monkeypatch.setattr(bench, "copy_ceiling", lambda *a: 1e10)


def test_comparisons_have_the_lengths_asked_for():
    fixed = PairSource(bench.draw_comparisons(bench.PMBench(**TINY), 5), bench.Numbers(), 20, 4).take(np.arange(4))
    assert fixed.chosen.prompt_len.tolist() == [12] * 4 and fixed.chosen.length.tolist() == fixed.rejected.length.tolist() == [20] * 4
    hh = PairSource(bench.draw_comparisons(bench.PMBench(**TINY | {"lengths": "hh"}), 2000), bench.Numbers(), 2048, 4).take(np.arange(2000))
    prompts, replies = hh.chosen.prompt_len, hh.chosen.length - hh.chosen.prompt_len
    np.testing.assert_allclose(np.quantile(prompts, [0.2, 0.5, 0.8]), [22, 96, 207], rtol=0.15)
    np.testing.assert_allclose([prompts.mean(), replies.mean()], [128, 50], rtol=0.15)
    with pytest.raises(ValueError, match="choose fixed or hh"):
        bench.draw_comparisons(bench.PMBench(lengths="short"), 1)


def test_preference_models():
    rows = {packed: bench.pm(bench.PMBench(**TINY | {"batch": 32}, lengths="hh", packed=packed)) for packed in (True, False)}
    for row in rows.values():
        assert row["pairs_per_s"] == pytest.approx(32 / row["mean_s"], rel=0.1) and row["best_s"] <= row["median_s"] and row["shapes"] >= 1
    assert 0.5 < rows[False]["useful_share"] < rows[True]["useful_share"] <= 1
    assert bench.pm(bench.PMBench(**TINY | {"prompt": 48}))["useful_share"] == 1.0  # 48 + 8 + 8 tokens fill a row of 64


def test_the_others():
    lm, drawn, scored, ppo = (f(kind(**TINY)) for f, kind in
                              ((bench.lm, bench.Bench), (bench.sampling, bench.Bench), (bench.score, bench.Bench), (bench.ppo, bench.PPOBench)))  # fmt: skip
    assert lm["tokens_per_s"] == pytest.approx(8 * 20 / lm["median_s"], rel=0.05) and lm["compile_s"] > 0
    assert drawn["tokens_per_s"] == pytest.approx(8 * 8 / drawn["median_s"], rel=0.1) and drawn["prefill_s"] > 0
    assert scored["rows_per_s"] == pytest.approx(8 / scored["median_s"], rel=0.1)
    assert ppo["samples_per_s"] == pytest.approx(8 / ppo["median_s"], rel=0.05) and ppo["first_step_s"] > ppo["median_s"]
    assert all(row["memory_gib"] > 0 and row["batch"] == 8 for row in (lm, drawn, scored, ppo))


def test_a_trace_is_written(tmp_path):
    bench.score(bench.Bench(**TINY, profile=str(tmp_path)))
    assert list(tmp_path.rglob("*.xplane.pb"))
