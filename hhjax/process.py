"""What must be settled before jax is imported: how programs are compiled and where they are kept, how Python and the C library manage
memory, what a process says when it is ended."""

import faulthandler
import gc
import glob
import os
import platform
import sys
from pathlib import Path

HUGE_PAGES = "glibc.malloc.hugetlb=1"  # where the kernel leaves them to programs
HELD = f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**62}:glibc.malloc.arena_max=1"  # one heap, which gives nothing back
GPU_MEMORY_SHARE = 0.9  # jax's default, 0.75, leaves 20 GB of an H100 unused
QUICK = {"xla_backend_optimization_level": "1", "xla_llvm_disable_expensive_passes": "true"}
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


def accelerated() -> bool:
    """Whether this machine has a GPU or TPU, as far as its devices' files tell."""
    return any(map(glob.glob, ACCELERATORS))


def cache_dir() -> Path:
    """$HHJAX_CACHE, or ~/.cache/hhjax: downloads and compiled programs."""
    return Path(os.environ.get("HHJAX_CACHE", "~/.cache/hhjax")).expanduser()


def keep_compiled() -> None:
    """Makes jax keep what it compiles, for this and later processes; jax's own variables, where set, win."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def compile_quickly() -> None:
    """Makes XLA's compiler for CPUs leave out LLVM's dear passes, a tenth to a third of what it takes. Steps take as long without them (to 1 %), since their products
    are a library's. A flag that $XLA_FLAGS names already is left alone, and so is a file of flags. Not beside an accelerator, whose programs
    these flags would touch too."""
    given = os.environ.get("XLA_FLAGS", "").strip()
    if not accelerated() and (not given or given.startswith("-")):
        os.environ["XLA_FLAGS"] = " ".join([given, *(f"--{name}={value}" for name, value in QUICK.items() if name not in given)]).strip()


def environment_elsewhere() -> dict[str, str]:
    """This process's environment without what `compile_quickly` and `hold_memory` add, which other machines, with accelerators, would inherit."""
    env = dict(os.environ)
    ours = {f"--{name}={value}" for name, value in QUICK.items()}
    flags = " ".join(flag for flag in env.pop("XLA_FLAGS", "").split() if flag not in ours)
    tunables = env.pop("GLIBC_TUNABLES", "")
    added = {"XLA_FLAGS": flags, "GLIBC_TUNABLES": "" if tunables in (HUGE_PAGES, f"{HUGE_PAGES}:{HELD}") else tunables}
    return env | {name: value for name, value in added.items() if value}


def take_memory() -> None:
    """Makes XLA take nine tenths of a GPU's memory when it starts; jax's own variables, where set, win."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name, which jax refuses beside the newer
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(GPU_MEMORY_SHARE))


def collect_rarely() -> None:
    """Makes Python look for unreachable cycles once in 10,000 new objects instead of 700, and through all that live as much
    more rarely: tracing makes objects by the hundred thousand, and each full walk through jax's modules takes 0.1 s."""
    gc.set_threshold(10_000, 10, 10)


def tell_stacks() -> None:
    """Makes a process that is aborted say where each of its threads was, as the watchdog does: of two processes that wait for one
    another the first watchdog to fire ends the other too, and that may be the one that was stuck."""
    faulthandler.enable()


def hold_memory() -> None:
    """Starts this process anew, once, with glibc told to ask for huge pages and to keep what is freed.

    XLA on CPU takes and returns gigabytes of temporaries every step, and faults them in 4 KiB at a time: half of a small model's
    step in a virtual machine. With huge pages what is left of that, their zeros, is still a tenth. Only an environment variable read at
    the start of a process changes either. The process stays as large as it ever was: GLIBC_TUNABLES, once set to anything, even to
    nothing, is left alone. Beside an accelerator, whose hosts have many threads and large copies, memory is given back.
    """
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES if accelerated() else f"{HUGE_PAGES}:{HELD}"
        os.execv(sys.executable, [sys.executable, "-m", "hhjax.cli", *sys.argv[1:]])
