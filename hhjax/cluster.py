"""The processes of a run: joining them, what they agree on, and the poll for SIGTERM that all make together."""

import os
import socket
import sys
from collections.abc import Callable

from hhjax.fields import ConfigError

NEVER_S = 10**9  # a process started alone that was stopped (Ctrl-Z, a scheduler) misses only its own heartbeats, and must not end for it


def join_cluster(heartbeat_timeout_s: int) -> Callable[[], bool]:
    """Joins the cluster that the environment describes, or one of this process alone, and returns should_stop.

    Alone too, because it is the cluster's service that hears SIGTERM: a bare process would die unsaved.
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name a cluster; SLURM, Open MPI, Cloud TPU
    and Kubernetes are found by jax; HHJAX_CLUSTER says that there is one to be found where the environment does not, as on
    bare TPU VMs. Raises ConfigError when jax is already in use.
    """
    import jax

    try:
        if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
            count, index = (int(os.environ[f"JAX_{n}"]) for n in ("NUM_PROCESSES", "PROCESS_ID"))
            jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=heartbeat_timeout_s if count > 1 else NEVER_S)
        elif is_on_cluster():
            jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_timeout_s)
        else:
            jax.distributed.initialize(f"127.0.0.1:{free_port()}", 1, 0, heartbeat_timeout_seconds=NEVER_S)
    except RuntimeError as error:
        if "before any JAX calls" not in " ".join(str(error).split()):
            raise
        message = "jax ran before the cluster was joined; an experiment file must not compute at import"
        raise ConfigError(message) from None
    return make_should_stop()


def is_on_cluster() -> bool:
    """Whether several processes were started together by something that jax knows."""
    many = bool(os.environ.get("HHJAX_CLUSTER")) or any(int(os.environ.get(n, "1") or 1) > 1 for n in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    return many or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "JOB_COMPLETION_INDEX" in os.environ


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def make_should_stop() -> Callable[[], bool]:
    """A poll for preemption (SIGTERM on any host), to be called equally often on every host.

    The answer of `reached_preemption_sync_point` is True for one tick only, and its ticks may never repeat,
    whatever stage they come from: so the tick is counted and the answer kept here.
    """
    from jax.experimental import multihost_utils

    ticks, stopped = 0, False

    def should_stop() -> bool:
        nonlocal ticks, stopped
        ticks += 1
        stopped = stopped or multihost_utils.reached_preemption_sync_point(ticks)
        return stopped

    return should_stop


def is_one_of_many() -> bool:
    """Whether this process has joined a cluster of several; asks without starting a backend."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def first_process() -> bool:
    import jax

    return jax.process_index() == 0


def all_agree(value: bool) -> bool:
    """Whether it is so on every process."""
    import jax

    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(value).all())


def agreed(value: int) -> int:
    """Process 0's value, on every process."""
    import jax

    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(value))
