"""Huge pages: asked for once, where the kernel leaves it to programs, and never over the user's own setting."""

import os
import subprocess
import sys

import pytest

from hhjax import process


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The arguments of every os.execv, which here does nothing, on a machine that lets programs ask for huge pages."""
    calls = []
    monkeypatch.setattr(os, "execv", lambda *args: calls.append(args))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "argv", ["hhjax", "ls", "runs"])
    monkeypatch.setattr(process, "THP", tmp_path / "enabled")
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.delenv("GLIBC_TUNABLES")
    process.THP.write_text("always [madvise] never\n")
    return calls


def test_the_process_starts_anew_once_with_its_own_arguments(started):
    process.use_huge_pages()
    assert started == [(sys.executable, [sys.executable, "-m", "hhjax.cli", "ls", "runs"])]
    assert os.environ["GLIBC_TUNABLES"] == process.TUNABLE
    process.use_huge_pages()
    assert len(started) == 1


@pytest.mark.parametrize("kernel", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_a_kernel_that_does_not_ask_is_left_alone(started, kernel):
    process.THP.unlink() if kernel is None else process.THP.write_text(kernel)
    process.use_huge_pages()
    assert not started


def test_the_user_s_tunables_are_left_alone(started, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    process.use_huge_pages()
    assert not started and os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=1"


def test_the_command_still_runs_after_starting_anew(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-m", "hhjax.cli", "ls", str(tmp_path)], env=env, capture_output=True, text=True
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"no runs under {tmp_path}\n"), done.stderr


def test_compiled_programs_are_kept_unless_the_user_says_where(monkeypatch, tmp_path):
    monkeypatch.setenv("HHJAX_CACHE", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    process.keep_compiled()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    process.keep_compiled()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"
