"""LOCK: one writer for a run directory at a time, and takeover from a writer that is gone."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

BEAT_S = 10.0
STALE_S = 120.0  # a heartbeat older than this is nobody's; far above BEAT_S, for slow shared file systems


class Held(Exception):
    """Another live process holds the lock."""


@contextlib.contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Holds folder/LOCK, with a heartbeat, while the block runs. Raises Held while another live process holds it."""
    path, mine = folder / "LOCK", claim()
    while not take_lock(path, mine):
        if is_alive(path):
            raise Held(f"{path} is held by {read_lock(path)}")
    try:
        with beating(heart(path, mine)):
            yield
    finally:
        if text_of(path) == mine:
            path.unlink(missing_ok=True)


def claim() -> str:
    """What this process writes into a LOCK."""
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": start_of(os.getpid()), "since": time.time()})


def heart(path: Path, mine: str) -> Callable[[], None]:
    """beat(), which ends this process where its lock has become another's, or is gone twice running: it was suspended for longer than
    STALE_S, and two would write, or it would write where another has finished."""
    missing = 0

    def beat():
        nonlocal missing
        held = text_of(path)
        missing = 0 if held else missing + 1
        if (held and held != mine) or missing > 1:
            print(f"{path} was taken over by {held or 'one that has finished'}: this process ends, and may be started anew", file=sys.stderr, flush=True)
            os._exit(1)
        os.utime(path)

    return beat


def take_lock(path: Path, mine: str) -> bool:
    """True when the lock is now `mine`: it was free, or its holder is gone."""
    try:
        with path.open("x") as f:
            f.write(mine)
        return True
    except FileExistsError:
        pass
    if is_alive(path):
        return False
    # Two waiters may both find it stale: whoever renames it first goes on, the other finds a new lock, or none.
    stale = path.with_name(f".LOCK.{socket.gethostname()}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(stale)
        if is_alive(stale):  # it was replaced between the look and the rename
            with contextlib.suppress(FileExistsError):
                os.link(stale, path)
        stale.unlink()
    return False


def is_alive(path: Path) -> bool:
    """Whether the lock's holder still runs: on this host by its pid and start, whatever the age of its heartbeat (it may have been
    suspended); by its heartbeat elsewhere."""
    holder = read_lock(path)
    try:
        age_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    if not holder:  # being written, or torn by a crash
        return age_s < BEAT_S
    if is_ours(holder):  # of an earlier process with our number: a restarted container
        return False
    if holder["host"] == socket.gethostname():
        if not pid_runs(holder["pid"]):
            return False
        if (started := holder.get("started")) and (now := start_of(holder["pid"])):  # another user's may not be told
            return started == now
    return age_s < STALE_S


def read_lock(path: Path) -> dict:
    """The holder {"host", "pid", "started", "since"}; {} where there is none, or none that can be read."""
    try:
        return json.loads(text_of(path))
    except ValueError:
        return {}


def text_of(path: Path) -> str:
    """What a LOCK says; "" where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def is_ours(holder: dict) -> bool:
    return (holder.get("host"), holder.get("pid")) == (socket.gethostname(), os.getpid())


def pid_runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not is_zombie(pid)


def is_zombie(pid: int) -> bool:
    """A process that has ended and that nobody has waited for (Linux; False elsewhere)."""
    return stat_of(pid)[:1] == ["Z"]


def start_of(pid: int) -> str:
    """When a process began, in clock ticks since this host did, which no other process of its number shares (Linux; "" elsewhere)."""
    return "".join(stat_of(pid)[19:20])


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third, the state, on; [] where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@contextlib.contextmanager
def beating(renew: Callable[[], None]) -> Iterator[None]:
    """Calls renew() every BEAT_S on a thread while the block runs; where it raises OSError the next beat tries again."""
    released = threading.Event()

    def beat():
        while not released.wait(BEAT_S):
            with contextlib.suppress(OSError):
                renew()

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        released.set()
        heart.join()
