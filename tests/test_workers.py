"""Processes that share the stages of one command."""

import json

import pytest

from hhjax import launch
from hhjax.fields import ConfigError
from hhjax.io.lock import hold_lock, is_held

SHARED = '''"""Two language models of one tokenizer."""
from hhjax.data.sources import TextData
from hhjax.experiment import LM, Experiment, Tokenizer

TEXT = TextData(sources=("text.jsonl",))
SHORT = dict(tokenizer="tok", model="0.1M", data=TEXT, batch_size=8, steps=3, seq_len=32, log_every=1, eval_rows=8)
RUNS = Experiment("shared", (Tokenizer("tok", data=TEXT, vocab={vocab}), LM("a", **SHORT), LM("b", **SHORT | {{"steps": 4}})))
'''


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_two_processes_do_every_stage_once(hhjax, tmp_path):
    (tmp_path / "shared.py").write_text(SHARED.format(vocab=320))
    process = hhjax("run", "shared.py", "--jobs", 2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "-- 3 of 3 stages done" in output and "a 3/3" in output and "b 4/4" in output
    folders = [p.parent for p in (tmp_path / "runs").glob("*/*/DONE")]
    assert len(folders) == 3 and all([e["event"] for e in events(f)].count("start") == 1 for f in folders)
    again = hhjax("run", "shared.py", "--share")
    assert again.communicate(timeout=120) and again.returncode == 0


def test_a_failing_stage_ends_all_with_its_code(hhjax, tmp_path):
    (tmp_path / "shared.py").write_text(SHARED.format(vocab=50_000))  # more than this text can fill
    process = hhjax("run", "shared.py", "--jobs", 2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2 and "vocab 50000 does not suit" in output
    assert not list((tmp_path / "runs").glob("lm/*/DONE"))


def test_a_folder_is_held_while_its_lock_is(tmp_path):
    assert not is_held(tmp_path)
    with hold_lock(tmp_path):
        assert not is_held(tmp_path)  # by us: a restarted process with our number may take it over
    (tmp_path / "LOCK").write_text("{}")
    assert is_held(tmp_path)  # being written


def test_the_processes_of_a_cluster_do_not_share(monkeypatch):
    monkeypatch.setattr(launch, "is_one_of_many", lambda: True)
    with pytest.raises(ConfigError, match="processes of their own"):
        launch.share_stages(None, (), lambda: False)
