"""`hhjax sweep FILE`: the stages of all runs, each once, when what they need is done: as processes here, on SLURM or on GKE."""

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from hhjax import launch
from hhjax.experiment import Run
from hhjax.fields import ConfigError, names_in
from hhjax.flags import Command, parse
from hhjax.io import bucket
from hhjax.io.rundir import why_not_done
from hhjax.jobs import Gke, Job, Local, Slurm
from hhjax.jobset import Pod, slices
from hhjax.placing import Placed, place
from hhjax.sharding import mesh_sizes
from hhjax.stages import Stage

POLL_S = 0.2
BACKENDS = ("local", "slurm", "gke")
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "slurm_sweep.sbatch"


@dataclass(frozen=True)
class SweepFlags(Pod):
    """Train the missing stages of all runs."""

    status: bool = False
    """Show every stage's state, and start nothing."""
    backend: str = "local"
    """Where stages run: local, --jobs processes at a time; slurm, a batch job each; gke, a JobSet each."""
    sbatch: str = ""
    """slurm: options for sbatch, such as --sbatch="--partition=gpu --nodes=2"."""
    script: Path = SCRIPT
    """slurm: the batch script."""


class Stopped(Exception):
    """SIGTERM reached the sweep."""


def run(argv: Sequence[str]) -> int:
    """Trains every missing stage. A failing stage stops only the stages that need it, directly or not.

    Each job is `hhjax run FILE --only RUN --stage STAGE`. Local: returns 0, or the exit code of the first stage that failed;
    SIGTERM is passed on, and gives 75. SLURM: returns once all is submitted. GKE: as local, but the JobSets go on.
    """
    command, options = parse(argv, "hhjax sweep", SweepFlags)
    flags = passed_on(argv)
    if command.launch.print_config:
        return launch.run([*flags, "--only", command.launch.only])
    with launch.at_hand(command) as command:
        return run_here(command, options, flags)


def run_here(command: Command, options: SweepFlags, flags: Sequence[str]) -> int:
    placed = [(r, place(r, Path(command.launch.out), command.launch.data_dir)) for r in command.runs]
    backend, jobs = make_backend(options, flags), list_jobs(placed, command.launch.stage)
    if options.backend == "slurm" and bucket.bucket_of(Path(command.launch.out)):
        raise ConfigError("--backend slurm keeps its job numbers and logs in the run directories; give --out a folder that the nodes share "
                          "(checkpoints may be in a bucket: --checkpoints)")  # fmt: skip
    if not options.status:
        require_fit(jobs, {p.dir: p.stage for _, stages in placed for p in stages}, backend)
    if options.status:
        bucket.bring(Path(command.launch.out), bucket.LISTED)
        print("\n".join(status_lines(placed, {job.folder: backend.whereabouts(job) for job in jobs})))
        return launch.DONE
    if command.launch.dry_run:
        names = {job.folder: job.name for job in jobs}
        print("\n".join(backend.shown(job, sorted(names[f] for f in job.needs if f in names)) for job in jobs))
        return launch.DONE
    launch.write_index(command, placed)
    if options.backend == "slurm":
        return backend.submit(jobs)
    previous = signal.signal(signal.SIGTERM, raise_stopped)
    try:
        most = len(jobs) if options.backend == "gke" else command.launch.jobs  # Kueue says how many at a time
        return schedule(jobs, most, backend.start)
    finally:
        signal.signal(signal.SIGTERM, previous)


def make_backend(options: SweepFlags, flags: Sequence[str]):
    """Raises ConfigError on an unknown backend."""
    if options.backend not in BACKENDS:
        raise ConfigError(f"--backend {options.backend!r}; choose one of {', '.join(BACKENDS)}")
    if options.backend == "slurm":
        return Slurm(flags, options.sbatch, options.script)
    return Gke(flags, options) if options.backend == "gke" else Local(flags)


def require_fit(jobs: Sequence[Job], stages: Mapping[Path, Stage], backend) -> None:
    """Raises ConfigError on a mesh that does not fill the devices of its job, or a batch that does not divide over it: what the job
    would end with, after it has waited for its slice; and on a slice for a stage that there is not."""
    if isinstance(backend, Gke):
        for name in slices(backend.pod.topology)[1]:
            names_in(name, [known for stage in stages.values() for known in (stage.name, stage.kind)])
    for job in jobs:
        if found := backend.devices(job):
            check_fit(stages[job.folder], *found)


def check_fit(stage: Stage, devices: int, where: str) -> None:
    """`require_fit` of one stage. where: what the devices are of."""
    for field in ("mesh", "rollout_mesh"):
        if not (cfg := getattr(stage, field, None)):
            continue
        flag, here = f"--{stage.name}.{field.replace('_', '-')}", f"stage {stage.name} on {where} ({devices} devices)"
        try:
            data, fsdp, tensor = mesh_sizes(cfg, devices)
        except ValueError as error:
            raise ConfigError(f"{here}: {error}: {flag}.data, .fsdp, .tensor") from None
        # A rollout is sampled whole; Evaluate fills its batches up.
        parts = getattr(stage, "minibatches", 1) * getattr(stage, "micro_batches", 1) if field == "mesh" else 1
        ways = data * fsdp * parts
        if stage.kind != "evaluate" and stage.batch_size % ways:
            cut = f" in {parts} parts" if parts > 1 else ""
            raise ConfigError(f"{here}: a batch of {stage.batch_size}{cut} does not divide over the mesh data {data} x fsdp {fsdp} x tensor "
                              f"{tensor} = {devices}; give --{stage.name}.batch-size {-(-stage.batch_size // ways) * ways}, a larger "
                              f"{flag}.tensor, or a smaller slice")  # fmt: skip


def list_jobs(placed: Sequence[tuple[Run, Sequence[Placed]]], stage: str | None = None) -> list[Job]:
    """One job per folder that is not done, parents before children; of `stage` and what it needs, where one is named.

    Raises ConfigError on a stage that no run has.
    """
    jobs = {}
    for run, stages in placed:
        folders = {p.stage.name: p.dir for p in stages}
        for p in stages:
            if not launch.is_done(p.dir):
                jobs.setdefault(p.dir, Job(p.dir, run.full_name, p.stage.name, frozenset(folders[n] for n in p.after)))
    if stage is None:
        return list(jobs.values())
    wanted = {p.dir for _, stages in placed for p in stages if p.stage.name == stage}
    if not wanted:
        known = dict.fromkeys(p.stage.name for _, stages in placed for p in stages)
        raise ConfigError(f"--stage {stage!r} is no stage of these runs; they have {', '.join(known)}")
    for folder in reversed(jobs):  # children before parents
        wanted |= jobs[folder].needs if folder in wanted else set()
    return [job for folder, job in jobs.items() if folder in wanted]


def status_lines(placed: Sequence[tuple[Run, Sequence[Placed]]], whereabouts: dict[Path, str]):
    """A line for every folder, with the runs that share it; then how many there are of each state."""
    runs, names = {}, {}
    for run, stages in placed:
        for p in stages:
            runs.setdefault(p.dir, []).append(run.full_name)
            names[p.dir] = p.stage.name
    states = {folder: why_not_done(folder) for folder in runs}
    for folder, where in whereabouts.items():  # a cluster has it, and it has not begun or is to go on
        states[folder] = ("queued", where) if where and states[folder][0] != "running" else states[folder]
    for folder, shared in runs.items():
        state, why = states[folder]
        several = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        where = f"{folder.parent.name}/{folder.name}"
        yield f"{state:<10}{names[folder]:<16} {where:<40} {shared[0]}{several}{f': {why}' if why else ''}"
    found = [state for state, _ in states.values()]
    yield ", ".join(f"{found.count(state)} {state}" for state in dict.fromkeys(found))


def schedule(jobs: list[Job], most: int, start) -> int:
    """Runs the jobs, at most so many at a time. start(job) -> Popen. Returns the first failure's exit code, or 0."""
    waiting, running, lost, first_failure = list(jobs), {}, set(), 0
    try:
        while waiting or running:
            for job in [j for j in waiting if j.needs & lost]:
                waiting.remove(job)
                lost.add(job.folder)
                print(f"skipped {job.stage} of {job.run}: a stage that it needs has failed", flush=True)
            not_done = {j.folder for j in (*waiting, *running)} | lost
            ready = [j for j in waiting if not j.needs & not_done][: most - len(running)]
            for job in ready:
                waiting.remove(job)
                running[job] = start(job)
                print(f"started {job.stage} of {job.run} ({bucket.address_of(job.folder)})", flush=True)
            for job in [j for j, process in running.items() if process.poll() is not None]:
                code, log = running.pop(job).returncode, job.folder / "console.log"
                print(f"{'done' if code == 0 else f'FAILED ({code})'}: {job.stage} of {job.run}", flush=True)
                if log.exists():
                    bucket.send_file(log)
                if code:
                    if log.exists():
                        print(f"  see {bucket.address_of(log)}", flush=True)
                    lost.add(job.folder)
                    first_failure = first_failure or code
            time.sleep(POLL_S)
    except (Stopped, KeyboardInterrupt):
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        return launch.PREEMPTED
    return first_failure


def passed_on(argv: Sequence[str]) -> list[str]:
    """FILE and the flags that `hhjax run` takes for one stage."""
    names = ["--" + f.name.replace("_", "-") for f in fields(SweepFlags) if f.name != "status"]
    return without(argv, (*names, "--jobs", "--only", "--stage"), ("--share", "--status", "--dry-run"))


def without(args: Sequence[str], names: Sequence[str], switches: Sequence[str] = ()) -> list[str]:
    """The arguments without these flags and their values, and without these switches."""
    kept, skip = [], False
    for a in args:
        name, equals, _ = a.partition("=")
        name = name.replace("_", "-")  # tyro takes both
        if not skip and name not in (*names, *switches):
            kept.append(a)
        skip = not skip and name in names and not equals
    return kept


def raise_stopped(signum, frame):
    raise Stopped
