"""`hhjax run FILE --jobs N`: N processes of one command that share its stages, and one line of what is done."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from hhjax import launch
from hhjax.flags import parse
from hhjax.io.metrics import clock
from hhjax.placing import place
from hhjax.sweep import POLL_S, Stopped, raise_stopped, without


def run(argv: Sequence[str]) -> int:
    """`hhjax run`: in this process, or as the parent of `--jobs` others. Returns the exit code."""
    command, _ = parse(argv, "hhjax run")
    options = command.launch
    if options.jobs <= 1 or options.dry_run or options.print_config:
        return launch.run_command(command)
    previous, workers = signal.signal(signal.SIGTERM, raise_stopped), []
    try:
        with launch.at_hand(command) as here:
            folders = {p.dir for r in command.runs for p in place(r, Path(here.launch.out), options.data_dir)}
            launch.tell_of_other_source(folders)
            workers += (Worker([*without(argv, ("--jobs",)), "--share"]) for _ in range(options.jobs))
            return watch(workers, folders)
    except (Stopped, KeyboardInterrupt):
        return finish(workers) or launch.PREEMPTED
    finally:
        signal.signal(signal.SIGTERM, previous)


class Worker:
    """`hhjax run ARGV`, whose lines come out here whole: two terminals' live lines would overwrite each other."""

    def __init__(self, argv: Sequence[str]):
        self.process = subprocess.Popen([sys.executable, "-m", "hhjax.cli", "run", *argv], stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
        self.lines = threading.Thread(target=self.pass_on, daemon=True)
        self.lines.start()

    def pass_on(self) -> None:
        for line in self.process.stdout:
            print(line, end="", flush=True)

    def end(self) -> int:
        """Waits for the process and its last line. Returns the exit code."""
        code = self.process.wait()
        self.lines.join()
        return code


def watch(workers: list[Worker], folders: set) -> int:
    """Waits for the workers, with a line whenever a stage is done. When one fails the others save and stop.

    Returns the exit code of the first that failed, or 0.
    """
    began, told, failed, running = time.monotonic(), sum(map(launch.is_done, folders)), 0, True
    while running and not failed:
        time.sleep(POLL_S)
        failed = next((w.process.returncode for w in workers if w.process.poll()), 0)
        running = any(worker.process.poll() is None for worker in workers)
        done = sum(launch.is_done(folder, at_once=not running) for folder in folders)
        if done > told:
            print(f"-- {done} of {len(folders)} stages done after {clock(time.monotonic() - began)}", flush=True)
        told = done
    ended = finish(workers)
    return failed or ended


def finish(workers: list[Worker]) -> int:
    """Tells those that still run to save and stop, and waits for all. Returns the first exit code that is neither 0 nor
    that of a process which was told to stop, or 0."""
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.terminate()
    codes = [worker.end() for worker in workers]
    return next((code for code in codes if code not in (0, launch.PREEMPTED)), 0)
