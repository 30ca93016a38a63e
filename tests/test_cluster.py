"""Who is one of several processes, by the environment; being told to stop; and a process alone that is stopped for a while."""

import signal
import subprocess
import sys
import time

import pytest

from hhjax import cluster

VARIABLES = ("HHJAX_CLUSTER", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "JOB_COMPLETION_INDEX")


@pytest.mark.parametrize("variable, value, many", [
    ("HHJAX_CLUSTER", "1", True),  # a bare TPU VM, by tpu/vm.sh
    ("SLURM_NTASKS", "8", True), ("SLURM_NTASKS", "1", False), ("OMPI_COMM_WORLD_SIZE", "2", True),
    ("TPU_WORKER_HOSTNAMES", "a,b", True), ("TPU_WORKER_HOSTNAMES", "localhost", False), ("JOB_COMPLETION_INDEX", "0", True), (None, "", False),
])  # fmt: skip
def test_a_cluster_is_told_by_its_variables(monkeypatch, variable, value, many):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, value)
    assert cluster.is_on_cluster() == many


def test_the_poll_remembers_that_it_was_told_to_stop(monkeypatch):
    """jax says so for one tick only, and its ticks may not repeat."""
    from jax.experimental import multihost_utils

    ticks = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda tick: ticks.append(tick) or tick == 3)
    should_stop = cluster.make_should_stop()
    assert [should_stop() for _ in range(5)] == [False, False, True, True, True]
    assert ticks == [1, 2, 3]


@pytest.mark.slow
def test_a_process_alone_outlives_being_stopped():
    """Ctrl-Z, or a scheduler's SIGSTOP, for longer than a lost peer is waited for; SIGTERM is still heard after it."""
    code = "import time; from hhjax.cluster import join_cluster; stop = join_cluster(2); print('joined', flush=True)\nwhile not stop(): time.sleep(0.1)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "joined\n"
            for _ in range(3):  # with a heartbeat to miss, each ends it about every other time
                process.send_signal(signal.SIGSTOP)
                time.sleep(6)
                process.send_signal(signal.SIGCONT)
                time.sleep(1)
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
