"""SIGTERM where no step is under way: stages without steps, evaluations, a LOCK that another holds. Exit 75, in seconds."""

import json
import os
import signal
import socket
import threading
import time

import pytest

from hhjax.io.metrics import read_events
from hhjax.loops.waiting import on_all, on_first
from hhjax.stages import Preempted, StageContext

WITHIN_S = 10
SLOW = '''
import time
from pathlib import Path
from hhjax.data.comparisons import ComparisonData
from hhjax.data.sources import TextData
from hhjax.evals import baselines
from hhjax.experiment import Experiment
from hhjax.stages import PM, Evaluate, Report, Tokenizer
from hhjax.loops import evaluate, supervised

def slowly(*args, **kwargs):
    Path("slow").touch()
    time.sleep(600)

def draw(folders, to):
    slowly()

if "{slow}" == "tokenizer":
    supervised.train_tokenizer = slowly
elif "{slow}" == "data":
    supervised.load_sources = slowly
elif "{slow}" == "evaluate":
    evaluate.baseline_margins = slowly
PAIRS = ComparisonData(("pairs.jsonl",))
RUNS = Experiment("slow", (
    Tokenizer("tok", data=TextData(("text.jsonl",)), vocab=320),
    PM("pm", tokenizer="tok", model="0.1M", data=PAIRS, seq_len=96, batch_size=8, steps=1, eval_rows=8),
    Evaluate("eval", of="pm", data=PAIRS),
    Report("page", of=("eval",), draw=draw),
))
'''


def stop(process, tmp_path) -> tuple[float, str]:
    """Sends SIGTERM once the slow part is reached. Returns seconds to the end, whose exit code is 75, and the output."""
    while not (tmp_path / "slow").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    return time.monotonic() - began, output


@pytest.mark.slow
@pytest.mark.parametrize("slow, kind", [("tokenizer", "tokenizer"), ("data", "pm"), ("evaluate", "evaluate"), ("draw", "report")])
def test_a_stage_without_steps_hears_sigterm(hhjax, tmp_path, slow, kind):
    (tmp_path / "slow.py").write_text(SLOW.format(slow=slow))
    seconds, output = stop(hhjax("run", "slow.py"), tmp_path)
    assert seconds < WITHIN_S and "was told to stop; what is not saved of it is done anew" in output
    [folder] = (tmp_path / "runs" / kind).iterdir()
    assert read_events(folder)[-1]["event"] == "preempt" and not (folder / "LOCK").exists() and not (folder / "DONE").exists()


def test_a_process_that_waits_for_a_lock_hears_sigterm(hhjax, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW.format(slow="none"))
    process = hhjax("run", "slow.py", "--print-config")
    config, _ = process.communicate(timeout=120)
    folder = tmp_path / next(iter(json.loads(config).values()))["tok"]["dir"]
    folder.mkdir(parents=True)
    (folder / "LOCK").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": 0}))
    process = hhjax("run", "slow.py")
    for line in process.stdout:
        if "waiting for process" in line:
            (tmp_path / "slow").touch()
            break
    seconds, output = stop(process, tmp_path)
    assert seconds < WITHIN_S and "told to stop while waiting for" in output
    assert (folder / "LOCK").exists()


def make_context(tmp_path, should_stop) -> StageContext:
    return StageContext(dir=tmp_path, seed=0, parents={}, parent_stages={}, should_stop=should_stop)


@pytest.mark.parametrize("on", [on_first, on_all])
def test_work_in_a_thread_gives_its_result_or_its_error(tmp_path, on):
    ctx = make_context(tmp_path, lambda: False)
    assert on(ctx, lambda: threading.current_thread().daemon) is True
    with pytest.raises(ZeroDivisionError):
        on(ctx, lambda: 1 / 0)


@pytest.mark.parametrize("on", [on_first, on_all])
def test_work_in_a_thread_is_given_up(tmp_path, on):
    go_on = threading.Event()
    polls = iter((False, False, True))
    with pytest.raises(Preempted):
        on(make_context(tmp_path, lambda: next(polls)), go_on.wait)
    go_on.set()
