"""What must be settled before jax is imported: where compiled programs are kept, how Python and the C library manage memory, what
a process says when it is ended."""

import faulthandler
import gc
import os
import sys
from pathlib import Path

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb=1"


def cache_dir() -> Path:
    """$HHJAX_CACHE, or ~/.cache/hhjax: downloads and compiled programs."""
    return Path(os.environ.get("HHJAX_CACHE", "~/.cache/hhjax")).expanduser()


def keep_compiled() -> None:
    """Makes jax keep what it compiles, for this and later processes; jax's own variables, where set, win."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def collect_rarely() -> None:
    """Makes Python look for unreachable cycles once in 10,000 new objects instead of 700, and through all that live as much
    more rarely: tracing makes objects by the hundred thousand, and each full walk through jax's modules takes 0.1 s."""
    gc.set_threshold(10_000, 10, 10)


def tell_stacks() -> None:
    """Makes a process that is aborted say where each of its threads was, as the watchdog does: of two processes that wait for one
    another the first watchdog to fire ends the other too, and that may be the one that was stuck."""
    faulthandler.enable()


def use_huge_pages() -> None:
    """Starts this process anew, once, with glibc asking for huge pages, where the kernel leaves that to programs.

    XLA on CPU takes and returns gigabytes of temporaries every step, and faults them in 4 KiB at a time:
    half of a small model's step in a virtual machine. Only an environment variable read at the start of
    a process changes that. GLIBC_TUNABLES, once set to anything, is left alone.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    if THP.is_file() and "[madvise]" in THP.read_text():
        os.environ["GLIBC_TUNABLES"] = TUNABLE
        os.execv(sys.executable, [sys.executable, "-m", "hhjax.cli", *sys.argv[1:]])
