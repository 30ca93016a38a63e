"""Processes that share the stages of one command."""

import json
import signal
import subprocess
import sys
import time

import pytest

from hhjax import launch
from hhjax.fields import ConfigError
from hhjax.io.lock import Held, hold_lock

SHARED = '''"""Two language models of one tokenizer."""
from hhjax.data.sources import TextData
from hhjax.experiment import Experiment
from hhjax.stages import LM, Tokenizer

TEXT = TextData(sources=("text.jsonl",))
SHORT = dict(tokenizer="tok", model="0.1M", data=TEXT, batch_size=8, steps={steps}, seq_len=32, log_every=1, eval_rows=8)
RUNS = Experiment("shared", (Tokenizer("tok", data=TEXT, vocab={vocab}), LM("a", **SHORT), LM("b", **SHORT | {{"seq_len": 24}})))
'''


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_two_processes_do_every_stage_once(hhjax, tmp_path):
    (tmp_path / "shared.py").write_text(SHARED.format(vocab=320, steps=3))
    process = hhjax("run", "shared.py", "--jobs", 2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "-- 3 of 3 stages done" in output and "a 3/3" in output and "b 3/3" in output
    folders = [p.parent for p in (tmp_path / "runs").glob("*/*/DONE")]
    assert len(folders) == 3 and all([e["event"] for e in events(f)].count("start") == 1 for f in folders)
    again = hhjax("run", "shared.py", "--share")
    assert again.communicate(timeout=120) and again.returncode == 0


def test_a_failing_stage_ends_all_with_its_code(hhjax, tmp_path):
    (tmp_path / "shared.py").write_text(SHARED.format(vocab=50_000, steps=3))  # more than this text can fill
    process = hhjax("run", "shared.py", "--jobs", 2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2 and "vocab 50000 does not suit" in output
    assert not list((tmp_path / "runs").glob("lm/*/DONE"))


def test_sigterm_reaches_the_workers_which_save(hhjax, tmp_path):
    (tmp_path / "shared.py").write_text(SHARED.format(vocab=320, steps=100_000))
    process = hhjax("run", "shared.py", "--jobs", 2)
    rows = lambda: [p.read_text().count("\n") for p in tmp_path.glob("runs/lm/*/metrics.jsonl")]  # noqa: E731
    while len(rows()) < 2 or min(rows()) < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == launch.PREEMPTED, output
    folders = list((tmp_path / "runs" / "lm").iterdir())
    assert len(folders) == 2 and all(events(f)[-1]["event"] == "preempt" and not (f / "LOCK").exists() for f in folders)


def test_a_lock_that_another_process_holds_is_not_waited_for(tmp_path):
    code = "import sys, time; from pathlib import Path; from hhjax.io.lock import hold_lock\n"
    code += "with hold_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(Held), hold_lock(tmp_path):
            pass
        other.kill()
    with hold_lock(tmp_path):  # its holder is gone
        assert (tmp_path / "LOCK").exists()


def test_the_processes_of_a_cluster_do_not_share(monkeypatch):
    monkeypatch.setattr(launch, "is_one_of_many", lambda: True)
    with pytest.raises(ConfigError, match="processes of their own"):
        launch.share_stages(None, (), lambda: False)
