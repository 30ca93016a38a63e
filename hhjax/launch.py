"""From an experiment file to its trained stages: joins the cluster, walks the stages in order, picks each one's loop.

    hhjax run FILE [--only GLOB] [--out DIR] [--seed N] [--STAGE.path VALUE ...]
"""

import contextlib
import dataclasses
import importlib
import json
import os
import shlex
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from hhjax.cluster import agreed, first_process, is_one_of_many, join_cluster
from hhjax.experiment import Run
from hhjax.fields import ConfigError
from hhjax.flags import Command, modules_beside, parse
from hhjax.io import bucket
from hhjax.io.bucket import address_of, is_done
from hhjax.io.files import POINTER, is_remote, write_atomically
from hhjax.io.lock import Held, read_lock
from hhjax.io.metrics import read_events, write_event
from hhjax.io.rundir import other_source, write_start
from hhjax.placing import Placed, place, read_config
from hhjax.stages import Diverged, Preempted, StageContext, split_step

# Exit codes. A hang that the watchdog ends and a crash are 1, a lost peer is 134: both are worth a restart.
DONE, CRASHED, BAD_CONFIG, NOT_FINITE, PREEMPTED = 0, 1, 2, 65, 75

WAIT_S = 0.5  # between looks at what others are at

LOOPS = {  # a stage's kind -> module:function, called as function(stage, context)
    "clinic": "hhjax.loops.clinic:run",
    "questions": "hhjax.loops.probes:run_questions",
    "tokenizer": "hhjax.loops.supervised:run_tokenizer",
    "lm": "hhjax.loops.supervised:run",
    "pm": "hhjax.loops.supervised:run",
    "ppo": "hhjax.loops.rlhf:run",
    "best_of_n": "hhjax.loops.sampling:run_best_of_n",
    "comparisons": "hhjax.loops.sampling:run_comparisons",
    "elo": "hhjax.loops.elo:run",
    "evaluate": "hhjax.loops.evaluate:run",
    "exam": "hhjax.loops.probes:run_exam",
    "detect": "hhjax.loops.probes:run_detect",
    "report": "hhjax.loops.report:run",
}


def run(argv: Sequence[str]) -> int:
    """`hhjax run FILE ...`: trains what is missing, in order. Returns the exit code."""
    return run_command(parse(argv, "hhjax run")[0])


def run_command(command: Command) -> int:
    """The same, of a parsed command line."""
    with at_hand(command) as command:
        return run_here(command)


@contextlib.contextmanager
def at_hand(command: Command) -> Iterator[Command]:
    """The command with a folder of this machine as `out`: where that is an address, one for working copies."""
    with bucket.working_copy(command.launch.out) as out:
        yield command._replace(launch=dataclasses.replace(command.launch, out=str(out)))


def run_here(command: Command) -> int:
    launch = command.launch
    if launch.print_config:
        print(json.dumps({r.full_name: shown_config(r, launch) for r in command.runs}, indent=1))
        return DONE
    if launch.dry_run:
        from hhjax import plan

        print("\n\n".join(plan.describe(r, Path(launch.out), launch.data_dir, launch.stage) for r in command.runs))
        return DONE
    if launch.data_dir:  # an experiment's own functions, such as a watch, look for data as the loops do
        os.environ["HHJAX_DATA"] = str(launch.data_dir)
    should_stop = join_cluster(launch.heartbeat_timeout_s)
    placed = [(r, place(r, Path(launch.out), launch.data_dir)) for r in command.runs]
    for each, stages in placed:
        chosen_stages(each, stages, launch.stage)
    if first_process():
        write_index(command, placed)
        if not launch.share:  # the parent of processes that share has said it
            tell_of_other_source(p.dir for each, stages in placed for p in chosen_stages(each, stages, launch.stage))
    if launch.share:
        share_stages(command, placed, should_stop)
        return DONE
    for each, stages in placed:
        for p in chosen_stages(each, stages, launch.stage):
            if should_stop():
                raise Preempted("told to stop between two stages")
            run_stage(command, each, p, should_stop)
    return DONE


def exit_code(main: Callable[[], int]) -> int:
    """Calls `main` and turns what it raises into an exit code, with the message on stderr; a bug is raised on.

    One of several processes that fails ends at once, for its peers wait for it in a collective: they
    then lose its heartbeat and end too.
    """
    try:
        return main()
    except Preempted as stop:  # on every process at the same step, as is the next
        print(stop, file=sys.stderr)
        return PREEMPTED
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_FINITE
    except Exception as error:
        ours = raised_by_us(error)
        if not ours and not is_one_of_many():
            raise
        print(f"error: {error}" if ours else traceback.format_exc(), file=sys.stderr, flush=True)
        if is_one_of_many():
            os._exit(BAD_CONFIG if ours else CRASHED)
        return BAD_CONFIG


def raised_by_us(error: BaseException) -> bool:
    """Whether the error is a check of this package, whose message says it all, and not a bug or a failure below."""
    if not isinstance(error, ValueError | FileNotFoundError):
        return False
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    return isinstance(error, ConfigError) or Path(__file__).parent in Path(frame.tb_frame.f_code.co_filename).parents


# Stages ---------------------------------------------------------------------------------------------------------------


def tell_of_other_source(folders: Iterable[Path]) -> None:
    """Says how many finished stages were last started with other source than this: the library's own code is no part of a stage's identity."""
    for other, count in Counter(other_source(folder) for folder in set(folders) if is_done(folder)).items():
        if other:
            tell(f"finished stages last started at commit {other}: {count}, which stay as they are; for new ones choose another --out")


def run_stage(command: Command, run: Run, placed: Placed, should_stop: Callable[[], bool], wait: bool = True) -> None:
    """Brings one stage to DONE, unless it is; waits for another process that is at it, or raises Held.

    Raises ConfigError when something it needs is not done, and whatever its loop raises.
    """
    stage, folder = placed.stage, placed.dir
    if agreed(is_done(folder)):
        tell(f"{run.full_name}: {stage.name} is done ({address_of(folder)})")
        return
    for ref, parent in placed.parents.items():
        is_stage = split_step(ref)[0] in placed.after or "id" in read_config(parent)
        # Others may see process 0's files late, so each asks, whatever it sees: a collective is for all.
        if not agreed(is_done(Path(parent)) or not is_stage):
            raise ConfigError(f"{stage.name} needs {ref!r}, which is not done ({address_of(Path(parent))}); run it first")
    writes = first_process() or bucket.bucket_of(folder)  # of a copy every host has its own
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, should_stop, wait), sent(folder):
        for each in (folder, *map(Path, placed.parents.values())):
            bucket.bring(each)
        if writes:
            point_to_checkpoints(folder, command.launch.checkpoints)
        if agreed(is_done(folder)):  # by the process that was waited for
            return
        tell(f"{run.full_name}: {stage.name} in {address_of(folder)}")
        if first_process():
            write_start(folder, full_config(command, run, placed), command.file, *provenance(command))
            write_event(folder, "start", host=socket.gethostname(), pid=os.getpid())
            bucket.send(folder)
        try:
            find_loop(stage.kind)(stage, context(command, placed, should_stop))
        except Diverged:
            raise  # the loop has written its event
        except Preempted:
            if first_process() and read_events(folder)[-1]["event"] != "preempt":  # where nothing was to be saved
                write_event(folder, "preempt")
            raise
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            write_event(folder, "error", message=f"{type(error).__name__}: {error}", traceback=text)
            raise
        if first_process():
            write_event(folder, "done")
            write_atomically(folder / "DONE", "")


def point_to_checkpoints(folder: Path, root: str | None) -> None:
    """Says in a new run directory that its checkpoints are under `root`, or in the bucket that the folder is a copy of. Raises
    ConfigError where they are elsewhere already."""
    pointer, own = folder / POINTER, folder / "checkpoints"
    if root:
        root = root.rstrip("/") if is_remote(root) else str(Path(root).absolute())
        at = f"{root}/{folder.parent.name}/{folder.name}"
    elif bucket.bucket_of(folder) and not pointer.is_file():
        at = f"{address_of(folder).removeprefix('file://')}/checkpoints"  # of a folder, which Orbax knows by its path
    else:
        return
    known = pointer.read_text() if pointer.is_file() else str(own) if own.exists() else at
    if known != at:
        raise ConfigError(f"{folder} has its checkpoints in {known}, not in {at}; leave --checkpoints out, or move them")
    write_atomically(pointer, at)


def share_stages(command: Command, placed: Sequence[tuple[Run, Sequence[Placed]]], should_stop: Callable[[], bool]) -> None:
    """Brings every stage to DONE, one that is ready and that nobody is at at a time, in their order; the rest is waited for.

    Raises ConfigError in a cluster of several processes, whose stages are all of all.
    """
    if is_one_of_many():
        raise ConfigError("--share is for processes of their own; the processes of one cluster work at a stage together")
    left = {p.dir: (run, p) for run, stages in placed for p in chosen_stages(run, stages, command.launch.stage)}
    while left := {folder: each for folder, each in left.items() if not is_done(folder)}:
        for run, p in left.values():
            if should_stop():
                raise Preempted("told to stop between two stages")
            if any(map(left.__contains__, p.parents.values())):
                continue
            with contextlib.suppress(Held):
                run_stage(command, run, p, should_stop, wait=False)
                break  # what is ready now may stand before it
        else:
            time.sleep(WAIT_S)


def find_loop(kind: str) -> Callable:
    """Imported only now, so that a stage needs no library of another's."""
    module, name = LOOPS[kind].split(":")
    return getattr(importlib.import_module(module), name)


def context(command: Command, placed: Placed, should_stop: Callable[[], bool]) -> StageContext:
    return StageContext(
        dir=placed.dir,
        seed=placed.seed,
        parents=placed.parents,
        parent_stages={ref: config_at_hand(folder) for ref, folder in placed.parents.items()},
        data_dir=command.launch.data_dir,
        should_stop=should_stop,
    )


def chosen_stages(run: Run, placed: Sequence[Placed], name: str | None) -> list[Placed]:
    """All stages of a run, or the one of this name; ConfigError where there is none such."""
    if name is not None:
        run.experiment.stage(name)
    return [p for p in placed if name in (None, p.stage.name)]


def config_at_hand(folder: Path) -> dict:
    """config.json of a parent, whose own parents are named by where they are on this machine."""
    config = read_config(folder)
    return config | ({"parents": {ref: str(bucket.folder_of(at)) for ref, at in config["parents"].items()}} if "parents" in config else {})


# What is written ------------------------------------------------------------------------------------------------------


def full_config(command: Command, run: Run, placed: Placed) -> dict:
    """config.json of a run directory. identity is what the id hashes, config all of the stage's fields."""
    return {
        "id": placed.id,
        "kind": placed.stage.kind,
        "name": placed.stage.name,
        "size": placed.size,
        "seed": placed.seed,
        "experiment": run.experiment.name,
        "run": run.name,
        "parents": {ref: address_of(Path(folder)) if not is_remote(folder) else folder for ref, folder in placed.parents.items()},
        "config": plain(placed.stage),
        "identity": placed.identity,
    }


def plain(value):
    """A config as JSON values, functions by name."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value


def shown_config(run: Run, launch) -> dict:
    """Stage -> folder and fields, for --print-config."""
    stages = place(run, Path(launch.out), launch.data_dir)
    return {p.stage.name: {"dir": address_of(p.dir), "seed": p.seed, **plain(p.stage)} for p in stages}


def write_index(command: Command, placed: Sequence[tuple[Run, Sequence[Placed]]]) -> None:
    """OUT/experiments/<experiment>.json: run -> stage -> folder below OUT; runs of other commands stay in it.

    One that says so already is left alone: the jobs of a sweep, which begin side by side, would write over each other.
    """
    out = Path(command.launch.out)
    for name in {r.experiment.name for r in command.runs}:
        path = out / "experiments" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        bucket.bring(path)
        known = json.loads(path.read_text())["runs"] if path.is_file() else {}
        ours = [(run, stages) for run, stages in placed if run.experiment.name == name]
        runs = known | {run.name: {p.stage.name: str(p.dir.relative_to(out)) for p in stages} for run, stages in ours}
        if runs != known:
            write_atomically(path, json.dumps({"experiment": name, "file": str(command.file), "runs": runs}, indent=1))
            bucket.send_file(path)


def provenance(command: Command):
    """The arguments of `write_start` that say where a stage comes from: modules, command line, devices."""
    import jax

    devices = jax.devices()
    about = {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)}
    line = shlex.join(["hhjax", "run", *command.argv])
    return modules_beside(command.file), line, about | {"processes": jax.process_count()}


# Together ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path, should_stop: Callable[[], bool], wait: bool = True):
    """The folder's LOCK in the hands of process 0; the others go on once it has it. All poll while another holds it.

    Raises Preempted when told to stop meanwhile, and Held at once where nobody is to wait.
    """
    with contextlib.ExitStack() as held:
        told = False
        while not agreed(first_process() and take(held, folder, wait)):
            if not told:
                holder, told = read_lock(folder / "LOCK"), True
                tell(f"waiting for process {holder.get('pid')} on {holder.get('host')}, which is at {address_of(folder)}")
            if should_stop():
                raise Preempted(f"told to stop while waiting for {address_of(folder)}")
            time.sleep(WAIT_S)
        yield


@contextlib.contextmanager
def sent(folder: Path):
    """However the block ends, what it left in the folder goes to the bucket that it is a copy of."""
    try:
        yield
    finally:
        if first_process():
            bucket.send(folder)


def take(held: contextlib.ExitStack, folder: Path, wait: bool) -> bool:
    """Whether the folder's LOCK is now this process's, until `held` ends. Raises Held where it is not, unless wait."""
    try:
        held.enter_context(bucket.hold_lock(folder))
    except Held:
        if not wait:
            raise
        return False
    return True


def tell(text: str) -> None:
    if first_process():
        print(text, flush=True)
