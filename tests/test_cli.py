"""The hhjax command."""

import json
from importlib.metadata import version

import numpy as np
import pytest

from hhjax import cli
from hhjax.analysis.scores import Scores, write_summary
from hhjax.io.metrics import MetricsWriter, write_event


def call(*argv) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    return end.value.code


@pytest.fixture
def out(tmp_path):
    """An OUT with one finished PM and one tokenizer that was stopped."""
    for kind, name in (("pm", "1M-s0-aaaaaaaaaa"), ("tokenizer", "v320-bbbbbbbbbb")):
        folder = tmp_path / "runs" / kind / name
        folder.mkdir(parents=True)
        config = {"kind": kind, "name": kind, "experiment": "e", "run": "seed=0", "seed": 0, "size": name.split("-")[0]}
        (folder / "config.json").write_text(json.dumps(config | {"config": {"optim": {"lr": 0.001}}, "identity": {}}))
        write_event(folder, "start")
    pm = tmp_path / "runs" / "pm" / "1M-s0-aaaaaaaaaa"
    writer = MetricsWriter(pm)
    writer.write(10, {"loss": 0.6, "accuracy": 0.7})
    writer.write(10, {"accuracy": 0.625}, prefix="eval")
    writer.close()
    (pm / "DONE").touch()
    (pm / "samples").mkdir()
    sample = {"row": 0, "part": "chosen", "prompt_len": 3, "length": 5, "prompt": "\n\nHuman: Hi", "text": " Hello"}
    (pm / "samples" / "train.jsonl").write_text(json.dumps(sample) + "\n")
    return tmp_path / "runs"


def test_ls_shows_state_step_and_metric(out, capsys):
    assert call("ls", str(out)) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "stage", "state", "step", "metric", "age", "made", "by"]
    by_run = {line.split()[0]: line.split() for line in lines}
    assert by_run["pm/1M-s0-aaaaaaaaaa"][1:6] == ["pm", "done", "10", "eval/accuracy", "0.6250"]
    assert by_run["tokenizer/v320-bbbbbbbbbb"][1:3] == ["tokenizer", "stopped"] and {line[-1] for line in by_run.values()} == {"e:seed=0"}
    assert call("ls", str(out / "none")) == 0 and "no runs under" in capsys.readouterr().out


@pytest.mark.parametrize(("event", "state"), [("preempt", "preempted"), ("nan", "diverged"), ("error", "failed")])
def test_ls_tells_how_a_run_ended(out, capsys, event, state):
    write_event(out / "tokenizer" / "v320-bbbbbbbbbb", event)
    call("ls", str(out))
    assert f"tokenizer  {state}" in capsys.readouterr().out


def test_show_prints_config_metrics_and_samples(out, capsys):
    assert call("show", str(out / "pm" / "1M-s0-aaaaaaaaaa"), "--samples") == 0
    text = capsys.readouterr().out
    assert "optim.lr  0.001" in text and "\naccuracy  0.7\n" in text and "eval/accuracy  0.625" in text and "[text]  Hello" in text and "no metrics" not in text
    assert call("show", str(out / "tokenizer" / "v320-bbbbbbbbbb")) == 0
    assert capsys.readouterr().out.endswith("\n\nno metrics yet\n\nstart\n")
    assert call("show", str(out)) == 2 and "is no run directory" in capsys.readouterr().err


def test_an_evaluation_shows_its_accuracy_and_its_table(out, capsys):
    folder = out / "pm" / "1M-s0-aaaaaaaaaa"
    scores = Scores(np.array(["x"] * 4), np.arange(4), np.ones(4, int), np.array([1.0, 1, 1, -1]), np.zeros(4), {})
    table = write_summary(folder / "evals", scores, {})
    assert call("ls", str(out)) == 0 and "accuracy 0.7500" in capsys.readouterr().out
    assert call("show", str(folder)) == 0 and f"\n\n{table}\n\n" in capsys.readouterr().out


def test_events_of_several_lines_are_indented():
    event = {"time": 1.0, "event": "data", "rows": 5, "report": "two\nlines", "traceback": "long"}
    assert cli.event_text(event) == "data: rows 5\n    two\n    lines"


def test_check_data_reports_and_is_strict(tiny_data, tmp_path, capsys):
    assert call("check-data", str(tiny_data / "pairs.jsonl"), "--strict") == 0
    bad = tmp_path / "bad.jsonl"
    bad.write_text((tiny_data / "pairs.jsonl").read_text() + '{"chosen": null}\n')
    assert call("check-data", str(bad)) == 0 and "200 kept, 1 skipped" in capsys.readouterr().out
    assert call("check-data", str(bad), "--strict") == 2 and "bad.jsonl:201" in capsys.readouterr().out
    assert call("check-data", str(tmp_path / "none.jsonl")) == 2
    bad.write_text('{"chosen": null}\n' * 12)
    assert call("check-data", str(bad)) == 2 and "bad.jsonl:12" in capsys.readouterr().out  # every row; nothing is left to train on


def test_tokenizer_train(tiny_data, tmp_path, capsys):
    argv = ("tokenizer", "train", "--out", tmp_path / "tok", "--sources", tiny_data / "text.jsonl", "--vocab", "320")
    assert call(*map(str, argv)) == 0
    assert (tmp_path / "tok" / "tokenizer.model").is_file() and "320 tokens" in capsys.readouterr().out


def test_wrong_commands_name_the_nearest(capsys):
    assert call("rnu") == 2 and "did you mean 'run'" in capsys.readouterr().err
    assert call() == 2 and call("--help") == 0 and call("run") == 2 and call("tokenizer") == 2
    assert "usage: hhjax run FILE" in capsys.readouterr().err
    assert call("--version") == 0 and capsys.readouterr().out == f"hhjax {version('hhjax')}\n"
