"""Two processes of four devices each, over loopback: the run of one process, whatever happens to either of them.

PPO on two hosts is in loops/test_rlhf.py.
"""

import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from hhjax.io.checkpoint import good_steps
from hhjax.io.metrics import TIMING, read_events, read_rows
from hhjax.loops.supervised import load_model
from hhjax.sharding import make_mesh

pytestmark = pytest.mark.slow

STEPS = 40
HEARTBEAT_S = 10
EXPERIMENT = """
from hhjax.data.comparisons import ComparisonData
from hhjax.data.sources import TextData
from hhjax.experiment import Experiment
from hhjax.stages import LM, PM
from hhjax.sharding import MeshConfig

COMMON = dict(tokenizer={tokenizer!r}, model="0.1M", mesh=MeshConfig(2, 2, 2), batch_size=8, log_every=1, eval_rows=12)
RUNS = Experiment("hosts", (
    LM("lm", data=TextData(("text.jsonl",)), seq_len=32, steps=3, **COMMON),
    PM("pm", data=ComparisonData(("pairs.jsonl",)), seq_len=96, steps={steps}, save_every=5, eval_every=20, **COMMON),
))
"""
ONLY_PM = ("run", "hosts.py", "--stage", "pm")
STUCK = """
import os, time
from hhjax.data import stream

read = stream.PairSource.batch

def storage_that_hangs(self, seed, step, host=stream.Host()):
    if step == 6 and os.environ["JAX_PROCESS_ID"] == "1":
        time.sleep(600)
    return read(self, seed, step, host)

stream.PairSource.batch = storage_that_hangs
"""


@pytest.fixture
def folder(tmp_path, tiny_tokenizer) -> Path:
    (tmp_path / "hosts.py").write_text(EXPERIMENT.format(tokenizer=str(tiny_tokenizer), steps=STEPS))
    return tmp_path


@pytest.fixture(scope="module")
def alone(start_hhjax, tiny_tokenizer, tmp_path_factory) -> Path:
    """The folder in which one process with all eight devices has run EXPERIMENT."""
    where = tmp_path_factory.mktemp("alone")
    (where / "hosts.py").write_text(EXPERIMENT.format(tokenizer=str(tiny_tokenizer), steps=STEPS))
    end([start_hhjax(where, "run", "hosts.py", devices=8)])
    return where


def end(processes, code: int = 0) -> list[str]:
    """Waits for the end of each, which must have this exit code. Returns what they said."""
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), "\n--\n".join(said)
    return said


def stage(folder: Path, kind: str) -> Path:
    [found] = (folder / "runs" / kind).iterdir()
    return found


def wait_for_rows(processes, folder: Path, count: int, saves: int = 0) -> None:
    """Returns once the PM has so many rows, and good checkpoints; fails when a process ends before."""
    while (sum(len(read_rows(p)) for p in folder.glob("runs/pm/*/metrics.jsonl")) < count
           or len(list(folder.glob("runs/pm/*/checkpoints/*.json"))) < saves):  # fmt: skip
        for process in processes:
            assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def assert_run_of_one(folder: Path, alone: Path, kinds=("pm",)) -> None:
    """Every metric and parameter, as far as sums in another order allow."""
    for kind in kinds:
        rows, expected = (read_rows(stage(f, kind) / "metrics.jsonl") for f in (folder, alone))
        assert [row["step"] for row in rows] == [row["step"] for row in expected]
        for row, one in zip(rows, expected):
            assert row.keys() - set(TIMING) == one.keys() - set(TIMING)
            for name in row.keys() - set(TIMING):
                assert row[name] == pytest.approx(one[name], rel=2e-4, abs=1e-5), (kind, name, row["step"])
        found = [jax.tree.leaves(load_model(stage(f, kind), None, make_mesh())[1]) for f in (folder, alone)]
        for a, b in zip(*found):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_two_processes_give_the_run_of_one(folder, alone, start_two):
    said = end(start_two(folder, "run", "hosts.py", devices=4))
    assert_run_of_one(folder, alone, ("lm", "pm"))
    events = [e["event"] for e in read_events(stage(folder, "pm"))]
    assert events.count("start") == events.count("done") == events.count("data") == 1  # process 0 alone writes
    assert "pm" in said[0] and f"{STEPS}/{STEPS}" in said[0] and f"/{STEPS}" not in said[1]


@pytest.mark.parametrize("told, after", [(0, 1), (1, 2)], ids=["first, then one process", "second, then two"])
def test_sigterm_to_either_saves_one_step_on_both(folder, alone, start_two, start_hhjax, told, after):
    hosts = start_two(folder, *ONLY_PM, devices=4)
    wait_for_rows(hosts, folder, 3)
    hosts[told].send_signal(signal.SIGTERM)
    said = end(hosts, 75)
    [event] = [e for e in read_events(stage(folder, "pm")) if e["event"] == "preempt"]
    assert all(f"saved at step {event['step']} of {STEPS}" in text for text in said)
    assert good_steps(stage(folder, "pm") / "checkpoints")[-1] == event["step"] < STEPS
    end([start_hhjax(folder, *ONLY_PM, devices=8)] if after == 1 else start_two(folder, *ONLY_PM, devices=4))
    assert [e["step"] for e in read_events(stage(folder, "pm")) if e["event"] == "restore"] == [event["step"]]
    assert_run_of_one(folder, alone)


@pytest.mark.parametrize("killed", [0, 1])
def test_kill_9_of_either_ends_the_other_and_the_job_goes_on(folder, alone, start_two, killed):
    args = (*ONLY_PM, "--heartbeat-timeout-s", HEARTBEAT_S)
    hosts = start_two(folder, *args, devices=4)
    wait_for_rows(hosts, folder, 8, saves=1)
    hosts[killed].kill()
    began, other = time.monotonic(), hosts[1 - killed]
    said, _ = other.communicate(timeout=300)
    assert time.monotonic() - began < 1.5 * HEARTBEAT_S
    assert other.returncode in (1, -6), said  # a collective failed, or the heartbeat was missed; -6 is what a shell calls 134
    end(start_two(folder, *args, devices=4))
    assert [e["step"] for e in read_events(stage(folder, "pm")) if e["event"] == "restore"]
    assert_run_of_one(folder, alone)


def test_a_stuck_process_is_ended_with_its_stack(folder, start_two):
    """It still has a heartbeat, so that only a watchdog tells: its own, or that of the peer that waits for it, whose end it then
    does not survive."""
    (folder / "hosts.py").write_text((folder / "hosts.py").read_text() + STUCK)
    hosts = start_two(folder, *ONLY_PM, "--pm.watchdog-s", 25, devices=4)
    said = [process.communicate(timeout=300)[0] for process in hosts]
    codes = [process.returncode for process in hosts]
    assert 1 in codes and set(codes) <= {1, -6} and "Timeout (0:00:25)!" in said[codes.index(1)], said
    assert "in storage_that_hangs" in said[1] and "in storage_that_hangs" not in said[0], said
