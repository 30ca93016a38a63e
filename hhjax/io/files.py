"""Files that are either there in full or not at all, and where checkpoints are."""

import os
from pathlib import Path

POINTER = "checkpoints.at"  # in a run directory whose checkpoints are elsewhere


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file by one rename, on disk before it has its name: a crash leaves the old file or the new one. An object of a
    bucket (a path of epath with ://) appears whole anyway."""
    if is_remote(path):
        path.write_text(text)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def is_remote(path) -> bool:
    return "://" in os.fspath(path)


def checkpoints_dir(run_dir: Path):
    """RUN/checkpoints, or where RUN/checkpoints.at points: a folder, or gs://BUCKET/PREFIX. A path of etils.epath."""
    from etils import epath

    pointer = Path(run_dir) / POINTER
    if pointer.is_file():
        return epath.Path(pointer.read_text().strip())
    return epath.Path(Path(run_dir).absolute()) / "checkpoints"
