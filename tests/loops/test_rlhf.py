"""The PPO loop: it raises its reward, says what happens, and no interruption shows in what it leaves behind."""

import json
import pickle
import random
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from hhjax.data.comparisons import ComparisonData
from hhjax.data.packing import ReplyPacker
from hhjax.fields import ConfigError
from hhjax.io import checkpoint
from hhjax.io.metrics import TIMING, read_events, read_rows
from hhjax.loops import phases, rlhf
from hhjax.loops.supervised import load_model
from hhjax.model.generate import Sampling
from hhjax.objectives.kl import KLConfig
from hhjax.sharding import MeshConfig, make_mesh
from hhjax.stages import PPO, Preempted
from hhjax.train.state import OptimConfig
from hhjax.types import Tokens, Vocabulary

PAIRS = ComparisonData(sources=("pairs.jsonl",))
STEPS = 6


def make_ppo(pipeline, **changes) -> PPO:
    # At a rate of 1e-3 the policy ends nearly uniform over its vocabulary, where a sampled token changes with the last digits of a
    # sum: two meshes that agree to 1e-5 then take different samples, and all that follows differs.
    stage = PPO("ppo", policy=str(pipeline["lm"]), reward=str(pipeline["pm"]), tests=(str(pipeline["pm_test"]),), data=PAIRS,
                prompt_len=32, sampling=Sampling(12), batch_size=16, steps=STEPS, epochs=2, minibatches=2, save_every=2,
                eval_every=3, eval_prompts=20, optim=OptimConfig(1e-4), value_optim=OptimConfig(1e-4),
                kl=KLConfig(0.01, target=0.5, horizon=100), mesh=MeshConfig(2, 2, 2), packed=True)  # fmt: skip
    return replace(stage, **changes)


@pytest.fixture(scope="module")
def finished(pipeline, context, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo") / "run"
    stage = make_ppo(pipeline)
    rlhf.run(stage, context(stage, folder))
    return folder


def without_times(folder):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(folder / "metrics.jsonl")]


def iterations(folder):
    return [row for row in read_rows(folder / "metrics.jsonl") if "score" in row]


def test_a_row_says_all_that_a_researcher_asks(finished, pipeline):
    rows = iterations(finished)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    test = f"test/{pipeline['pm_test']}"
    wanted = {"score", "score_p10", "score_p50", "score_p90", test, f"{test}_p50", "kl_k1", "kl_k3", "sqrt_kl", "beta",
              "policy_loss", "value_loss", "loss", "explained_variance", "clip_fraction", "ratio_max", "log_ratio_max",
              "first_log_ratio_max", "entropy", "length", "stop_rate", "repeated_3grams", "grad_norm", "grad_norm_policy",
              "grad_norm_value", "generate_s", "score_s", "train_s", "read_s", "generate_tokens_per_s", "score_tokens_per_s",
              "train_tokens_per_s", "samples_per_s", "memory_gib", "tokens"}  # fmt: skip
    assert not wanted - set(rows[-1])
    for row in rows:
        assert row["first_log_ratio_max"] < 1e-4  # the policy that sampled is the policy that is trained
        assert 0 <= row["clip_fraction"] <= 1 and row["kl_k3"] >= 0 and 1 <= row["length"] <= 12
        assert row["score_p10"] <= row["score_p50"] <= row["score_p90"]
    assert abs(rows[0]["kl_k1"]) < 1e-3 < rows[-1]["kl_k3"]  # it starts at its reference, and moves


def test_beta_follows_its_target(finished):
    rows = iterations(finished)
    for before, after in zip(rows, rows[1:]):
        factor = 1 + np.clip(before["kl_k1"] / 0.5 - 1, -0.2, 0.2) * 16 / 100
        assert after["beta"] == pytest.approx(before["beta"] * factor)
    assert rows[0]["beta"] == 0.01


def test_held_out_scores_start_at_zero(finished, pipeline):
    """The mean that the PM gives the initial policy is subtracted."""
    looks = [row for row in read_rows(finished / "metrics.jsonl") if "eval/score" in row]
    assert [row["step"] for row in looks] == [0, 3, 6]
    assert abs(looks[0]["eval/score"]) < 1e-5 and abs(looks[0][f"eval/test/{pipeline['pm_test']}"]) < 1e-5
    assert looks[0]["eval/kl_exact"] == pytest.approx(0, abs=1e-4) and looks[-1]["eval/kl_exact"] > 0
    [offsets] = [e for e in read_events(finished) if e["event"] == "offsets"]
    assert offsets["reward"] != 0


def test_samples_keep_transcripts_and_scores(finished):
    first, last = (read_rows(finished / "samples" / f"{n:06}.jsonl") for n in (0, STEPS))
    assert len(first) == len(last) == 20
    for a, b in zip(first, last):
        assert a["prompt"] == b["prompt"] and a["prompt"].endswith("Assistant:") and a["length"] >= 1
    assert np.mean([r["score"] for r in first]) == pytest.approx(0, abs=1e-3)
    assert [r["reply"] for r in first] != [r["reply"] for r in last]


def test_what_is_watched_is_logged_of_the_very_replies(pipeline, context, tmp_path, monkeypatch):
    def watch(prompts, replies):
        return {"words": [len(r.split()) for r in replies], "never": [np.nan] * len(replies),
                "half": [i % 2 or np.nan for i in range(len(replies))]}  # fmt: skip

    def paired(stage, prompts, rows, tok):  # each prompt is its row's, which may have lost its start
        ends = [tok.decode(ids[:n].tolist()) for ids, n in zip(rows.tokens, rows.prompt_len)]
        assert len(set(prompts)) == len(ends) and all(len(end) > 20 and p.endswith(end) for p, end in zip(prompts, ends))
        return real(stage, prompts, rows, tok)

    real = rlhf.watched
    monkeypatch.setattr(rlhf, "watched", paired)
    stage = make_ppo(pipeline, watch=watch, steps=2, eval_every=0, rollout_mesh=MeshConfig(4, 1, 2))
    rlhf.run(stage, context(stage, tmp_path / "run"))
    rows = iterations(tmp_path / "run")
    for row in rows:
        assert row["watch/half"] == 1 and "watch/never" not in row and row["watch/words"] > 0
    last = read_rows(tmp_path / "run" / "samples" / "000002.jsonl")
    assert all(row["watch/words"] == len(row["reply"].split()) for row in last) and "watch/never" not in last[0]
    [look] = [r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval/score" in r and r["step"] == 2]
    assert look["eval/watch/words"] == pytest.approx(np.mean([row["watch/words"] for row in last]))


def test_nothing_is_compiled_after_the_first_iteration_but_for_new_shapes(pipeline, context, tmp_path, monkeypatch):
    compiled, seen, real = [], [], rlhf.iterate

    def counted(*args):
        before = len(compiled)
        found = real(*args)
        seen.append((found[3], len(compiled) - before))
        return found

    listen = lambda name, *_, **__: compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None  # noqa: E731
    monkeypatch.setattr(rlhf, "iterate", counted)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        stage = make_ppo(pipeline, steps=8, epochs=1, minibatches=1, eval_every=0, save_every=0)
        rlhf.run(stage, context(stage, tmp_path / "run"))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    shapes = set()
    for number, (read, count) in enumerate(seen):
        assert (count > 0) == (read not in shapes), f"iteration {number}: {count} programs"
        shapes.add(read)
    assert len(seen) == 8 and len(shapes) < 4


@pytest.mark.parametrize("micro", [1, 2])
def test_minibatches_hold_every_sample_once_an_epoch(pipeline, micro):
    """Each part of a minibatch, as `accumulate` cuts it, has its own samples' packed rows, in their own shard."""
    stage = make_ppo(pipeline, micro_batches=micro)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 90, (16, 44)).astype(np.int32)
    rows = Tokens(tokens, np.full(16, 5, np.int32), np.arange(6, 22).astype(np.int32))
    packer = ReplyPacker(32, 17, Vocabulary(0, 1, 2, 99), 2, halve=True)
    order, packed = phases.minibatches(stage, packer, rows, np.zeros(16), rng)
    assert order.shape == (4, 8) and all(sorted(order[e : e + 2].ravel()) == list(range(16)) for e in (0, 2))
    assert len({tuple(sorted(part)) for part in order}) > 2
    for k, part in enumerate(order):
        for m in range(micro):
            cut = jax.tree.map(lambda x: x[k][m::micro], packed)
            for place, sample in enumerate(part[m::micro]):
                shard = np.s_[place * 2 // len(cut.end) * len(cut.tokens) // 2 :]
                row, which = divmod(cut.end[place], cut.ends.shape[1])
                end, n = cut.ends[shard][row, which], rows.length[sample] - 5
                assert cut.tokens[shard][row, end - n - 1 : end + 1].tolist() == [*tokens[sample, 5 : 5 + n], 1, 2]
                row, which = np.divmod(cut.before[place][:n], cut.read.shape[1])
                assert cut.tokens[shard][row, cut.read[shard][row, which]].tolist() == tokens[sample, 4 : 4 + n].tolist()


def test_a_row_a_reply_gives_the_same_run(finished, pipeline, context, tmp_path):
    """But for rounding: the same minibatches, read in another layout."""
    stage = make_ppo(pipeline, packed=False, steps=2)
    rlhf.run(stage, context(stage, tmp_path / "run"))
    assert not phases.is_packed(replace(stage, packed=None), 4) and phases.is_packed(replace(stage, packed=None, batch_size=128), 4)
    for plain, packed in zip(iterations(tmp_path / "run"), iterations(finished)):
        for name in ("score", "kl_k1", "loss", "policy_loss", "value_loss", "grad_norm", "explained_variance", "length"):
            assert plain[name] == pytest.approx(packed[name], rel=5e-3, abs=2e-4), name


def test_a_stopped_run_goes_on_as_if_nothing_had_been(finished, pipeline, context, tmp_path):
    """An iteration polls three times and a look at held-out prompts twice; the means at the start are a look too."""
    stage = make_ppo(pipeline)
    stops = (
        (2, "done anew"),  # in the means
        (5, "nothing to save yet"),  # between sampling and scoring of the first
        (8, "saved at iteration 1 of"),  # of the second
        (7, "saved at iteration 3 of"),  # in the look after the third
        (1, "done anew"),  # in that look again
        (5, "saved at iteration 4 of"),
    )
    for stop, said in stops:
        with pytest.raises(Preempted, match=said):
            rlhf.run(stage, context(stage, tmp_path / "run", stop_after=stop))
    rlhf.run(stage, context(stage, tmp_path / "run"))
    assert without_times(tmp_path / "run") == without_times(finished)
    assert checkpoint.read_checksums(tmp_path / "run") == checkpoint.read_checksums(finished)


@pytest.mark.parametrize("at", [1, 4])
def test_work_after_the_last_save_is_done_anew(finished, pipeline, context, tmp_path, monkeypatch, at):
    """Killed in an iteration, before anything was saved or after: rows and every number of state come out the same."""
    stage, real, calls = make_ppo(pipeline), rlhf.iterate, iter(range(1, 100))

    def killed(*args):
        if next(calls) == at:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(rlhf, "iterate", killed)
    with pytest.raises(KeyboardInterrupt):
        rlhf.run(stage, context(stage, tmp_path / "run"))
    monkeypatch.undo()
    rlhf.run(stage, context(stage, tmp_path / "run"))
    assert without_times(tmp_path / "run") == without_times(finished)
    assert checkpoint.read_checksums(tmp_path / "run") == checkpoint.read_checksums(finished)


KILLED = """
from hhjax.data.comparisons import ComparisonData
from hhjax.experiment import Experiment
from hhjax.stages import PPO
from hhjax.model.generate import Sampling

RUNS = Experiment("killed", (
    PPO("ppo", policy="{lm}", reward="{pm}", tests=("{pm_test}",), data=ComparisonData(("pairs.jsonl",)), prompt_len=32,
        sampling=Sampling(12), batch_size=16, steps=60, epochs=2, minibatches=2, save_every=5, eval_every=20, eval_prompts=16),
))
"""


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_nothing(pipeline, start_hhjax, tmp_path):
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    for folder in (whole, killed):
        folder.mkdir()
        (folder / "killed.py").write_text(KILLED.format(**pipeline))
    process = start_hhjax(whole, "run", "killed.py")
    assert process.communicate(timeout=300) and process.returncode == 0
    for rows in (3, rng.randrange(8, 40)):
        process = start_hhjax(killed, "run", "killed.py")
        while sum(len(read_rows(p)) for p in killed.glob("runs/ppo/*/metrics.jsonl")) < rows:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait()
    process = start_hhjax(killed, "run", "killed.py")
    assert process.communicate(timeout=300) and process.returncode == 0
    [a], [b] = ((folder / "runs" / "ppo").iterdir() for folder in (whole, killed))
    assert without_times(a) == without_times(b) and len(iterations(a)) == 60
    assert checkpoint.read_checksums(a) == checkpoint.read_checksums(b)
    assert len([e for e in read_events(b) if e["event"] == "start"]) == 3 and [e for e in read_events(b) if e["event"] == "restore"]


def test_another_rollout_mesh_gives_the_same_run(finished, pipeline, context, tmp_path):
    stage = make_ppo(pipeline, rollout_mesh=MeshConfig(4, 1, 2), steps=3)
    rlhf.run(stage, context(stage, tmp_path / "run"))
    for a, b in zip(iterations(tmp_path / "run"), iterations(finished)):
        for name in ("score", "kl_k3", "loss", "length", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=5e-3, abs=1e-4), name


HOSTS = """
import pickle
from hhjax.experiment import Experiment

RUNS = Experiment("hosts", (pickle.loads({stage!r}),))
"""


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"rollout_mesh": MeshConfig(4, 1, 2)}], ids=["one mesh", "rollout mesh"])
def test_two_hosts_and_then_one_give_the_same_run(finished, pipeline, context, start_two, tmp_path, changes):
    """Two processes with half of the devices each make four iterations and save; one process with all devices restores that
    and makes the last two. What either writes is what one process would have written alone."""
    (tmp_path / "hosts.py").write_text(HOSTS.format(stage=pickle.dumps(make_ppo(pipeline, steps=4, **changes))))
    hosts = start_two(tmp_path, "run", "hosts.py", devices=4)
    outputs = [process.communicate(timeout=300)[0] for process in hosts]
    assert [process.returncode for process in hosts] == [0, 0], outputs
    [folder] = (tmp_path / "runs" / "ppo").iterdir()
    stage = make_ppo(pipeline, **changes)
    rlhf.run(stage, context(stage, folder))
    events = [e["event"] for e in read_events(folder)]
    assert events.count("offsets") == events.count("start") == 1 and events.count("restore") == 1  # process 0 alone writes
    rows, alone = iterations(folder), iterations(finished)
    assert [row["step"] for row in rows] == [row["step"] for row in alone]
    for a, b in zip(rows, alone):
        assert {n: a[n] for n in ("tokens", "length", "stop_rate")} == {n: b[n] for n in ("tokens", "length", "stop_rate")}
        for name in sorted(b.keys() - TIMING - {"sqrt_kl"}):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), (name, a["step"])
        # A root of what was just compared: of 0 and of what rounding makes of 0 it is as far apart as of 0 and a real difference.
        assert all(row["sqrt_kl"] == max(row["kl_k1"], 0.0) ** 0.5 for row in (a, b))
    for step in (3, STEPS):
        samples = [[row["reply"] for row in read_rows(f / "samples" / f"{step:06}.jsonl")] for f in (folder, finished)]
        assert samples[0] == samples[1] and len(samples[0]) == 20
    policies = [load_model(f, None, make_mesh(MeshConfig()))[1] for f in (folder, finished)]
    for a, b in zip(*map(jax.tree.leaves, policies)):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_sigterm_to_one_of_two_hosts_saves_one_iteration(pipeline, start_two, tmp_path):
    """Wherever in an iteration it is heard."""
    stage = make_ppo(pipeline, steps=500, save_every=0, eval_every=0)
    (tmp_path / "hosts.py").write_text(HOSTS.format(stage=pickle.dumps(stage)))
    hosts = start_two(tmp_path, "run", "hosts.py", devices=4)
    while sum(len(iterations(f)) for f in tmp_path.glob("runs/ppo/*")) < 2:
        assert all(process.poll() is None for process in hosts)
        time.sleep(0.05)
    hosts[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=300)[0] for process in hosts]
    assert [process.returncode for process in hosts] == [75, 75], said
    [folder] = (tmp_path / "runs" / "ppo").iterdir()
    step = checkpoint.good_steps(folder / "checkpoints")[-1]
    assert all(f"saved at iteration {step} of 500" in text for text in said) and iterations(folder)[-1]["step"] == step


def test_the_policy_is_a_model_like_any_other(finished, pipeline):
    """Children read `params` only: the policy, without value network and optimisers. It is not its parent any more."""
    model, params, tokenizer = load_model(finished, None, make_mesh(MeshConfig()))
    _, parent, _ = load_model(pipeline["lm"], None, make_mesh(MeshConfig()))
    assert model.config.vocab >= tokenizer.vocab_size
    assert (np.asarray(params["embed"]) != np.asarray(parent["embed"])).any()


def test_the_reward_rises(pipeline, context, tmp_path):
    """The PM likes "good": PPO finds it, on the training PM and on the one it never saw."""
    stage = make_ppo(pipeline, steps=40, kl=KLConfig(0.001), eval_every=0, tests=(str(pipeline["pm_test"]),), batch_size=32,
                     mesh=MeshConfig(1), value_head=False, optim=OptimConfig(3e-3), value_optim=OptimConfig(3e-3))  # fmt: skip
    stage = replace(stage, mesh=MeshConfig(), save_every=0)
    rlhf.run(stage, context(stage, tmp_path / "run"))
    rows = iterations(tmp_path / "run")
    spread = rows[0]["score_p90"] - rows[0]["score_p10"]
    # Scores are above those of the initial policy, 0: the first five rows have a third of the rise already, and the PM ends at 1.27.
    assert np.mean([r["score"] for r in rows[-5:]]) > 0.5 * spread


@pytest.mark.parametrize("changes", [{}, {"value_head": True}, {"value": "lm"}, {"value": "pm_test"}])
def test_value_networks_of_every_kind(pipeline, context, tmp_path, changes):
    """Each begins near the mean of what it is to predict: a constant error would pay for length, or for its absence."""
    if "value" in changes:
        changes = changes | {"value": str(pipeline[changes["value"]])}
    blank = "value_head" in changes or changes.get("value") == str(pipeline["lm"])  # a head of zeros says 0
    stage = make_ppo(pipeline, steps=2, eval_every=0, **changes)
    rlhf.run(stage, context(stage, tmp_path / "run"))
    rows = iterations(tmp_path / "run")
    [offsets] = [e for e in read_events(tmp_path / "run") if e["event"] == "offsets"]
    assert abs(offsets["reward"]) > 0.05  # what would show if it were forgotten, or subtracted twice
    far = abs(rows[0]["value_mean"] - (0.0 if blank else rows[0]["return_mean"]))
    assert far < (1e-6 if blank else 0.5 * abs(offsets["reward"])) and (offsets["value"] == 0) == blank
    assert ("grad_norm_value" in rows[0]) == ("value_head" not in changes)
    parts = {name.split("/")[0] + "/" + name.split("/")[1].split(".")[0] for name in checkpoint.read_checksums(tmp_path / "run")}
    assert ("train/value" in parts) == ("value_head" not in changes)


def test_models_must_share_a_tokenizer(pipeline, context, tmp_path, hugging_face_folder):
    stage = make_ppo(pipeline, policy=str(hugging_face_folder))
    with pytest.raises(ConfigError, match="different tokenizers"):
        rlhf.run(stage, context(stage, tmp_path / "run"))


def test_what_ppo_cannot_do_is_refused(pipeline):
    with pytest.raises(ConfigError, match="needs the probability of what was drawn"):
        make_ppo(pipeline, sampling=Sampling(12, top_p=0.9))
    with pytest.raises(ConfigError, match="move beta by more than itself"):
        make_ppo(pipeline, kl=KLConfig(0.1, target=1.0, horizon=3))
    with pytest.raises(ConfigError, match="does not divide"):
        make_ppo(pipeline, minibatches=3)
    with pytest.raises(ConfigError, match="leave one out"):
        make_ppo(pipeline, value_head=True, value="x/y")


def test_json_rows_are_plain(finished):
    """NaN and Infinity, which Python writes and no other reader takes, stand nowhere."""
    strange = []
    rows = [json.loads(line, parse_constant=strange.append) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS + 3 and not strange


def test_the_host_reads_replies_while_the_devices_learn():
    """`advance` dispatches the update, reads, and only then waits; and it splits minibatches while the devices score."""
    log = []

    class Pending:
        """A result on its way: says when it is waited for."""

        def __init__(self, name):
            self.name = name

        def block_until_ready(self):
            log.append(f"{self.name} is there")
            return self

    def dispatch(name, results=2):
        return lambda *args: log.append(name) or tuple(Pending(name) for _ in range(results))

    rows = Tokens(np.zeros((2, 6), np.int32), np.full(2, 2, np.int32), np.full(2, 6, np.int32))
    parts = phases.Phases(
        spread=lambda params: params, sample=lambda *args: (rows, 4), gather=lambda samples: samples, fetch=lambda samples: (samples, np.ones(2)),
        lay=lambda samples, *args: samples, score=dispatch("score"), split=lambda *args: log.append("split") or (None, None),
        update=dispatch("update"), exact_kl=None)  # fmt: skip
    state, seconds = SimpleNamespace(params={"policy": {}}), phases.Seconds()
    *_, said = phases.advance(parts, state, {}, (rows, np.arange(2)), None, None, {}, 0.0, seconds, read=lambda rows, report: log.append("read") or "seen")
    assert said == "seen" and 0 <= seconds.read <= seconds.train
    assert [entry for at, entry in enumerate(log) if entry not in log[:at]] == ["score", "split", "score is there", "update", "read", "update is there"]
