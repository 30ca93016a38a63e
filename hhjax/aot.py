"""Compiles a program for TPUs that are not there: libtpu's compiler in a process of its own, stopped once it has said enough.

What is wanted stands after its optimisation passes: the program's text, the exact sizes of its buffers, and its warnings. Making
machine code from them would take ten to thirty times as long and tell nothing new, so the process is ended there.
"""

import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hhjax.fields import ConfigError

# Without a TPU: do not ask the cloud's metadata server, be a cluster of one, let several processes load the library.
TPU_ENV = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
           "TPU_STDERR_LOG_LEVEL": "1", "TPU_MIN_LOG_LEVEL": "1"}  # warnings, which tell of resharding  # fmt: skip
LAST_DUMP = "*after_optimizations_after_buffer_assignment.txt"


@dataclass(frozen=True)
class Compiled:
    """A program as it would run on one device.

    facts: what `build` said of it. text: HLO after optimisation, "" where it does not fit. arguments, temporaries: bytes of
    HBM. failure: the compiler's reason where it refused, mostly memory. warnings: its lines about resharding by
    "involuntary full rematerialization". seconds: wall time of tracing, lowering and optimising.
    """

    facts: dict
    text: str
    arguments: int
    temporaries: int
    failure: str
    warnings: tuple[str, ...]
    seconds: float


def require_libtpu() -> None:
    """Raises ConfigError where the compiler is not installed."""
    if not importlib.util.find_spec("libtpu"):
        raise ConfigError("compiling for a TPU needs libtpu, which is not installed: pip install -e '.[plan]'")


def libtpu_version() -> str:
    return importlib.metadata.version("libtpu")


def compile_for_tpu(build: Callable, *args, limit_s: float = 1800.0) -> Compiled:
    """Calls build(*args) -> (jax.stages.Lowered for a TPU topology's devices, picklable facts) in a fresh process, and compiles.

    build and args are pickled. After limit_s it is given up, which is told as a failure. Raises ConfigError without libtpu and with what
    build raised as ValueError; RuntimeError where the process died.
    """
    require_libtpu()
    server = multiprocessing.get_context("forkserver")  # forks a process that has imported jax and used no device
    server.set_forkserver_preload([__name__, build.__module__])
    began, facts, failure = time.monotonic(), {}, ""
    with tempfile.TemporaryDirectory(prefix="hhjax-plan-") as folder:
        ours, theirs = server.Pipe(duplex=False)
        process = server.Process(target=_compile, args=(theirs, folder, build, args), daemon=True)
        process.start()
        theirs.close()
        try:
            while not failure and not list(Path(folder).glob(LAST_DUMP)):
                if facts and time.monotonic() - began > limit_s:
                    failure = f"given up: the compiler had not finished after {limit_s:.0f} s"
                    break
                try:
                    kind, said = ours.recv() if ours.poll(0.1) else ("", None)
                except EOFError:
                    process.join()
                    raise RuntimeError(f"the compiling process died with {process.exitcode}: {_tail(folder)}") from None
                if kind == "error":
                    raise ConfigError(said)
                facts = said if kind == "facts" else facts
                failure = said if kind == "failure" else ""
        finally:
            process.kill()
            process.join()
            ours.close()
        seconds, log = time.monotonic() - began, (Path(folder) / "log").read_text(errors="replace")
        warnings = tuple(line for line in log.splitlines() if "nvoluntary full rematerialization" in line)
        if failure:
            return Compiled(facts, "", 0, 0, failure, warnings, seconds)
        buffers = next(Path(folder).glob("*after_optimizations-buffer-assignment.txt")).read_text()
        text = next(Path(folder).glob("*after_optimizations.txt")).read_text()
    return Compiled(facts, text, *buffer_bytes(buffers), "", warnings, seconds)


def buffer_bytes(text: str) -> tuple[int, int]:
    """(arguments, temporaries) in HBM from XLA's dump of its buffer assignment; the two of `Compiled.memory_analysis()`.

    Memory of another colour is not HBM; what is local to a thread lies inside the temporaries.
    """
    arguments = temporaries = 0
    for size, rest in re.findall(r"^allocation \d+: size (\d+), (.*)$", text, re.MULTILINE):
        if "thread-local" in rest or "color" in rest:
            continue
        if re.search(r"\bparameter \d+", rest):
            arguments += int(size)
        elif "preallocated-temp" in rest:
            temporaries += int(size)
    return arguments, temporaries


def _tail(folder: str) -> str:
    log = Path(folder) / "log"
    return log.read_text(errors="replace")[-500:].strip() if log.is_file() else ""


def _compile(pipe, folder: str, build: Callable, args) -> None:
    """The other process: tells facts, then compiles with a dump to `folder`."""
    with open(Path(folder) / "log", "wb") as log:
        os.dup2(log.fileno(), 2)
    os.environ |= TPU_ENV
    import jax

    jax.config.update("jax_platforms", "cpu")  # libtpu must not look for a TPU of this machine
    try:
        lowered, facts = build(*args)
        pipe.send(("facts", facts))
    except ValueError as error:  # a mesh that does not fit, a batch that does not divide
        pipe.send(("error", str(error)))
        return
    try:
        lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    except jax.errors.JaxRuntimeError as error:
        pipe.send(("failure", re.split(r"\n| See https?://", str(error))[0]))
