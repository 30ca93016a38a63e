"""Run directories at an address, gs://BUCKET/PREFIX: working copies of them here, brought when a stage begins and sent at every save.

An object store can neither append nor rename, so a loop writes its run directory on this machine's disk. What counts is the bucket:
a copy is made from it once the LOCK is held, which is an object there too, and what changed is sent before a checkpoint of its step is
committed, when a stage ends for whatever reason, and DONE last. Checkpoints go there straight. Never imports jax.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from hhjax.fields import ConfigError
from hhjax.io import lock
from hhjax.io.files import is_remote

LISTED = ("config.json", "metrics.jsonl", "events.jsonl", "summary.json", "checkpoints.at", "LOCK", "DONE")  # what `ls` reads
ASK_S = 5.0  # between two questions to a bucket whether a stage is done
SETTLE_S = 2.0  # after which the last to write over an abandoned LOCK has it

_open: dict[Path, "Bucket"] = {}  # by the folder of the copies


class Bucket:
    """The run directories at `address`, and the folder `here` for copies of them: ADDRESS/<kind>/<name> and HERE/<kind>/<name>.

    address: of any file system that fsspec knows. Raises ConfigError where it knows none, or lacks the package for it.
    """

    def __init__(self, address: str, here: Path):
        import fsspec

        self.address, self.here = address.rstrip("/"), here
        options = {"auto_mkdir": True} if self.address.startswith("file://") else {"use_listings_cache": False}
        try:
            self.files, root = fsspec.url_to_fs(self.address, **options)
        except (ImportError, ValueError) as error:
            remedy = ": pip install -e '.[gs]'" if address.startswith("gs://") and isinstance(error, ImportError) else ""
            raise ConfigError(f"{address}: {error}{remedy}") from None
        self.root, self.sent, self.asked = root.rstrip("/"), {}, {}

    def at(self, path: Path) -> str:
        """Where the file system has what is at `path` here."""
        return "/".join([self.root, *path.relative_to(self.here).parts])

    def name(self, path: Path) -> str:
        """What a user knows `path` by."""
        return "/".join([self.address, *path.relative_to(self.here).parts])

    def bring(self, path: Path, names: Collection[str] = (), with_lock: bool = False) -> None:
        """Copies what lies below `path`, checkpoints aside, with its times; only files of these names, where there are any. DONE comes last:
        a copy that has it is whole."""
        found = self.files.find(self.at(path), detail=True)
        copies = {self.here / name.removeprefix(self.root).lstrip("/"): name for name in found}
        copies = {p: name for p, name in copies.items() if "checkpoints" not in p.relative_to(self.here).parts}
        copies = {p: name for p, name in copies.items() if p.name in names or not names and (with_lock or p.name != "LOCK")}
        contents = self.files.cat(list(copies.values())) if copies else {}
        for copy in sorted(copies, key=lambda p: p.name == "DONE"):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(contents[copies[copy]])
            os.utime(copy, (modified(self.files, copies[copy], found[copies[copy]]),) * 2)
            self.sent[copy] = stamp(copy)

    def send(self, path: Path) -> None:
        """Copies what has changed in the folder `path`, or the file, to the bucket; DONE after all else."""
        files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file() and p.name != "LOCK" and p.name[0] != "."]
        changed = {p: now for p in files if (now := stamp(p)) != self.sent.get(p)}
        for last in (False, True):
            if part := [p for p in changed if (p.name == "DONE") == last]:
                self.files.pipe({self.at(p): p.read_bytes() for p in part})
        self.sent |= changed

    def is_done(self, folder: Path, at_once: bool = False) -> bool:
        """Whether there is DONE; the folder is then brought here, if it was not. A bucket that said no is asked again after ASK_S,
        or at once."""
        due = at_once or time.monotonic() - self.asked.get(folder, -ASK_S) >= ASK_S
        if due and not (folder / "DONE").is_file():
            self.asked[folder] = time.monotonic()
            if self.files.exists(self.at(folder / "DONE")):
                self.bring(folder)
        return (folder / "DONE").is_file()

    @contextlib.contextmanager
    def hold_lock(self, folder: Path) -> Iterator[None]:
        """Holds the object LOCK of a run directory, with a heartbeat, while the block runs. Raises lock.Held."""
        mine, at = lock.claim(), self.at(folder / "LOCK")
        if not self.take_lock(folder, mine):
            raise lock.Held(f"{self.name(folder)} is held by {lock.read_lock(folder / 'LOCK')}")

        def renew():
            with contextlib.suppress(Exception):  # a network that is away for a while: the next beat may reach it
                if self.read_lock(folder) == mine:
                    self.files.pipe_file(at, mine.encode())

        with lock.beating(renew):
            try:
                yield
            finally:
                if self.read_lock(folder) == mine:
                    self.files.rm_file(at)

    def take_lock(self, folder: Path, mine: str) -> bool:
        """Whether LOCK is now `mine`: there was none, or its holder is gone. A copy of it here says whose it is.

        An object is made by one of several that try. There is no such thing for writing over one: of several that find an abandoned LOCK
        the last to write has it, by SETTLE_S after its holder was found to be gone.
        """
        at, copy = self.at(folder / "LOCK"), folder / "LOCK"
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.files.pipe_file(at, mine.encode(), mode="create")
        except FileExistsError:
            if text := self.read_lock(folder):
                copy.write_text(text)
                with contextlib.suppress(FileNotFoundError):
                    os.utime(copy, (modified(self.files, at, {}),) * 2)
                if lock.is_alive(copy):
                    return False
            self.files.pipe_file(at, mine.encode())
            time.sleep(SETTLE_S)
        held = self.read_lock(folder)
        copy.write_text(held)
        return held == mine

    def read_lock(self, folder: Path) -> str:
        """The text of LOCK in the bucket; "" where there is none."""
        try:
            return self.files.cat_file(self.at(folder / "LOCK")).decode()
        except FileNotFoundError:
            return ""

    def require_lock(self, folder: Path) -> None:
        """Raises ConfigError where another process has taken the LOCK over, after the network had been away for longer than lock.STALE_S."""
        holder = json.loads(self.read_lock(folder) or "{}")
        if not lock.is_ours(holder):
            raise ConfigError(f"{self.name(folder)} was taken over by {holder or 'nobody'}; nothing more is sent there")


# Whatever --out is ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def working_copy(out: str) -> Iterator[Path]:
    """The folder here in which run directories of `out` are worked at: `out` itself, or, where that is an address, a temporary one
    that copies come to. Raises ConfigError on an address that cannot be had."""
    if not is_remote(out):
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="hhjax-", ignore_cleanup_errors=True) as folder:
        _open[Path(folder)] = Bucket(out, Path(folder))
        try:
            yield Path(folder)
        finally:
            del _open[Path(folder)]


@contextlib.contextmanager
def reading_copy(path: str, names: Collection[str] = ()) -> Iterator[Path]:
    """A folder here that holds what is at `path` to be looked at: itself, or a temporary copy of an address, checkpoints aside."""
    if not is_remote(path):
        yield Path(path)
        return
    with working_copy(path) as here:
        bucket_of(here).bring(here, names, with_lock=True)
        yield here


def bucket_of(path: Path) -> Bucket | None:
    """The bucket that a run directory, a file of one, or the folder of all is a copy of; None where it is no copy."""
    return next((bucket for here, bucket in _open.items() if path.is_relative_to(here)), None)


def address_of(path: Path) -> str:
    """What a user knows `path` by: its address, where it is a copy."""
    bucket = bucket_of(path)
    return bucket.name(path) if bucket else str(path)


def folder_of(address: str) -> Path:
    """The inverse of `address_of`; a copy is brought here where there is none."""
    for here, bucket in _open.items():
        if address.startswith(f"{bucket.address}/"):
            folder = here / address.removeprefix(f"{bucket.address}/")
            bucket.is_done(folder)
            return folder
    return Path(address)


def is_done(folder: Path, at_once: bool = False) -> bool:
    """Whether a stage is done; where it is done in a bucket, its folder is here afterwards. at_once: also if it was asked just now."""
    bucket = bucket_of(folder)
    return bucket.is_done(folder, at_once) if bucket else (folder / "DONE").is_file()


def bring(path: Path, names: Collection[str] = ()) -> None:
    """Makes the copy of a run directory, of a file of it or of all (of those files) what the bucket has; one that is done and here stays."""
    if (bucket := bucket_of(path)) and not (path / "DONE").is_file():
        bucket.bring(path, names)


def send(path: Path) -> None:
    """Sends what has changed in a run directory whose LOCK this process holds. Raises ConfigError where another has taken it over."""
    if bucket := bucket_of(path):
        bucket.require_lock(path)
        bucket.send(path)


def send_file(path: Path) -> None:
    """Sends one file, that needs no LOCK."""
    if bucket := bucket_of(path):
        bucket.send(path)


def hold_lock(folder: Path):
    """Holds the LOCK of a run directory, where others look for it, while the block runs. Raises lock.Held."""
    bucket = bucket_of(folder)
    return bucket.hold_lock(folder) if bucket else lock.hold_lock(folder)


def fetch(address: str, to: Path) -> int:
    """Copies an address, checkpoints aside, into a folder that stays. Returns how many files it then holds."""
    bucket = Bucket(address, to)
    bucket.bring(to)
    return len(bucket.sent)


# Helpers --------------------------------------------------------------------------------------------------------------


def stamp(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def modified(files, name: str, info: dict) -> float:
    """When an object was last written, in seconds; its listing says so on most file systems."""
    when = info.get("mtime") or files.modified(name)
    return when if isinstance(when, int | float) else when.timestamp()
