"""`hhjax sweep FILE --jobs N`: the stages of all runs, each once, as subprocesses, when what they need is done."""

import glob
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hhjax import launch
from hhjax.experiment import Placed, Run, place
from hhjax.flags import parse

POLL_S = 0.2


class Job(NamedTuple):
    """One stage to train. needs: folders that must be done first; run, stage: how a subprocess is told."""

    folder: Path
    run: str
    stage: str
    needs: frozenset[Path]


class Stopped(Exception):
    """SIGTERM reached the sweep."""


def run(argv: Sequence[str]) -> int:
    """Trains every missing stage. A failing stage stops only the stages that need it, directly or not.

    Each subprocess is `hhjax run FILE --only RUN --stage STAGE`, with its output in console.log of its
    folder. Returns 0, or the exit code of the first stage that failed; SIGTERM is passed on, and gives 75.
    """
    command, _ = parse(argv, "hhjax sweep")
    flags = [flag for flag in without(argv, ("--jobs", "--only")) if flag != "--share"]  # each stage has a process to itself
    if command.launch.dry_run or command.launch.print_config:
        return launch.run([*flags, "--only", command.launch.only])
    placed = [(r, place(r, command.launch.out, command.launch.data_dir)) for r in command.runs]
    launch.write_index(command, placed)
    previous = signal.signal(signal.SIGTERM, raise_stopped)
    try:
        return schedule(list_jobs(placed), command.launch.jobs, lambda job: start(job, flags))
    finally:
        signal.signal(signal.SIGTERM, previous)


def list_jobs(placed: Sequence[tuple[Run, Sequence[Placed]]]) -> list[Job]:
    """One job per folder that is not done, parents before children."""
    jobs = {}
    for run, stages in placed:
        folders = {p.stage.name: p.dir for p in stages}
        for p in stages:
            if not launch.is_done(p.dir):
                jobs.setdefault(p.dir, Job(p.dir, run.full_name, p.stage.name, frozenset(folders[n] for n in p.after)))
    return list(jobs.values())


def schedule(jobs: list[Job], most: int, start) -> int:
    """Runs the jobs, at most so many at a time. start(job) -> Popen. Returns the first failure's exit code, or 0."""
    waiting, running, lost, first_failure = list(jobs), {}, set(), 0
    try:
        while waiting or running:
            for job in [j for j in waiting if j.needs & lost]:
                waiting.remove(job)
                lost.add(job.folder)
                print(f"skipped {job.stage} of {job.run}: a stage that it needs has failed", flush=True)
            not_done = {j.folder for j in (*waiting, *running)} | lost
            ready = [j for j in waiting if not j.needs & not_done][: most - len(running)]
            for job in ready:
                waiting.remove(job)
                running[job] = start(job)
                print(f"started {job.stage} of {job.run} ({job.folder})", flush=True)
            for job in [j for j, process in running.items() if process.poll() is not None]:
                code = running.pop(job).returncode
                print(f"{'done' if code == 0 else f'FAILED ({code})'}: {job.stage} of {job.run}", flush=True)
                if code:
                    print(f"  see {job.folder / 'console.log'}", flush=True)
                    lost.add(job.folder)
                    first_failure = first_failure or code
            time.sleep(POLL_S)
    except (Stopped, KeyboardInterrupt):
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        return launch.PREEMPTED
    return first_failure


def start(job: Job, flags: Sequence[str]) -> subprocess.Popen:
    """The stage in a process of its own."""
    job.folder.mkdir(parents=True, exist_ok=True)
    argv = ["run", *flags, "--only", glob.escape(job.run), "--stage", job.stage]
    with (job.folder / "console.log").open("ab") as log:
        to_log = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        return subprocess.Popen([sys.executable, "-m", "hhjax.cli", *argv], **to_log)


def without(args: Sequence[str], names: Sequence[str]) -> list[str]:
    """The arguments without these flags and their values."""
    kept, skip = [], False
    for a in args:
        name, _, value = a.partition("=")
        if not skip and name not in names:
            kept.append(a)
        skip = not skip and name in names and not value
    return kept


def raise_stopped(signum, frame):
    raise Stopped
