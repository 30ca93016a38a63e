"""`hhjax run FILE --jobs N`: N processes of one command that share its stages, and one line of what is done."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from hhjax import launch
from hhjax.experiment import place
from hhjax.flags import parse
from hhjax.io.metrics import clock
from hhjax.sweep import POLL_S, Stopped, raise_stopped, without


def run(argv: Sequence[str]) -> int:
    """`hhjax run`: in this process, or as the parent of `--jobs` others. Returns the exit code."""
    command, _ = parse(argv, "hhjax run")
    options = command.launch
    if options.jobs <= 1 or options.dry_run or options.print_config:
        return launch.run_command(command)
    folders = {p.dir for r in command.runs for p in place(r, options.out, options.data_dir)}
    previous = signal.signal(signal.SIGTERM, raise_stopped)
    workers = [start([*without(argv, ("--jobs",)), "--share"]) for _ in range(options.jobs)]
    try:
        return watch(workers, folders)
    finally:
        signal.signal(signal.SIGTERM, previous)


def watch(workers: list[subprocess.Popen], folders: set) -> int:
    """Waits for the workers, with a line whenever a stage is done. Returns the exit code of the first that failed, or 0.

    When one fails, or this process is told to stop, the others save and stop.
    """
    began, told, failed = time.monotonic(), sum(map(launch.is_done, folders)), 0
    try:
        while any(worker.poll() is None for worker in workers):
            done = sum(map(launch.is_done, folders))
            if done > told:
                print(f"-- {done} of {len(folders)} stages done after {clock(time.monotonic() - began)}", flush=True)
            told = done
            bad = [worker.returncode for worker in workers if worker.poll()]
            if bad and not failed:
                failed = bad[0]
                stop(workers)
            time.sleep(POLL_S)
    except (Stopped, KeyboardInterrupt):
        stop(workers)
        failed = launch.PREEMPTED
    for worker in workers:
        failed = failed or worker.wait()
    return failed


def stop(workers: list[subprocess.Popen]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()


def start(argv: Sequence[str]) -> subprocess.Popen:
    """A worker whose lines come out here whole: two terminals' live lines would overwrite each other."""
    worker = subprocess.Popen([sys.executable, "-m", "hhjax.cli", "run", *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)  # fmt: skip
    threading.Thread(target=pass_on, args=(worker.stdout,), daemon=True).start()
    return worker


def pass_on(lines) -> None:
    for line in lines:
        print(line, end="", flush=True)
