"""LOCK: one writer at a time, and none that is gone."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from hhjax.io import lock


def write_lock(folder, pid, host=None, age_s=0.0):
    path = folder / "LOCK"
    path.write_text(json.dumps({"host": host or socket.gethostname(), "pid": pid, "since": 0}))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_is_held_inside_and_gone_after(tmp_path):
    with lock.hold_lock(tmp_path):
        assert lock.is_alive(tmp_path / "LOCK") or lock.is_ours(lock.read_lock(tmp_path / "LOCK"))
    assert not (tmp_path / "LOCK").exists()


def test_a_dead_process_or_an_old_heartbeat_is_taken_over(tmp_path):
    silent = {"pid": 1, "host": "elsewhere", "age_s": lock.STALE_S + 1}
    for where in ({"pid": dead_pid()}, silent, {"pid": os.getpid()}):
        write_lock(tmp_path, **where)
        with lock.hold_lock(tmp_path):
            assert lock.is_ours(lock.read_lock(tmp_path / "LOCK"))
    assert not list(tmp_path.iterdir())


def test_a_torn_lock_is_taken_over_once_it_is_old(tmp_path):
    path = tmp_path / "LOCK"
    path.write_text("{")
    assert lock.is_alive(path)
    os.utime(path, (time.time() - lock.STALE_S,) * 2)
    with lock.hold_lock(tmp_path):
        pass


def test_a_live_holder_keeps_it(tmp_path):
    path = write_lock(tmp_path, os.getppid())
    with pytest.raises(lock.Held, match=str(os.getppid())), lock.hold_lock(tmp_path):
        pass
    assert path.exists()
