"""Work that has no steps to poll at: it goes on in a thread, and is given up when the run is told to stop."""

import threading
from collections.abc import Callable

import jax

from hhjax.cluster import agreed, all_agree
from hhjax.stages import StageContext

POLL_S = 0.2


def on_first(ctx: StageContext, work: Callable):
    """What `work()` returns on process 0, where it runs in a thread; None on the others, which wait. All poll meanwhile.

    work: no jax in it, since processes must launch their collectives in one order. Its errors are raised here. Raises Preempted
    when told to stop: the thread ends with the process, so what it writes must be what a new start writes again.
    """
    task = Task(work) if jax.process_index() == 0 else None
    while not agreed(task is not None and task.done.wait(POLL_S)):
        ctx.stop_if_told()
    return task.result() if task else None


def on_all(ctx: StageContext, work: Callable):
    """What `work()` returns on each process, where it runs in a thread; all poll until all are through with it. Else as `on_first`."""
    task = Task(work)
    while not all_agree(task.done.wait(POLL_S)):
        ctx.stop_if_told()
    return task.result()


class Task:
    """A call in a thread that the end of the process does not wait for."""

    def __init__(self, work: Callable):
        self.work, self.done, self.value, self.error = work, threading.Event(), None, None
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        try:
            self.value = self.work()
        except BaseException as error:  # whatever it is, it is raised where it is waited for
            self.error = error
        self.done.set()

    def result(self):
        if self.error:
            raise self.error
        return self.value
