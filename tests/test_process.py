"""Memory that is held, asked for once and never over the user's own setting; and compiled programs that are kept."""

import os
import platform
import subprocess
import sys

import pytest

from hhjax import process
from hhjax.jobs import said


@pytest.fixture
def started(monkeypatch):
    """The arguments of every os.execv, which here does nothing."""
    calls = []
    monkeypatch.setattr(os, "execv", lambda *args: calls.append(args))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(process, "ACCELERATORS", ())
    monkeypatch.setattr(sys, "argv", ["hhjax", "ls", "runs"])
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.delenv("GLIBC_TUNABLES")
    return calls


def test_the_process_starts_anew_once_with_its_own_arguments(started):
    process.hold_memory()
    assert started == [(sys.executable, [sys.executable, "-m", "hhjax.cli", "ls", "runs"])]
    assert os.environ["GLIBC_TUNABLES"] == f"{process.HUGE_PAGES}:{process.HELD}"
    process.hold_memory()
    assert len(started) == 1


def test_beside_an_accelerator_memory_is_given_back(started, monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(process, "ACCELERATORS", (str(tmp_path / "nvidia[0-9]*"),))
    process.hold_memory()
    assert len(started) == 1 and os.environ["GLIBC_TUNABLES"] == process.HUGE_PAGES


def test_the_user_s_tunables_are_left_alone(started, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    process.hold_memory()
    assert not started and os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=1"


def test_the_command_still_runs_after_starting_anew(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-m", "hhjax.cli", "ls", str(tmp_path)], env=env, capture_output=True, text=True
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"no runs under {tmp_path}\n"), done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="these are settings of glibc's own allocator")
def test_what_is_freed_is_held():
    """A process in whose thread 256 MiB were freed is still as large, and larger than one of glibc's own ways."""
    code = ("import numpy as np, threading; t = threading.Thread(target=lambda: [np.ones(2**25, np.uint8) for _ in range(8)]); t.start(); t.join(); "
            "print(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')).split()[1])")  # fmt: skip
    sizes = [int(subprocess.run([sys.executable, "-c", code], env=os.environ | {"GLIBC_TUNABLES": tunables}, capture_output=True, text=True,
                                check=True).stdout) for tunables in ("", process.HELD)]  # fmt: skip
    assert sizes[1] - sizes[0] > 200 * 2**10


def test_compiled_programs_are_kept_unless_the_user_says_where(monkeypatch, tmp_path):
    monkeypatch.setenv("HHJAX_CACHE", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    process.keep_compiled()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    process.keep_compiled()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"


def test_most_of_a_gpu_is_taken_unless_the_user_says_how_much(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    process.take_memory()
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.9"
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.4")
    process.take_memory()
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.4"
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.3")  # jax refuses both together
    process.take_memory()
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ


def test_llvm_s_dear_passes_are_left_out_but_for_what_the_user_says_and_beside_accelerators(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "ACCELERATORS", ())
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    process.compile_quickly()
    assert os.environ["XLA_FLAGS"] == "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
    process.compile_quickly()  # a process that has started anew
    assert os.environ["XLA_FLAGS"].count("level") == 1
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    process.compile_quickly()
    assert os.environ["XLA_FLAGS"] == "--xla_backend_optimization_level=3 --xla_llvm_disable_expensive_passes=true"
    monkeypatch.setenv("XLA_FLAGS", "a/file of flags")  # to which nothing can be appended
    process.compile_quickly()
    assert os.environ["XLA_FLAGS"] == "a/file of flags"
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here")
    process.compile_quickly()
    monkeypatch.setenv("GLIBC_TUNABLES", f"{process.HUGE_PAGES}:{process.HELD}")
    there = process.environment_elsewhere()  # of a job with GPUs, say, that is submitted from here
    assert there["XLA_FLAGS"] == "--xla_dump_to=here" and "GLIBC_TUNABLES" not in there and there["PATH"] == os.environ["PATH"]
    assert "expensive_passes" not in said(["env"]) and "--xla_dump_to=here" in said(["env"])  # as sbatch is called
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(process, "ACCELERATORS", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here")
    process.compile_quickly()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=here"
