"""Rejection sampling, fresh comparisons and the chat, from tiny trained models."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest

from hhjax.clinic.gold import Raters
from hhjax.data.comparisons import ComparisonData, read_comparisons
from hhjax.data.tokenizer import load_tokenizer
from hhjax.fields import ConfigError
from hhjax.io.metrics import read_events, read_rows
from hhjax.loops.chat import talk
from hhjax.loops.elo import run as run_elo
from hhjax.loops.sampling import load_prompts, run_best_of_n, run_comparisons
from hhjax.model.generate import Sampling
from hhjax.stages import BestOfN, Comparisons, Elo, Preempted

PAIRS = ComparisonData(sources=("pairs.jsonl",))
SMALL = {"data": PAIRS, "prompt_len": 32, "sampling": Sampling(8), "batch_size": 16}


def test_best_of_n_gains_with_n(pipeline, context, tmp_path):
    stage = BestOfN("best", policy=str(pipeline["lm"]), reward=str(pipeline["pm"]), tests=(str(pipeline["pm_test"]),), ns=(1, 2, 8),
                    prompts=10, **SMALL)  # fmt: skip
    run_best_of_n(stage, context(stage, tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "evals" / "best_of_n.json").read_text())
    assert found["prompts"] == 10 and [row["n"] for row in found["rows"]] == [1, 2, 8]
    means = [row["scores"]["reward"]["mean"] for row in found["rows"]]
    assert abs(means[0]) < 1e-6 and means[0] < means[1] < means[2]
    assert found["rows"][0]["scores"]["reward"]["se"] < 1e-6  # of the gain, which one reply has none of
    assert found["rows"][2]["kl"] == pytest.approx(np.log(8) - 7 / 8)
    rows = read_rows(tmp_path / "run" / "samples" / "best_of_n.jsonl")
    assert len(rows) == 10 and np.mean([r["score"] for r in rows]) == pytest.approx(means[2], abs=1e-5)
    assert "best of n" in (tmp_path / "run" / "evals" / "table.txt").read_text()


def make_comparisons(pipeline, **changes) -> Comparisons:
    policies = (str(pipeline["lm"]), str(pipeline["lm"]))
    fields = {"policies": policies, "labeler": str(pipeline["pm"]), "prompts": 40} | SMALL | changes
    return Comparisons("fresh", **fields)


def test_fresh_comparisons_are_read_like_any_others(pipeline, context, tmp_path):
    stage = make_comparisons(pipeline, noise=0.0)
    run_comparisons(stage, context(stage, tmp_path / "run"))
    path = tmp_path / "run" / "comparisons.jsonl.gz"
    rows, report = read_comparisons(path, strict=True)
    [data] = [e for e in read_events(tmp_path / "run") if e["event"] == "data"]
    dropped = sum(data[f"dropped_{name}"] for name in ("equal", "empty", "turn_marker"))
    assert len(rows) == report.kept == data["comparisons"] == 40 - dropped and len(rows) > 20
    with gzip.open(path, "rt") as f:
        scores = [json.loads(line)["scores"] for line in f]
    assert all(win > lose for win, lose in scores)  # without noise the labeler's better one wins


def test_raters_label_by_what_they_read(pipeline, context, tmp_path):
    raters = Raters(gold=lambda prompt, reply: float(len(reply)), noise=0)
    stage = make_comparisons(pipeline, labeler=None, raters=raters)
    run_comparisons(stage, context(stage, tmp_path / "run"))
    rows, _ = read_comparisons(tmp_path / "run" / "comparisons.jsonl.gz")
    assert len(rows) > 20 and all(len(row.chosen) >= len(row.rejected) for row in rows)
    with pytest.raises(ConfigError, match="give one of them"):
        make_comparisons(pipeline, raters=raters)


def test_best_of_n_reports_what_is_watched(pipeline, context, tmp_path):
    def lengths(prompts, replies):
        assert len(prompts) == len(replies) and all(p.endswith("Assistant:") for p in prompts)
        return {"length": [len(r) for r in replies], "partly": [float("nan"), *[0.0] * (len(replies) - 1)]}

    stage = BestOfN("best", policy=str(pipeline["lm"]), reward=str(pipeline["pm"]), ns=(1, 4), prompts=6, watch=lengths, **SMALL)
    run_best_of_n(stage, context(stage, tmp_path / "run"))
    rows = json.loads((tmp_path / "run" / "evals" / "best_of_n.json").read_text())["rows"]
    assert set(rows[1]["scores"]) == {"reward", "watch/length"} and abs(rows[0]["scores"]["watch/length"]["mean"]) < 1e-6


def test_noise_turns_some_labels(pipeline, context, tmp_path):
    stage = make_comparisons(pipeline, noise=1e6)
    run_comparisons(stage, context(stage, tmp_path / "run"))
    with gzip.open(tmp_path / "run" / "comparisons.jsonl.gz", "rt") as f:
        scores = [json.loads(line)["scores"] for line in f]
    share = np.mean([win > lose for win, lose in scores])
    assert 0.2 < share < 0.8


def test_the_best_of_each_policy_is_compared(pipeline, context, tmp_path):
    mean = {}
    for name, best_of in (("one", 1), ("eight", 8)):
        ranker = {"ranker": str(pipeline["pm"])} if best_of > 1 else {}
        stage = make_comparisons(pipeline, best_of=best_of, **ranker)
        run_comparisons(stage, context(stage, tmp_path / name))
        with gzip.open(tmp_path / name / "comparisons.jsonl.gz", "rt") as f:
            mean[name] = np.mean([json.loads(line)["scores"] for line in f])
    assert mean["eight"] > mean["one"]
    with pytest.raises(ConfigError, match="need each other"):
        make_comparisons(pipeline, best_of=4)


def test_a_chat_answers_each_line(pipeline, capsys):
    turns = talk(str(pipeline["lm"]), Sampling(6), lines=["the cat sat", "and then", "", "not read"])
    assert [t.role for t in turns] == ["Human", "Assistant"] * 2
    assert capsys.readouterr().out.count("Assistant:") == 2
    assert talk(str(pipeline["lm"]), Sampling(6), lines=["the cat sat", "and then"]) == turns


def test_fresh_comparisons_may_be_the_prompts_of_the_next_stage(pipeline, context, tmp_path):
    first = make_comparisons(pipeline)
    run_comparisons(first, context(first, tmp_path / "fresh"))
    stage = make_comparisons(pipeline, data=ComparisonData(sources=("fresh",)), prompts=5)
    ctx = context(stage, tmp_path / "next")
    run_comparisons(stage, replace(ctx, parents={**ctx.parents, "fresh": tmp_path / "fresh"}))
    assert read_comparisons(tmp_path / "next" / "comparisons.jsonl.gz", strict=True)[0]


def test_fresh_prompts_are_not_those_that_ppo_takes_first(pipeline, context, tmp_path):
    """With one seed and one source the two draw from different streams."""
    stage = make_comparisons(pipeline, prompts=16)
    ctx = context(stage, tmp_path / "run")
    run_comparisons(stage, ctx)
    fresh = {row.prompt for row in read_comparisons(tmp_path / "run" / "comparisons.jsonl.gz")[0]}
    source = load_prompts(PAIRS, "train", ctx, load_tokenizer(pipeline["lm"]), 32, 16)
    first = {source.prompts[row] for row in source._epoch(ctx.seed, 0)[0]}
    assert len(first) == 16 and len(fresh) > 8 and len(fresh & first) < len(fresh) / 2


def test_sampling_stops_when_told(pipeline, context, tmp_path):
    stage = make_comparisons(pipeline)
    with pytest.raises(Preempted, match="done anew"):
        run_comparisons(stage, context(stage, tmp_path / "run", stop_after=2))


def test_tranches_of_one_seed_have_prompts_and_noise_of_their_own(pipeline, context, tmp_path):
    read = {}
    for name, skip, prompts in (("first", 0, 12), ("second", 12, 12), ("all", 0, 24)):
        stage = make_comparisons(pipeline, skip=skip, prompts=prompts, noise=0.0)
        run_comparisons(stage, context(stage, tmp_path / name))
        read[name] = [row.prompt for row in read_comparisons(tmp_path / name / "comparisons.jsonl.gz", strict=True)[0]]
    assert len(read["first"]) > 6 and len(read["second"]) > 6 and not set(read["first"]) & set(read["second"])
    both = set(read["first"]) | set(read["second"])
    assert len(both & set(read["all"])) > 12  # one order, cut into tranches (equal replies are dropped here and there)
    stage = make_comparisons(pipeline, skip=10**6)
    with pytest.raises(ConfigError, match="leaves none of the"):
        run_comparisons(stage, context(stage, tmp_path / "none"))


# Elo ------------------------------------------------------------------------------------------------------------------


def test_elo_knows_whom_the_raters_like(pipeline, context, tmp_path):
    """Two models (one a PM's trunk, which speaks too) before raters who like length."""
    raters = Raters(gold=lambda prompt, reply: float(len(reply)), noise=1)
    stage = Elo("elo", policies=(str(pipeline["lm"]), str(pipeline["pm_test"])), raters=raters, guesses=(str(pipeline["pm"]),), **SMALL | {"prompts": 24})
    run_elo(stage, context(stage, tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "evals" / "elo.json").read_text())
    first, second = found["rows"]
    assert first["elo"] == 0 and first["policy"] == str(pipeline["lm"]) and first["guesses"]["".join(stage.guesses)]["value"] == 0
    assert first["won"] + second["won"] == first["played"] == second["played"] <= 24
    samples = read_rows(tmp_path / "run" / "samples" / "elo.jsonl")
    longer = [len(b) - len(a) for a, b in (row["replies"] for row in samples) if a != b]
    assert len(longer) == first["played"]
    # Characters are many nats apart, so the longer one all but always wins; of equally long ones either may.
    assert sum(x > 0 for x in longer) <= second["won"] + 1 and second["won"] <= sum(x >= 0 for x in longer) + 1
    assert "Elo above" in (tmp_path / "run" / "evals" / "table.txt").read_text()


def test_elo_needs_two_policies():
    with pytest.raises(ConfigError, match="at least two"):
        Elo("elo", policies=("runs/lm",))
