"""Run directories in a bucket: one in memory, and one on disk that processes share. (Cloud Storage's client: test_bucket.py.)"""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import fsspec
import pytest

from hhjax import cli, launch, sweep
from hhjax.fields import ConfigError
from hhjax.io import bucket, lock
from hhjax.io.bucket import address_of, bucket_of, reading_copy, working_copy
from hhjax.io.metrics import TIMING, MetricsWriter, read_events, read_rows, write_event
from hhjax.io.rundir import state_of

ROOT = "memory://bucket/runs"
TRAINED = '''"""A tokenizer and a language model."""
from hhjax.data.sources import TextData
from hhjax.experiment import Experiment
from hhjax.stages import LM, Tokenizer

TEXT = TextData(sources=("text.jsonl",))
RUNS = Experiment("trained", (
    Tokenizer("tok", data=TEXT, vocab=320),
    LM("lm", tokenizer="tok", model="0.1M", data=TEXT, seq_len=32, batch_size=8, steps={steps}, log_every=1, save_every=10, eval_rows=8),
))
'''
CHAIN = '''"""Comparisons of the clinic, a preference model of them, and its evaluation, which reads what the model learned from."""
from hhjax.data.comparisons import ComparisonData
from hhjax.data.sources import TextData
from hhjax.experiment import Experiment
from hhjax.stages import LM, PM, Clinic, Evaluate, Tokenizer

DATA, TEXT = ComparisonData(("pairs",)), TextData(sources=("text.jsonl",))
RUNS = Experiment("chain", (
    Clinic("pairs", part="helpful", size=120),
    Tokenizer("tok", data=TEXT, vocab=320),
    PM("pm", tokenizer="tok", model="0.1M", data=DATA, seq_len=512, batch_size=8, steps=1, eval_rows=8),
    Evaluate("eval", of="pm", data=DATA, baselines=False),
))
'''


@pytest.fixture
def memory():
    """The bucket in memory, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


@pytest.fixture
def here(tmp_path, tiny_data, monkeypatch):
    """tmp_path as the working folder; launch.run works in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HHJAX_DATA", str(tiny_data))
    monkeypatch.setattr(launch, "join_cluster", lambda seconds: lambda: False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("chain", "trained"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@contextlib.contextmanager
def one_run(address: str = ROOT):
    """A run directory of a new working copy, as of a machine of its own."""
    with working_copy(address) as out:
        folder = out / "lm" / "0.1M-s0-x"
        folder.mkdir(parents=True)
        yield folder


def same(rows: list[dict]) -> list[dict]:
    """Rows without what may differ between equal runs."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


# The copy and its bucket ----------------------------------------------------------------------------------------------


def test_a_folder_here_is_itself_and_no_copy(tmp_path):
    with working_copy(str(tmp_path / "runs")) as out:
        assert out == tmp_path / "runs" and bucket_of(out / "lm" / "x") is None and address_of(out) == str(out)
    with pytest.raises(ConfigError, match="Protocol not known: nowhere"), working_copy("nowhere://bucket/runs"):
        pass


def test_a_fresh_machine_finds_what_another_sent(memory):
    with one_run() as folder, bucket.hold_lock(folder):
        assert address_of(folder) == "memory://bucket/runs/lm/0.1M-s0-x"
        (folder / "samples").mkdir()
        (folder / "samples" / "train.jsonl").write_text("{}\n")
        (folder / ".metrics.jsonl.7.tmp").write_text("torn")
        write_event(folder, "start")
        bucket.send(folder)
        write_event(folder, "save", step=10)
        memory.pipe_file("/bucket/runs/lm/0.1M-s0-x/checkpoints/10/params/data", b"large")
        bucket.send(folder)
    assert not folder.exists()
    with one_run() as folder:
        bucket.bring(folder)
        assert [e["event"] for e in read_events(folder)] == ["start", "save"]
        assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["events.jsonl", "train.jsonl"]


def test_only_what_changed_is_sent_and_done_last(memory, monkeypatch):
    calls, pipe = [], type(memory).pipe
    monkeypatch.setattr(type(memory), "pipe", lambda self, files: calls.append([Path(p).name for p in files]) or pipe(self, files))
    with one_run() as folder, bucket.hold_lock(folder):
        for name in ("config.json", "DONE", "events.jsonl"):
            (folder / name).write_text("1")
        bucket.send(folder)
        bucket.send(folder)
        (folder / "events.jsonl").write_text("12")
        bucket.send(folder)
    assert calls == [["config.json", "events.jsonl"], ["DONE"], ["events.jsonl"]]


def test_what_is_done_is_brought_once_and_asked_for_seldom(memory, monkeypatch):
    asked, exists = [], type(memory).exists
    monkeypatch.setattr(type(memory), "exists", lambda self, path: asked.append(path) or exists(self, path))
    at = "/bucket/runs/lm/0.1M-s0-x"
    with one_run() as folder:
        assert not bucket.is_done(folder) and not bucket.is_done(folder) and len(asked) == 1
        memory.pipe({f"{at}/DONE": b"", f"{at}/model.json": b"{}"})
        monkeypatch.setattr(bucket, "ASK_S", 0.0)
        assert bucket.is_done(folder) and (folder / "model.json").read_text() == "{}"
        memory.pipe({f"{at}/model.json": b"changed"})
        bucket.bring(folder)
        assert bucket.is_done(folder) and len(asked) == 2 and (folder / "model.json").read_text() == "{}"


def test_rows_are_in_the_bucket_once_they_are_synced_and_cut_on_another_machine(memory):
    with one_run() as folder, bucket.hold_lock(folder):
        writer = MetricsWriter(folder)
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0 / step})
        writer.sync()
        writer.write(4, {"loss": 0.1})  # never sent: the machine is gone
        writer.close()
    with one_run() as folder, bucket.hold_lock(folder):
        bucket.bring(folder)
        assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1, 2, 3]
        MetricsWriter(folder, start=2).close()
        assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1, 2]


# LOCK -----------------------------------------------------------------------------------------------------------------


def test_one_of_two_machines_has_the_lock(memory, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    at = "/bucket/runs/lm/0.1M-s0-x/LOCK"
    with one_run() as folder:
        memory.pipe_file(at, json.dumps({"host": "elsewhere", "pid": 12, "since": 0}).encode())
        with pytest.raises(lock.Held, match="0.1M-s0-x is held by .*elsewhere"), bucket.hold_lock(folder):
            pass
        assert lock.read_lock(folder / "LOCK")["host"] == "elsewhere" and memory.exists(at)
        memory.rm_file(at)
        with bucket.hold_lock(folder):
            first = memory.modified(at)
            time.sleep(0.2)
            assert memory.modified(at) > first and json.loads(memory.cat_file(at))["pid"] == os.getpid()  # a heartbeat
        assert not memory.exists(at)


def test_a_lock_whose_holder_is_gone_goes_to_the_last_to_write(memory, monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 0.0)
    at, theirs = "/bucket/runs/lm/0.1M-s0-x/LOCK", json.dumps({"host": "elsewhere", "pid": 12, "since": 1}).encode()
    with one_run() as folder:
        memory.pipe_file(at, b'{"host": "gone", "pid": 1, "since": 0}')
        monkeypatch.setattr(time, "sleep", lambda s: memory.pipe_file(at, theirs))  # another finds it abandoned too, and writes later
        with pytest.raises(lock.Held, match="elsewhere"), bucket.hold_lock(folder):
            pass
        monkeypatch.setattr(time, "sleep", lambda s: None)
        with bucket.hold_lock(folder):
            assert lock.is_ours(json.loads(memory.cat_file(at)))


def test_nothing_is_sent_once_another_has_the_lock(memory):
    at = "/bucket/runs/lm/0.1M-s0-x"
    with one_run() as folder:
        with bucket.hold_lock(folder):
            memory.pipe_file(f"{at}/LOCK", b'{"host": "elsewhere", "pid": 12, "since": 0}')
            (folder / "config.json").write_text("{}")
            with pytest.raises(ConfigError, match="0.1M-s0-x was taken over by .*elsewhere"):
                bucket.send(folder)
        assert memory.exists(f"{at}/LOCK") and not memory.exists(f"{at}/config.json")


# Commands -------------------------------------------------------------------------------------------------------------


def test_a_chain_runs_in_a_bucket_and_a_second_machine_finds_it_done(memory, here, capsys):
    """Parents, and the parents of parents, are found wherever the copies are; a report of states needs no copy at all."""
    (here / "chain.py").write_text(CHAIN)
    flags = ["chain.py", "--out", ROOT, "--checkpoints", str(here / "checkpoints")]
    assert launch.run([*flags, "--stage", "pairs"]) == 0
    assert launch.run(flags) == 0
    said = capsys.readouterr().out
    assert "chain: pairs is done (memory://bucket/runs/clinic/helpful-s0-" in said and "chain: eval in memory://bucket/runs/evaluate/" in said
    index = json.loads(memory.cat_file("/bucket/runs/experiments/chain.json"))["runs"]["chain"]
    assert list(index) == ["pairs", "tok", "pm", "eval"] and all(memory.exists(f"/bucket/runs/{f}/DONE") for f in index.values())
    assert not memory.glob("/bucket/runs/*/*/LOCK") and not (here / "runs").exists()
    config = json.loads(memory.cat_file(f"/bucket/runs/{index['pm']}/config.json"))
    assert config["parents"] == {name: f"{ROOT}/{index[name]}" for name in ("tok", "pairs")}
    assert json.loads(memory.cat_file(f"/bucket/runs/{index['eval']}/evals/summary.json"))["accuracy"]
    assert launch.run(flags) == 0 and capsys.readouterr().out.count("is done (memory://") == 4
    with pytest.raises(SystemExit):
        cli.main(["ls", ROOT])
    assert capsys.readouterr().out.count(" done ") == 4
    with pytest.raises(SystemExit):
        cli.main(["show", f"{ROOT}/{index['pm']}", "--samples"])
    said = capsys.readouterr().out
    assert f"{ROOT}/{index['pm']}, seed 0" in said and "== train.jsonl" in said
    assert sweep.run([*flags, "--status"]) == 0 and capsys.readouterr().out.splitlines()[-1] == "4 done"
    with pytest.raises(SystemExit) as end:
        cli.main(["fetch", ROOT, str(here / "fetched")])
    assert end.value.code == 0 and (here / "fetched" / index["eval"] / "evals" / "scores.csv").is_file()
    assert (here / "fetched" / "experiments" / "chain.json").is_file()


def test_slurm_is_not_given_a_bucket(memory, here):
    (here / "trained.py").write_text(TRAINED.format(steps=1))
    with pytest.raises(ConfigError, match="give --out a folder that the nodes share"):
        sweep.run(["trained.py", "--out", ROOT, "--backend", "slurm"])


# Processes that share a bucket on disk --------------------------------------------------------------------------------


@pytest.fixture
def machine(start_hhjax, tmp_path):
    """machine(name) -> run(*args), `hhjax run trained.py --out file://TMP/bucket/runs ARGS` with a disk of that name."""

    def make(name):
        disk = tmp_path / name
        disk.mkdir()
        return lambda *args: start_hhjax(tmp_path, "run", "trained.py", "--out", f"file://{tmp_path}/bucket/runs", *args, env={"TMPDIR": str(disk)})

    return make


def saved_steps(out: Path) -> list[int]:
    """The checkpoints of the language model that the bucket has."""
    return sorted(int(p.stem) for p in out.glob("lm/*/checkpoints/*.json"))


def wait_for_save(process, out: Path, after: int = 0) -> None:
    while not any(step > after for step in saved_steps(out)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def test_a_machine_that_is_lost_is_replaced_by_one_with_an_empty_disk(machine, hhjax, tmp_path):
    """kill -9, and all that was on its disk is gone: rows are those of a run that was never stopped. Then SIGTERM, the same."""
    (tmp_path / "trained.py").write_text(TRAINED.format(steps=150))
    out = tmp_path / "bucket" / "runs"
    first = machine("first")()
    wait_for_save(first, out)
    first.kill()
    first.wait()
    [lm] = (out / "lm").iterdir()
    saved = saved_steps(out)[-1]
    assert max(row["step"] for row in read_rows(lm / "metrics.jsonl")) >= saved >= 10 and (lm / "LOCK").is_file()
    shutil.rmtree(tmp_path / "first")
    second = machine("second")()
    wait_for_save(second, out, after=saved)
    assert state_of(lm) == "running"
    second.send_signal(signal.SIGTERM)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == launch.PREEMPTED, output
    assert state_of(lm) == "preempted" and not (lm / "LOCK").exists() and not list((tmp_path / "second").glob("hhjax-*"))
    stopped = saved_steps(out)[-1]
    assert [row["step"] for row in read_rows(lm / "metrics.jsonl")][-1] == stopped > saved
    third, alone = machine("third")(), hhjax("run", "trained.py", "--out", "alone")
    outputs = [p.communicate(timeout=300)[0] for p in (third, alone)]
    assert [third.returncode, alone.returncode] == [0, 0], outputs
    events = [e["event"] for e in read_events(lm)]
    assert events.count("start") == 3 and events.count("restore") == 2 and events[-1] == "done" and (lm / "DONE").is_file()
    rows, expected = (same(read_rows(folder / "metrics.jsonl")) for folder in (lm, tmp_path / "alone" / "lm" / lm.name))
    assert rows == expected and len(rows) == 151


def test_two_processes_share_the_stages_of_a_bucket(machine, tmp_path):
    (tmp_path / "trained.py").write_text(TRAINED.format(steps=3))
    process = machine("one")("--jobs", "2")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "-- 2 of 2 stages done" in output, output
    done = [p.parent for p in (tmp_path / "bucket" / "runs").glob("*/*/DONE")]
    assert len(done) == 2 and all([e["event"] for e in read_events(folder)].count("start") == 1 for folder in done)


@pytest.mark.slow
def test_the_hosts_of_a_cluster_have_a_copy_each(start_two, tmp_path):
    """Neither sees the other's disk: what process 0 makes comes to process 1 by the bucket."""
    (tmp_path / "trained.py").write_text(TRAINED.format(steps=3))
    out = tmp_path / "bucket" / "runs"
    for args in (("--stage", "tok"), ()):
        started = start_two(tmp_path, "run", "trained.py", "--out", f"file://{out}", *args)
        outputs = [p.communicate(timeout=300)[0] for p in started]
        assert [p.returncode for p in started] == [0, 0], outputs
    [lm] = (out / "lm").iterdir()
    assert (lm / "DONE").is_file() and (lm / "checkpoints" / "3.json").is_file() and [r["step"] for r in read_rows(lm / "metrics.jsonl")][-1] == 3


def test_a_sweep_of_a_bucket_keeps_the_console_of_its_jobs(start_hhjax, tmp_path):
    (tmp_path / "trained.py").write_text(TRAINED.format(steps=3))
    process = start_hhjax(tmp_path, "sweep", "trained.py", "--out", f"file://{tmp_path}/bucket/runs")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and output.count("done: ") == 2, output
    logs = list((tmp_path / "bucket" / "runs").glob("*/*/console.log"))
    assert len(logs) == 2 and any("lm 3/3" in log.read_text() for log in logs)


def test_a_finished_run_can_be_read_without_a_copy(memory):
    """Times are the bucket's, so that a holder that beats counts as alive."""
    with one_run() as folder, bucket.hold_lock(folder):
        (folder / "config.json").write_text("{}")
        bucket.send(folder)
        with reading_copy(ROOT, bucket.LISTED) as out:
            at = out / "lm" / folder.name / "LOCK"
            assert json.loads(at.read_text())["pid"] == os.getpid() and time.time() - at.stat().st_mtime < 60
