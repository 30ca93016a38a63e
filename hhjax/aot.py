"""Compiles a program for TPUs or GPUs that are not there: their compiler in a process of its own, stopped once it has said enough.

What is wanted stands after its optimisation passes: the program's text, the exact sizes of its buffers, and its warnings. Making
machine code from them would take up to thirty times as long and tell nothing new, so the process is ended there.
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

from hhjax.chips import Topology
from hhjax.fields import ConfigError


@dataclass(frozen=True)
class Compiler:
    """packages: any of them brings it; extra: of setup.cfg, which installs one. env: of the process that compiles. last: the file
    that it writes when the others are complete."""

    packages: tuple[str, ...]
    extra: str
    env: dict[str, str]
    last: str

    @property
    def package(self) -> str:
        """The one that is installed, "" where none is."""
        return next((name for name in self.packages if importlib.util.find_spec(name)), "")

    @property
    def version(self) -> str:
        return f"{self.package} {importlib.metadata.version(self.package.replace('_', '-'))}"


WARN = {"TF_CPP_MIN_LOG_LEVEL": "1"}  # lets through what tells of resharding
COMPILERS = {
    # Without a TPU: do not ask the cloud's metadata server, be a cluster of one, let several processes load the library.
    "tpu": Compiler(("libtpu",), "plan", {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                    "TPU_STDERR_LOG_LEVEL": "1", "TPU_MIN_LOG_LEVEL": "1"}, "*after_optimizations_after_buffer_assignment.txt"),
    "cuda": Compiler(("jax_cuda13_plugin", "jax_cuda12_plugin"), "cuda", {"CUDA_VISIBLE_DEVICES": "-1"} | WARN,
                     "*after_optimizations-memory-usage-report.txt"),
}  # fmt: skip
WHOLE = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # and not what `process.compile_quickly` asks for CPUs
# What XLA asks of a GPU: its own report of an H100 SXM (as in openxla/xla issue 25910), but for the chip's memory and bandwidth. Versions of cuDNN and
# CUDA are what a program may count on at least.
HOPPER = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: {bandwidth:.0f} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory:.0f}
shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 }} device_description_str: "NVIDIA {kind}"
"""


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


def compiler_of(topology: Topology) -> Compiler:
    return COMPILERS["tpu" if topology.chip.axes else "cuda"]


def topology_devices(topology: Topology) -> list:
    """The topology's devices as jax knows them, which can be compiled for and not run on. Only for the process that compiles."""
    from jax.experimental import topologies

    if topology.chip.axes:
        return topologies.get_topology_desc(topology_name=topology.name, platform="tpu").devices
    hosts, per = topology.hosts
    target = HOPPER.format(kind=topology.kind.upper(), bandwidth=topology.chip.bandwidth, memory=topology.chip.memory)
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x{hosts}x{per}").devices


def compile_ahead(compiler: Compiler, build: Callable, *args, limit_s: float = 1800.0) -> Compiled:
    """Calls build(*args) -> (jax.stages.Lowered for a topology's devices, picklable facts) in a fresh process, and compiles.

    build and args are pickled. After limit_s it is given up, which is told as a failure. Raises ConfigError without the compiler and with what
    build raised as ValueError; RuntimeError where the process died.
    """
    if not compiler.package:
        raise ConfigError(f"compiling ahead needs {compiler.packages[0]}, which is not installed: pip install -e '.[{compiler.extra}]'")
    server = multiprocessing.get_context("forkserver")  # forks a process that has imported jax and used no device
    server.set_forkserver_preload([__name__, build.__module__])
    began, facts, failure = time.monotonic(), {}, ""
    with tempfile.TemporaryDirectory(prefix="hhjax-plan-") as folder:
        ours, theirs = server.Pipe(duplex=False)
        process = server.Process(target=_compile, args=(theirs, folder, compiler.env, build, args), daemon=True)
        process.start()
        theirs.close()
        try:
            while not failure and not list(Path(folder).glob(compiler.last)):
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


def _compile(pipe, folder: str, env: dict[str, str], build: Callable, args) -> None:
    """The other process: tells facts, then compiles with a dump to `folder`."""
    with open(Path(folder) / "log", "wb") as log:
        os.dup2(log.fileno(), 2)
    os.environ |= env
    import jax

    jax.config.update("jax_platforms", "cpu")  # it must not look for a device of this machine
    try:
        lowered, facts = build(*args)
        pipe.send(("facts", facts))
    except ValueError as error:  # a mesh that does not fit, a batch that does not divide
        pipe.send(("error", str(error)))
        return
    try:
        lowered.compile(compiler_options=WHOLE | {"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    except jax.errors.JaxRuntimeError as error:
        pipe.send(("failure", re.split(r"\n| See https?://", str(error))[0]))
