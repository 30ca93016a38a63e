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


def test_a_suspended_process_of_this_host_keeps_it_and_one_of_its_number_does_not(tmp_path):
    """A laptop that slept: no heartbeat for long, but the process is there. Its number alone would not tell it from a later one."""
    path, parent = write_lock(tmp_path, os.getppid(), age_s=lock.STALE_S + 600), os.getppid()
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": parent, "started": lock.start_of(parent), "since": 0}))
    os.utime(path, (time.time() - lock.STALE_S - 600,) * 2)
    assert lock.is_alive(path)
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": parent, "started": "1", "since": 0}))
    assert not lock.is_alive(path)


@pytest.mark.parametrize("lost, said", [("path.write_text(json.dumps({'host': 'elsewhere', 'pid': 1, 'since': 0}))", "elsewhere"),
                                        ("path.unlink()", "one that has finished")])  # fmt: skip
def test_a_process_whose_lock_was_taken_over_ends(tmp_path, lost, said):
    code = "import json, sys, time\nfrom pathlib import Path\nfrom hhjax.io import lock\nlock.BEAT_S = 0.05\nwith lock.hold_lock(Path(sys.argv[1])):\n" \
           f"    path = Path(sys.argv[1]) / 'LOCK'\n    {lost}\n    time.sleep(20)\n"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "was taken over by" in done.stderr and said in done.stderr


def test_a_host_may_change_its_name(tmp_path, monkeypatch):
    """As a laptop that wakes in another network: the lock is still its own."""
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    with lock.hold_lock(tmp_path):
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
        time.sleep(0.2)
    assert not (tmp_path / "LOCK").exists()


def test_a_live_holder_keeps_it(tmp_path):
    path = write_lock(tmp_path, os.getppid())
    with pytest.raises(lock.Held, match=str(os.getppid())), lock.hold_lock(tmp_path):
        pass
    assert path.exists()
