"""A run directory: what is written into it when a stage starts, and what can be read later. Never imports jax."""

import json
import os
import platform
import shutil
import socket
import subprocess
import time
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from hhjax.fields import ConfigError
from hhjax.io.files import checkpoints_dir, write_atomically
from hhjax.io.lock import is_alive, read_lock
from hhjax.io.metrics import read_events, read_rows

PACKAGES = ("hhjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece", "tokenizers")


class RunState(NamedTuple):
    """One line of `hhjax ls`. age_s: since the last sign of life. made_by: the experiment and run that began it, with what was overridden.

    state: done, running, preempted, failed, diverged, or stopped (which says nothing of why).
    """

    dir: Path
    name: str
    state: str
    step: int | None
    metric: str
    age_s: float
    made_by: str


def write_start(folder: Path, config: dict, source: Path, modules: list[Path], command: str, devices: dict) -> None:
    """config.json, experiment.py (and modules/ that it imports), command.txt and env.json.

    Raises ConfigError, naming the field, where the folder was made with another identity.
    """
    check_identity(folder, config["identity"])
    write_atomically(folder / "config.json", json.dumps(config, indent=1) + "\n")
    shutil.copyfile(source, folder / "experiment.py")
    for module in modules:
        (folder / "modules").mkdir(exist_ok=True)
        shutil.copyfile(module, folder / "modules" / module.name)
    with (folder / "command.txt").open("a") as f:
        f.write(command + "\n")
    write_atomically(folder / "env.json", json.dumps(environment(folder) | {"devices": devices}, indent=1) + "\n")


def check_identity(folder: Path, identity: dict) -> None:
    """Raises ConfigError where config.json records another identity than this."""
    path = folder / "config.json"
    if not path.is_file():
        return
    saved = flat(json.loads(path.read_text()).get("identity", {}))
    now = flat(json.loads(json.dumps(identity)))
    for field in sorted(saved.keys() | now.keys()):
        if saved.get(field) != now.get(field):
            raise ConfigError(
                f"{folder} was made with {field}={saved.get(field)!r}, this run has {field}={now.get(field)!r}; "
                f"move the folder away, or choose another --out"
            )


def flat(value, prefix: str = "") -> dict:
    """Nested dicts as {dotted path: value}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}.{name}".strip(".")).items()}


def environment(folder: Path) -> dict:
    """Versions, host and the state of the source; a dirty tree's diff goes to dirty.diff."""
    commit, diff = source_state()
    if diff:
        (folder / "dirty.diff").write_text(diff)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "versions": versions,
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "git_commit": commit,
        "git_dirty": bool(diff),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


@lru_cache
def source_state() -> tuple[str | None, str]:
    """(commit of this package's source, diff of what is not committed); (None, "") where its files are in no repository of their own."""
    here = Path(__file__).parent
    if git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:  # installed below somebody else's repository
        return None, ""
    return (git(here, "rev-parse", "HEAD") or "").strip() or None, git(here, "diff", "HEAD") or ""


def other_source(folder: Path) -> str | None:
    """The commit, in short, at which a run directory was last started, where its source was not the present one for certain: another
    commit, or changes that are not committed, then or now."""
    path = folder / "env.json"
    made, (commit, diff) = json.loads(path.read_text()) if path.is_file() else {}, source_state()
    if not (made.get("git_commit") and commit) or (made["git_commit"] == commit and not (made["git_dirty"] or diff)):
        return None
    return made["git_commit"][:7] + " with changes" * made["git_dirty"]


def git(where: Path, *args: str) -> str | None:
    """The output of a git command, or None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(where), *args], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def list_runs(out: Path) -> list[RunState]:
    """Every run directory under `out`, the latest sign of life first."""
    states = [read_state(config.parent) for config in out.glob("*/*/config.json")]
    return sorted(states, key=lambda s: s.age_s)


def read_state(folder: Path) -> RunState:
    rows, config = read_rows(folder / "metrics.jsonl"), json.loads((folder / "config.json").read_text())
    files = [p for p in (folder / n for n in ("metrics.jsonl", "events.jsonl", "DONE", "LOCK")) if p.exists()]
    age_s = time.time() - max((p.stat().st_mtime for p in files), default=folder.stat().st_mtime)
    step = rows[-1]["step"] if rows else None
    return RunState(folder, config["name"], state_of(folder), step, main_metric(folder, rows), age_s, f"{config['experiment']}:{config['run']}")


def state_of(folder: Path) -> str:
    if (folder / "DONE").exists():
        return "done"
    if is_alive(folder / "LOCK"):
        return "running"
    ends = {"preempt": "preempted", "nan": "diverged", "error": "failed"}
    last = [e["event"] for e in read_events(folder) if e["event"] in (*ends, "start")]
    return ends.get(last[-1] if last else "", "stopped")


def why_not_done(folder: Path) -> tuple[str, str]:
    """(state, why) of a stage for whoever is to start it: new, running, resumable, done or failed. A failed one may be tried again."""
    if not (folder / "config.json").exists():
        return "new", ""
    state, events = state_of(folder), read_events(folder)
    if state == "done":
        return state, ""
    if state == "running":
        holder = read_lock(folder / "LOCK")
        return state, f"process {holder.get('pid')} on {holder.get('host')}"
    last = next((e for e in reversed(events) if e["event"] in ("preempt", "nan", "error", "start")), {})
    if state == "failed":
        return "failed", last["message"]
    if state == "diverged":
        return "failed", f"{last['metric']} is not finite at step {last['step']}"
    ended = "told to stop" if state == "preempted" else "ended without a word"
    return "resumable", f"{ended}, {what_is_saved(folder)}"


def what_is_saved(folder: Path) -> str:
    """The newest checkpoint in words, also where none can be read: a bucket without gcsfs, without leave, without a network."""
    at = checkpoints_dir(folder)
    try:
        saved = max((int(p.stem) for p in at.glob("*.json") if p.stem.isdigit()), default=None)
    except Exception as error:  # of gcsfs, of what is below it, or for want of it
        return f"checkpoints at {at}, which cannot be read here: {error}"
    return "nothing saved" if saved is None else f"saved at step {saved}"


def main_metric(folder: Path, rows: list[dict]) -> str:
    """The accuracy of an evaluation, a policy's newest score and distance, else the newest held-out accuracy or loss, else the newest training
    loss, as text."""
    summary = folder / "evals" / "summary.json"
    if summary.is_file():
        ours = [row for row in json.loads(summary.read_text())["accuracy"] if row["scorer"] == "pm"]
        return f"accuracy {ours[-1]['accuracy']['value']:.4f}"
    if rows and "sqrt_kl" in (last := next((row for row in reversed(rows) if "score" in row), {})):
        return f"score {last['score']:.2f}, sqrt_kl {last['sqrt_kl']:.2f}"
    for name in ("eval/accuracy", "eval/loss", "loss"):
        if found := [row[name] for row in rows if row.get(name) is not None]:
            return f"{name} {found[-1]:.4f}"
    return ""
