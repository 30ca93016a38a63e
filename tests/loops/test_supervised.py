"""The supervised loop: it learns, and no interruption of any kind shows in what it leaves behind."""

import json
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from hhjax import cli
from hhjax.data.comparisons import ComparisonData
from hhjax.data.sources import TextData
from hhjax.fields import ConfigError
from hhjax.io import checkpoint
from hhjax.io.huggingface import load_folder
from hhjax.io.metrics import TIMING, read_events, read_rows
from hhjax.loops import supervised, waiting
from hhjax.model.transformer import make_model
from hhjax.objectives.preference import preference_objective
from hhjax.sharding import MeshConfig, make_mesh
from hhjax.stages import LM, PM, Diverged, Preempted, StageContext
from hhjax.train.state import OptimConfig

STEPS = 12
EXPERIMENT = """
from hhjax.data.comparisons import ComparisonData
from hhjax.experiment import Experiment
from hhjax.stages import PM

RUNS = Experiment("tiny", (
    PM("pm", tokenizer={tokenizer!r}, model="0.1M", data=ComparisonData(sources=("pairs.jsonl",)), seq_len=96,
       batch_size=8, steps=12, log_every=1, save_every=3, eval_every=5, eval_rows=16),
))
"""


def make_pm(tokenizer, **changes) -> PM:
    """The stage of EXPERIMENT."""
    data = ComparisonData(sources=("pairs.jsonl",))
    stage = PM("pm", tokenizer=str(tokenizer), model="0.1M", data=data, seq_len=96, batch_size=8, steps=STEPS,
               log_every=1, save_every=3, eval_every=5, eval_rows=16)  # fmt: skip
    return replace(stage, **changes)


@pytest.fixture(autouse=True)
def polls_are_of_steps(monkeypatch):
    """Reading the data does not poll, up to a minute: a busy machine takes longer than the usual fifth of a second."""
    monkeypatch.setattr(waiting, "POLL_S", 60.0)


def make_context(stage, folder, data, stop_after=None) -> StageContext:
    """A context whose should_stop says True from the given poll on."""
    folder.mkdir(exist_ok=True)
    polls = iter(range(1, 10**9))
    refs = [ref for ref in (stage.tokenizer, stage.init) if ref]
    return StageContext(
        dir=folder, seed=0, parents={r: Path(r) for r in refs}, parent_stages={}, data_dir=data,
        should_stop=lambda: stop_after is not None and next(polls) >= stop_after,
    )  # fmt: skip


def train(stage, folder, data, stop_after=None) -> None:
    supervised.run(stage, make_context(stage, folder, data, stop_after))


def without_times(folder) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(folder / "metrics.jsonl")]


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def event_names(folder) -> list[str]:
    return [e["event"] for e in read_events(folder)]


def assert_same_run(folder, other) -> None:
    """Every metric (times apart) and every bit of the last checkpoint are equal."""
    assert without_times(folder) == without_times(other)
    assert checkpoint.read_checksums(folder) == checkpoint.read_checksums(other)


@pytest.fixture(scope="session")
def uninterrupted(tiny_data, tiny_tokenizer, tmp_path_factory):
    """The folder of make_pm trained in one go on data=8."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(make_pm(tiny_tokenizer), folder, tiny_data)
    return folder


def test_a_pm_learns_and_leaves_a_complete_folder(uninterrupted):
    rows = read_rows(uninterrupted / "metrics.jsonl")
    assert abs(rows[0]["loss"] - np.log(2)) < 1e-6  # equal scores at the start
    held_out = [row for row in rows if "eval/accuracy" in row]
    assert [row["step"] for row in held_out] == [5, 10, 12] and held_out[-1]["eval/accuracy"] == 1.0
    assert losses(uninterrupted)[-1] < 0.4
    assert all(row["share_of_ceiling"] > 0 and row["tokens_per_s"] > 0 for row in rows if "seconds" in row)
    assert {"model.json", "tokenizer.model", "metrics.jsonl", "tb", "samples", "checkpoints"} <= {
        p.name for p in uninterrupted.iterdir()
    }
    sample = read_rows(uninterrupted / "samples" / "train.jsonl")[0]
    assert sample["prompt"].startswith("\n\nHuman: ") and " good " in sample["text"]
    assert checkpoint.good_steps(uninterrupted / "checkpoints") == [9, 12]


@pytest.mark.parametrize("stop_after, step", [(1, 1), (5, 5), (7, 5), (9, 7), (18, 12)])
def test_stopping_and_going_on_changes_nothing(uninterrupted, tiny_data, tiny_tokenizer, tmp_path, stop_after, step):
    """A step polls once and an evaluation twice: the stops come at steps, before an evaluation and in the middle of two."""
    stage = make_pm(tiny_tokenizer)
    with pytest.raises(Preempted, match=f"saved at step {step} of {STEPS}"):
        train(stage, tmp_path, tiny_data, stop_after)
    train(stage, tmp_path, tiny_data)
    assert_same_run(tmp_path, uninterrupted)
    assert event_names(tmp_path).count("restore") == 1


def test_a_finished_stage_that_missed_its_end_does_no_step(uninterrupted, tiny_data, tiny_tokenizer, tmp_path):
    stage = make_pm(tiny_tokenizer)
    train(stage, tmp_path, tiny_data)
    train(stage, tmp_path, tiny_data)
    assert_same_run(tmp_path, uninterrupted)


def test_another_mesh_goes_on_with_the_same_data(uninterrupted, tiny_data, tiny_tokenizer, tmp_path):
    with pytest.raises(Preempted):
        train(make_pm(tiny_tokenizer), tmp_path, tiny_data, stop_after=10)
    other = make_pm(tiny_tokenizer, mesh=MeshConfig(data=1, fsdp=4, tensor=2))
    train(other, tmp_path, tiny_data)
    rows, expected = without_times(tmp_path), without_times(uninterrupted)
    assert rows[:9] == expected[:9]
    assert [r["step"] for r in rows] == [r["step"] for r in expected]
    assert [r.get("tokens") for r in rows] == [r.get("tokens") for r in expected]  # the same rows in the same batches
    np.testing.assert_allclose(losses(tmp_path), losses(uninterrupted), rtol=2e-4)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("orphaned_reads")
def test_a_damaged_checkpoint_costs_only_its_own_steps(uninterrupted, tiny_data, tiny_tokenizer, tmp_path):
    with pytest.raises(Preempted):
        train(make_pm(tiny_tokenizer), tmp_path, tiny_data, stop_after=10)
    for file in (tmp_path / "checkpoints" / "8" / "params").rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    train(make_pm(tiny_tokenizer), tmp_path, tiny_data)
    events = {e["event"]: e for e in read_events(tmp_path)}
    assert events["damaged"]["step"] == 8 and events["restore"]["step"] == 6
    assert_same_run(tmp_path, uninterrupted)


def test_a_run_none_of_whose_checkpoints_can_be_read_is_not_started_anew(tiny_data, tiny_tokenizer, tmp_path, monkeypatch):
    with pytest.raises(Preempted):
        train(make_pm(tiny_tokenizer), tmp_path, tiny_data, stop_after=4)
    before = read_rows(tmp_path / "metrics.jsonl")

    def out_of_memory(*args):
        raise checkpoint.DamagedCheckpoint("step 4: RESOURCE_EXHAUSTED")

    monkeypatch.setattr(checkpoint, "read_part", out_of_memory)
    with pytest.raises(ConfigError, match=r"checkpoints \[.*4\], and none can be read"):
        train(make_pm(tiny_tokenizer), tmp_path, tiny_data)
    assert before and read_rows(tmp_path / "metrics.jsonl") == before


def test_a_loss_that_is_not_finite_stops_and_is_never_saved(tiny_data, tiny_tokenizer, tmp_path):
    def exploding(model, cfg):
        loss = preference_objective(model, cfg)

        def scaled(params, batch, key):
            value, metrics = loss(params, batch, key)
            return jax.numpy.where(value < 0.69, jax.numpy.nan, value), metrics

        return scaled

    stage = make_pm(tiny_tokenizer, objective=exploding, save_every=1)
    with pytest.raises(Diverged, match="loss is not finite at step"):
        train(stage, tmp_path, tiny_data)
    bad = next(e for e in read_events(tmp_path) if e["event"] == "nan")
    assert checkpoint.good_steps(tmp_path / "checkpoints")[-1] == bad["step"] - 1
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["loss"] is None


def test_a_pm_starts_from_its_language_model(tiny_data, tiny_tokenizer, tmp_path):
    text = TextData(sources=("text.jsonl",))
    lm = LM("lm", tokenizer=str(tiny_tokenizer), model="0.1M", data=text, seq_len=64, batch_size=8, steps=6,
            log_every=3)  # fmt: skip
    train(lm, tmp_path / "lm", tiny_data)
    assert losses(tmp_path / "lm")[-1] < losses(tmp_path / "lm")[0]
    # A rate of zero leaves the parent's parameters as they were.
    child = {"tokenizer": None, "model": None, "init": str(tmp_path / "lm")}
    pm = replace(make_pm(tiny_tokenizer, steps=1, optim=OptimConfig(lr=0.0)), **child)
    train(pm, tmp_path / "pm", tiny_data)
    parent, child = (checkpoint.read_checksums(tmp_path / name) for name in ("lm", "pm"))
    params = [name for name in parent if name.startswith("params/")]
    assert params and [child[n] for n in params] == [parent[n] for n in params]
    assert abs(losses(tmp_path / "pm")[0] - np.log(2)) < 1e-6


def test_a_pm_starts_from_a_hugging_face_folder(tiny_data, hugging_face_folder, tmp_path):
    stage = PM("pm", init=str(hugging_face_folder), data=ComparisonData(sources=("pairs.jsonl",)), seq_len=160,
               batch_size=8, steps=2, log_every=1, eval_rows=8, optim=OptimConfig(lr=0.0))  # fmt: skip
    train(stage, tmp_path / "still", tiny_data)  # a rate of zero leaves the parameters as they were read
    mesh = make_mesh()
    model, params, tokenizer = supervised.load_model(tmp_path / "still", None, mesh)
    golden = load_file(hugging_face_folder / "expected.st")
    unpinned = make_model(model.config)  # its three rows divide over no mesh
    logits = unpinned.logits(params, unpinned.apply(params, golden["tokens"])[0])
    np.testing.assert_allclose(logits[..., :96], golden["logits"], atol=1e-4, rtol=0)
    config, expected = load_folder(hugging_face_folder, tokenizer.vocab_size)
    assert tokenizer.vocab_size == 98 and model.config == config and config.vocab == 128
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    # The folder it came from and the folder it was saved in are the same model.
    model, same, _ = supervised.load_model(hugging_face_folder, None, mesh)
    jax.tree.map(np.testing.assert_array_equal, same, expected)
    train(replace(stage, optim=OptimConfig()), tmp_path / "moving", tiny_data)
    first, second = losses(tmp_path / "moving")
    assert abs(first - np.log(2)) < 1e-6 and second != first


def test_an_exported_model_is_the_same_model(pipeline, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["export", str(pipeline["lm"]), str(tmp_path / "out")])
    assert end.value.code == 0
    mesh, tokens = make_mesh(), np.arange(24).reshape(8, 3)
    (ours, params, tok), (theirs, exported, again) = (supervised.load_model(folder, None, mesh) for folder in (pipeline["lm"], tmp_path / "out"))
    logits = (model.logits(p, model.apply(p, tokens)[0]) for model, p in ((ours, params), (theirs, exported)))
    np.testing.assert_allclose(*logits, atol=1e-5)
    assert again.encode("the cat sat") == tok.encode("the cat sat") and again.vocabulary == tok.vocabulary
    with pytest.raises(SystemExit) as end:
        cli.main(["export", str(pipeline["lm"]), str(tmp_path / "out")])
    assert end.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(["export", str(pipeline["pm"]), str(tmp_path / "scorer")])
    assert end.value.code == 0 and "is a preference model" in capsys.readouterr().err


def test_held_out_rows_count_once_each(tiny_data, tiny_tokenizer, tmp_path):
    """Accuracy and loss over 31 rows do not depend on how many of them share a batch."""
    results = []
    for batch_size in (8, 16):
        stage = make_pm(tiny_tokenizer, batch_size=batch_size, eval_rows=100, steps=1, optim=OptimConfig(lr=0.0))
        train(stage, tmp_path / str(batch_size), tiny_data)
        results.append(read_rows(tmp_path / str(batch_size) / "metrics.jsonl")[-1])
    assert results[0]["eval/loss"] == pytest.approx(results[1]["eval/loss"], abs=1e-6)
    assert results[0]["eval/accuracy"] == results[1]["eval/accuracy"]


# Whole processes ------------------------------------------------------------------------------------------------------


def write_experiment(folder, tokenizer):
    (folder / "tiny.py").write_text(EXPERIMENT.format(tokenizer=str(tokenizer)))


def run_folder(tmp_path):
    return next((tmp_path / "runs" / "pm").iterdir())


def wait_for_rows(process, tmp_path, count: int) -> None:
    """Returns once the run has written so many rows; fails if it ends before."""
    while sum(len(read_rows(p)) for p in tmp_path.glob("runs/pm/*/metrics.jsonl")) < count:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def uninterrupted_process(start_hhjax, tiny_tokenizer, tmp_path_factory):
    """The run directory of EXPERIMENT, run in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted_process")
    write_experiment(folder, tiny_tokenizer)
    finish(start_hhjax(folder, "run", "tiny.py"))
    return run_folder(folder)


def finish(process, code: int = 0) -> str:
    """Waits for the end, which must have this exit code. Returns the output."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def kill_and_resume(hhjax, tmp_path, kills: int, seed: int):
    rng = random.Random(seed)
    for rows in sorted(rng.sample(range(1, STEPS), kills)):
        process = hhjax("run", "tiny.py")
        wait_for_rows(process, tmp_path, rows)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
    finish(hhjax("run", "tiny.py"))


def test_kill_9_at_random_moments_changes_nothing(hhjax, tiny_tokenizer, uninterrupted_process, tmp_path):
    write_experiment(tmp_path, tiny_tokenizer)
    kill_and_resume(hhjax, tmp_path, kills=2, seed=0)
    assert_same_run(run_folder(tmp_path), uninterrupted_process)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kill_9_more_often(hhjax, tiny_tokenizer, uninterrupted_process, tmp_path, seed):
    write_experiment(tmp_path, tiny_tokenizer)
    kill_and_resume(hhjax, tmp_path, kills=4, seed=seed)
    assert_same_run(run_folder(tmp_path), uninterrupted_process)


def test_sigterm_saves_exits_75_and_goes_on_exactly(start_hhjax, tiny_tokenizer, tmp_path):
    """Over 80 steps, since a run of 12 may be over before the notice has come round."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
        write_experiment(folder, tiny_tokenizer)
    args = ("run", "tiny.py", "--pm.steps", 80, "--pm.save-every", 20)
    finish(start_hhjax(whole, *args))
    process = start_hhjax(stopped, *args)
    wait_for_rows(process, stopped, 3)
    process.send_signal(signal.SIGTERM)
    told = time.time()
    finish(process, 75)
    folder = run_folder(stopped)
    manifests = {int(p.stem): p.stat().st_mtime for p in (folder / "checkpoints").glob("*.json")}
    assert manifests[max(manifests)] - told < 10  # the commit, not the end of the process
    assert event_names(folder)[-1] == "preempt" and not (folder / "DONE").exists() and not (folder / "LOCK").exists()
    finish(start_hhjax(stopped, *args))
    assert_same_run(folder, run_folder(whole))
    assert (folder / "DONE").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["id"] in folder.name and config["config"]["optim"]["lr"] == 0.001
