"""What a run says about itself: metrics.jsonl, TensorBoard, events.jsonl and the console line. Never imports jax.

Rows up to a step are on disk before that step's checkpoint is, and a resumed run drops the rows
after the step it starts from, so the file is the same as if nothing had happened (times apart).
"""

import json
import math
import os
import sys
import time
from pathlib import Path

from hhjax.io import bucket
from hhjax.io.files import write_atomically

TIMING = ("seconds", "tokens_per_s", "flops_per_s", "share_of_ceiling", "useful_share", "memory_gib", "samples_per_s",
          *(f"{phase}_{unit}" for phase in ("generate", "score", "train", "read") for unit in ("s", "tokens_per_s")))  # may differ between equal runs


class MetricsWriter:
    """Rows of one run, in metrics.jsonl and TensorBoard.

    start: the step the run goes on from; rows after it, and a torn last line, are dropped first, and so is the evaluation of
    that step unless `evaluated`.
    """

    def __init__(self, run_dir: Path, start: int = 0, evaluated: bool = True):
        from tensorboardX import SummaryWriter

        self.run_dir = run_dir
        truncate_rows(run_dir / "metrics.jsonl", start, evaluated)
        self.file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        # purge_step hides what an earlier process wrote from that step on.
        self.board = SummaryWriter(str(run_dir / "tb"), purge_step=start + 1 if start else 0)

    def write(self, step: int, row: dict, prefix: str = "") -> dict:
        """Appends {"step": step, **row}, its names under `prefix`/, and returns it; null is what is not finite."""
        named = {f"{prefix}/{name}" if prefix else name: value for name, value in row.items()}
        self.file.write(json.dumps({"step": step} | {n: finite(v) for n, v in named.items()}) + "\n")
        self.file.flush()
        for name, value in named.items():
            if finite(value) is not None:
                self.board.add_scalar(name, value, step)
        return {"step": step} | named

    def sync(self) -> None:
        """Brings all rows to disk, and to the bucket where the folder is a copy, as must happen before a checkpoint of their step
        is committed."""
        self.flush()
        bucket.send(self.run_dir)

    def flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.board.flush()

    def close(self) -> None:
        self.flush()
        self.file.close()
        self.board.close()


class NullWriter:
    """A MetricsWriter for all processes but the first."""

    def write(self, step: int, row: dict, prefix: str = "") -> dict:
        return {"step": step} | row

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def read_rows(path: Path) -> list[dict]:
    """The rows of a jsonl file up to the first torn line; [] where there is no file."""
    rows = []
    if not path.is_file():
        return rows
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def truncate_rows(path: Path, last_step: int, evaluated: bool = True) -> None:
    """Drops the rows of steps after `last_step` and everything from a torn line on, in one rename; at 0, where a run begins
    anew, all of them: a look at step 0 is then taken again. Unless evaluated, that step's evaluation too."""
    if not path.is_file():
        return
    kept = [row for row in read_rows(path) if row["step"] <= last_step] if last_step else []
    if not evaluated:
        kept = [row for row in kept if row["step"] < last_step or not any(name.startswith("eval/") for name in row)]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def write_event(run_dir: Path, event: str, **details) -> None:
    """Appends {"time", "event", ...} to events.jsonl.

    Events are start, data, offsets, restore, damaged, save, preempt, nan, error and done.
    """
    row = json.dumps({"time": time.time(), "event": event, **details}, default=str) + "\n"
    with (run_dir / "events.jsonl").open("a+b") as f:
        if f.tell() and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n":
            f.write(b"\n")  # a torn line of a killed process
        f.write(row.encode())


def read_events(run_dir: Path) -> list[dict]:
    """The events in order, torn lines left out."""
    path, events = run_dir / "events.jsonl", []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


PLAIN_S = 2.0  # seconds between lines where there is no terminal


class Console:
    """One line about a run: redrawn in place on a terminal; elsewhere printed, at most every two seconds and at the end.

    name: what the line begins with; total: the last step.
    """

    def __init__(self, name: str, total: int, stream=None):
        self.name, self.total, self.stream = name, total, stream or sys.stdout
        self.saved, self.began, self.printed = None, None, -PLAIN_S
        self.live = None
        if self.stream.isatty():
            from rich.console import Console as Terminal
            from rich.live import Live

            self.live = Live("", console=Terminal(file=self.stream), auto_refresh=False, transient=False)
            self.live.start()

    def show(self, row: dict) -> None:
        """row: a metrics row with its step."""
        self.began = self.began or (time.monotonic(), row["step"])
        line = console_line(self.name, self.total, row, self.eta(row["step"]), self.saved)
        if self.live:
            from rich.text import Text

            self.live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif row["step"] == self.total or time.monotonic() - self.printed >= PLAIN_S:
            self.printed = time.monotonic()
            print(line, file=self.stream, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the live one."""
        if self.live:
            self.live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self.stream, flush=True)

    def eta(self, step: int) -> float | None:
        """Seconds that are left, by the pace since the first row; None before there is a pace."""
        began, first = self.began
        return (time.monotonic() - began) / (step - first) * (self.total - step) if step > first else None

    def close(self) -> None:
        if self.live:
            self.live.stop()


class NullConsole:
    """A Console for all processes but the first."""

    saved = None

    def show(self, row: dict) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def console_line(name: str, total: int, row: dict, eta_s: float | None, saved: int | None) -> str:
    """`pm 120/1000 | loss 0.6512 | accuracy 0.612 | 4.2k tok/s | 31% of ceiling | ETA 3:10 | saved 100`."""
    parts = [f"{name} {row['step']}/{total}"]
    parts += [f"{n} {row[n]:.4g}" for n in ("loss", "accuracy", "token_accuracy", "score", "sqrt_kl") if row.get(n) is not None]
    if row.get("tokens_per_s"):
        parts.append(f"{thousands(row['tokens_per_s'])} tok/s")
    if row.get("share_of_ceiling"):
        parts.append(f"{row['share_of_ceiling']:.0%} of ceiling")
    parts += [f"ETA {clock(eta_s)}"] if eta_s is not None else []
    parts += [f"saved {saved}"] if saved is not None else []
    return " | ".join(parts)


def thousands(x: float) -> str:
    return f"{x:.0f}" if x < 1000 else f"{x / 1e3:.1f}k" if x < 1e6 else f"{x / 1e6:.1f}M"


def clock(seconds: float) -> str:
    """3:10, or 1:02:05."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def finite(value):
    """A number as JSON takes it; None for nan and infinities."""
    return value if not isinstance(value, float) or math.isfinite(value) else None
