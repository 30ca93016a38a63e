"""Metrics files after crashes, and the console line."""

import io
import math
import subprocess
import sys

from hhjax.io import metrics


def test_rows_after_the_restored_step_and_a_torn_line_are_dropped(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, {"loss": step / 3})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    first = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(first) + b'{"step": 6, "lo')
    writer = metrics.MetricsWriter(tmp_path, start=3)
    writer.write(4, {"loss": 4 / 3})
    writer.close()
    assert path.read_bytes().splitlines(keepends=True) == first[:4]


def test_a_torn_line_in_the_middle_ends_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n{"step": 4}\n')
    assert metrics.read_rows(path) == [{"step": 1}]
    assert metrics.read_rows(tmp_path / "none.jsonl") == []


def test_rows_carry_prefixes_and_null_for_what_is_not_finite(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    writer.write(1, {"loss": math.nan, "accuracy": 0.5}, prefix="eval")
    writer.close()
    assert metrics.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "eval/loss": None, "eval/accuracy": 0.5}]


def test_events_survive_a_torn_line(tmp_path):
    metrics.write_event(tmp_path, "start", pid=1)
    with (tmp_path / "events.jsonl").open("a") as f:
        f.write('{"time": 1, "ev')
    metrics.write_event(tmp_path, "done")
    assert [e["event"] for e in metrics.read_events(tmp_path)] == ["start", "done"]


def test_console_prints_plain_lines_when_it_is_no_terminal():
    stream = io.StringIO()
    console = metrics.Console("pm", 1000, stream)
    console.saved = 100
    console.show({"step": 120, "loss": 0.65123, "accuracy": 0.612, "tokens_per_s": 4200.0, "share_of_ceiling": 0.31})
    assert stream.getvalue() == "pm 120/1000 | loss 0.6512 | accuracy 0.612 | 4.2k tok/s | 31% of ceiling | saved 100\n"


def test_console_redraws_one_line_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    console = metrics.Console("pm", 10, stream)
    console.show({"step": 1, "loss": 0.5})
    console.say("pm 1: held out: loss 0.4")
    console.show({"step": 2, "loss": 0.25})
    console.close()
    text = stream.getvalue()
    assert "held out" in text and "pm 2/10 | loss 0.25" in text and "\x1b[" in text


def test_times_read_as_clocks():
    assert metrics.clock(190) == "3:10" and metrics.clock(3725) == "1:02:05"


def test_metrics_never_import_jax():
    code = "import sys, hhjax.io.metrics, hhjax.io.rundir; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
