"""`hhjax plan`: the step functions of a run, compiled for a pod that is not there: memory, work, exchanges, time and cost.

    hhjax plan experiments/pods.py --topology v5p:4x4x4 --only 52B

Every stage that is trained is planned by the very functions that its loop jits, at full length: an LM or PM by its update, PPO
by the three of an iteration (sample, score, update). Nothing is read but the experiment file; no array is made.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import jax
from jax.sharding import AbstractMesh

from hhjax.aot import Compiled, compile_ahead, compiler_of
from hhjax.chips import GIB, Topology, parse_topology
from hhjax.experiment import Run
from hhjax.fields import ConfigError
from hhjax.flags import Command
from hhjax.hlo import Collective, Program
from hhjax.loops.phases import phase_flops, roles
from hhjax.lowering import Step, check_step, holdings, lower
from hhjax.model.transformer import remat_on
from hhjax.placing import reference_dir
from hhjax.plan import architectures, update_work
from hhjax.sharding import AXES, MeshConfig, mesh_sizes
from hhjax.stages import PPO, Training, split_step

# What share of a peak an instruction keeps up. Assumed, not measured here: large matrix products alone are said to reach 0.8 of an H200's
# peak (790 of 989 TFLOP/s), HBM and links what streaming code reaches. Whole steps fall short of it by what they do one after another; the
# best published ones are at 0.44 to 0.71 on TPUs (MaxText on v5e, v5p, v6e) and 0.50 on H100s.
ATTAINABLE = {"compute": 0.8, "HBM": 0.8, "interconnect": 0.8}
PHASES = ("sample", "score", "update")
PLATFORM = "tpu"  # layers are looped over and recomputed on GPUs as on TPUs


@dataclass(frozen=True)
class PlanFlags:
    """Plan an experiment file for a pod."""

    topology: str = ""
    """Chips, such as v5p:4x4x4, v5p-128, v6e:16x16, tpu7x:4x4x4, h200:8."""
    search: bool = False
    """Try meshes, remat policies and batch sizes, and rank those that fit by predicted time a row."""
    tries: int = 24
    """The most candidates that a search compiles for each stage."""
    patience_s: float = 120.0
    """Seconds after which a candidate of a search is given up."""
    json: Path | None = None
    """Write all numbers to this file too."""


@dataclass(frozen=True)
class Estimate:
    """What one step function needs on one device, and takes.

    memory: bytes by what they hold. work: model FLOPs of the step over all devices, by formula; compiled: FLOPs of the
    compiled program on all devices, loops counted as often as they run. seconds: of the roofline by bound, at full peaks. serial: of all
    instructions one after another, each by its own bound at what is attainable of it (0: not compiled); predicted: that, or the exchanges'
    where they take longer. warnings: how often the partitioner copied an array whole because it found no way to reshard.
    """

    run: str
    stage: str
    phase: str
    mesh: dict[str, int]
    memory: dict[str, int]
    capacity: float
    work: float
    compiled: float | None
    hbm_bytes: int | None
    collectives: tuple[Collective, ...]
    seconds: dict[str, float]
    serial: float
    positions: int
    warnings: int
    failure: str
    compile_s: float

    @property
    def used(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return not self.failure and self.used <= self.capacity

    @property
    def bound(self) -> str:
        """What the predicted time comes from: the exchanges where they take longer than all else, else products or bytes."""
        of = {b: s / ATTAINABLE[b] for b, s in self.seconds.items()}
        if of.get("interconnect", 0.0) <= self.serial:
            of.pop("interconnect", None)
        return max(of, key=of.get) if of else ""

    @property
    def predicted(self) -> float:
        """Seconds a step; infinite where nothing is known."""
        return max((self.serial, *(s / ATTAINABLE[b] for b, s in self.seconds.items()))) if self.seconds else float("inf")


def run(command: Command, flags: PlanFlags) -> int:
    """Prints the plan of every run of the command; returns 0, or 2 where a stage does not fit."""
    if flags.tries < 1:
        raise ConfigError(f"--tries {flags.tries}: give at least 1")
    if not flags.topology:
        raise ConfigError("hhjax plan needs --topology, such as v5p:4x4x4, v5p-128, v6e:16x16 or h200:8")
    topology = parse_topology(flags.topology)
    jax.config.update("jax_platforms", "cpu")  # where another compiler is installed jax would look for its device, and complain
    compiler = compiler_of(topology)
    if not compiler.package and (topology.chip.axes or flags.search):
        raise ConfigError(f"{'--search' if flags.search else topology.name} needs {compiler.packages[0]}: pip install -e '.[{compiler.extra}]'")
    if not compiler.package:
        print(f"temporaries, the compiler's FLOPs, bytes and exchanges need jax's CUDA plugin: pip install -e '.[{compiler.extra}]'; by formula:")
    print(heading(topology))
    steps = [step for r in command.runs for step in steps_of(r, command.launch.stage)]
    if not steps:
        raise ConfigError("nothing to plan: no LM, PM or PPO stage in the chosen runs")
    if flags.search:
        steps = searched(steps, topology, flags.tries, flags.patience_s)
    estimates = []
    for step in steps:
        estimates.append(estimate(step, topology))
        print("\n".join(report(estimates[-1], topology)), flush=True)
    rows = summary(steps, estimates, topology)
    print("", *table(rows), sep="\n")
    if flags.json:
        flags.json.write_text(json.dumps({
            "topology": topology.name, "chips": topology.chips, "attainable": ATTAINABLE, "jax": jax.__version__,
            "compiler": compiler.version if compiler.package else "", "rows": rows, "steps": [as_json(e) for e in estimates],
        }, indent=1))  # fmt: skip
    return 0 if all(e.fits for e in estimates) else 2


def steps_of(run: Run, only: str | None = None) -> Iterator[Step]:
    """The step functions of a run's trained stages, or of the stage of this name."""
    if only is not None:
        run.experiment.stage(only)
    stages = {s.name: s for s in run.experiment.stages}
    configs = architectures(stages, lambda ref: reference_dir(split_step(ref)[0], {}))
    for stage in stages.values():
        if only not in (None, stage.name):
            continue
        if isinstance(stage, Training):
            yield Step(run.full_name, stage, {"model": configs(stage.name)}, "update")
        if isinstance(stage, PPO):
            by_role = {role: configs(ref) for role, ref in roles(stage).items()}
            yield from (Step(run.full_name, stage, by_role, phase) for phase in PHASES)


# One step function ----------------------------------------------------------------------------------------------------


def estimate(step: Step, topology: Topology, limit_s: float = 1800.0) -> Estimate:
    """Compiled in limit_s at most; by formula for GPUs without their compiler. Raises ConfigError on a mesh or batch that the run would refuse."""
    try:
        sizes = mesh_sizes(step.stage.mesh, topology.devices)
        mesh_sizes(getattr(step.stage, "rollout_mesh", None) or step.stage.mesh, topology.devices)
    except ValueError as error:
        name = step.stage.name
        raise ConfigError(f"{name}: {error}: --{name}.mesh.data, --{name}.mesh.fsdp, --{name}.mesh.tensor") from None
    positions, work = work_of(step, sizes[0] * sizes[1])
    compiler = compiler_of(topology)
    if not compiler.package and not topology.chip.axes:
        return formula(step, topology, positions, work)
    found = compile_ahead(compiler, lower, step, topology, limit_s=limit_s)
    return read(step, topology, found, positions, work)


def work_of(step: Step, ways: int) -> tuple[int, float]:
    """Token positions of a step, and its model FLOPs at full length. ways: how many shards a batch has."""
    if step.phase == "update" and isinstance(step.stage, Training):
        (rows, width), flops = update_work(step.stage, step.configs["model"], ways, PLATFORM)
        return rows * width, flops
    width = step.stage.prompt_len + step.stage.sampling.max_new_tokens
    return step.stage.batch_size * width, phase_flops(step.stage, step.configs, PLATFORM)[step.phase]


def read(step: Step, topology: Topology, found: Compiled, positions: int, work: float) -> Estimate:
    """The numbers of a compiled program."""
    chip, mesh, held = topology.chip, found.facts["mesh"], dict(found.facts["held"])
    collectives, seconds, serial, flops, traffic = (), {}, 0.0, None, None
    if found.text:
        program = Program(found.text)
        collectives = tuple(program.collectives(mesh))
        flops, traffic = program.flops() * topology.devices, program.hbm_bytes()
        seconds = {
            "compute": flops / (topology.chips * chip.flops),
            "HBM": traffic * chip.devices / chip.bandwidth,
            "interconnect": sum(exchange_seconds(c, topology, found.facts["extent"]) for c in collectives),
        }
        serial = program.serial_seconds(ATTAINABLE["compute"] * chip.flops / chip.devices, ATTAINABLE["HBM"] * chip.bandwidth / chip.devices)
        cache = min(held.pop("cache", 0), found.temporaries)
        memory = held | {"activations": found.temporaries - cache} | ({"cache": cache} if cache else {})
        memory["batch"] = max(found.arguments + found.facts["beside"] - sum(held.values()), 0)
    else:
        held.pop("cache", 0)
        memory = held
    return Estimate(step.run, step.stage.name, step.phase, mesh, memory, chip.memory / chip.devices, work, flops, traffic, collectives,
                    seconds, serial, positions, len(found.warnings), found.failure, found.seconds)  # fmt: skip


def exchange_seconds(one: Collective, topology: Topology, extent: dict[str, dict[int, int]]) -> float:
    """Seconds of a collective over all its runs, by rings over the torus dimensions of its axes.

    A gather or scatter of n devices sends (n - 1) / n of the whole over every device's links, an all-reduce twice that; an all-to-all of
    b bytes a device n / 4 times b; a permutation its bytes.
    """
    spans: dict[int, int] = {}
    for axis in one.axes.split("+"):
        for dim, places in extent.get(axis, {}).items():
            spans[dim] = spans.get(dim, 1) * places
    share = (one.group - 1) / one.group
    sent = {"all-reduce": 2 * share, "all-to-all": one.group / 4, "collective-permute": 1.0}.get(one.kind, share) * one.bytes
    return one.times * sent / topology.bandwidth(spans) if one.group > 1 else 0.0


def formula(step: Step, topology: Topology, positions: int, work: float) -> Estimate:
    """What needs no compiler: state and frozen models under the stage's mesh, and the time of the model FLOPs at peak, which is the least that
    a step takes."""
    sizes = mesh_sizes(step.stage.mesh, topology.devices)
    mesh = AbstractMesh(sizes, AXES)
    check_step(step, mesh)
    decode = AbstractMesh(mesh_sizes(getattr(step.stage, "rollout_mesh", None) or step.stage.mesh, topology.devices), AXES)
    held, _ = holdings(step, mesh, decode, "bfloat16")
    return Estimate(step.run, step.stage.name, step.phase, dict(mesh.shape), held, topology.chip.memory, work, None, None, (),
                    {"compute": work / (topology.chips * topology.chip.flops)}, 0.0, positions, 0, "", 0.0)  # fmt: skip


# Search ---------------------------------------------------------------------------------------------------------------


def searched(steps: Sequence[Step], topology: Topology, most: int, limit_s: float) -> list[Step]:
    """The steps, each with the stage that was best in a search by its update, which holds the most and is most of the work; a PPO stage's
    three phases stay one stage."""
    best = {}
    for step in steps:
        if step.phase == "update":
            found = search(step, topology, most, limit_s)
            print("\n".join(ranking(found, topology, of=len(list(candidates(step, topology))))), flush=True)
            best[step.run, step.stage.name] = found[0][0].stage
    return [step._replace(stage=best[step.run, step.stage.name]) for step in steps]


def search(step: Step, topology: Topology, most: int, limit_s: float) -> list[tuple[Step, Estimate]]:
    """Candidates that were compiled, those that fit first, each by its predicted seconds a row; each has limit_s to compile."""
    found = []
    for candidate in list(candidates(step, topology))[:most]:
        done = estimate(candidate, topology, limit_s)
        found.append((candidate, done))
        print("\n".join(ranking([(candidate, done)], topology)), flush=True)
    return sorted(found, key=lambda pair: (not pair[1].fits, pair[1].predicted / pair[0].stage.batch_size))


def candidates(step: Step, topology: Topology) -> Iterator[Step]:
    """The stage as it is, then with other remat policies, batches of one, two and four times its own (and as many fewer steps), and meshes
    (those that divide the model, the batch and the devices, with little tensor parallelism first); the state of each fits by formula."""
    yield step
    stage, cfg = step.stage, next(iter(step.configs.values()))
    powers = [2**i for i in range(topology.devices.bit_length())]
    meshes = [MeshConfig(topology.devices // (f * t), f, t) for t, f in product(powers, powers) if f * t <= topology.devices]
    for remat, times, mesh in product(("dots", "full", "none"), (1, 2, 4), meshes):
        divides = topology.devices == mesh.data * mesh.fsdp * mesh.tensor and cfg.width % mesh.fsdp == cfg.kv_heads % mesh.tensor == 0
        parts = getattr(stage, "minibatches", 1) * stage.micro_batches * mesh.data * mesh.fsdp
        if not divides or stage.batch_size * times % parts or mesh.tensor > 16:
            continue
        length = {"steps": -(-stage.steps // times)} if stage.steps else {}
        tried = replace(stage, mesh=mesh, batch_size=stage.batch_size * times, run=replace(stage.run, remat=remat), **length)
        same = times == 1 and remat == planned_remat(stage) and mesh_sizes(stage.mesh, topology.devices) == (mesh.data, mesh.fsdp, mesh.tensor)
        abstract = AbstractMesh((mesh.data, mesh.fsdp, mesh.tensor), AXES)
        candidate, capacity = step._replace(stage=tried), topology.chip.memory / topology.chip.devices
        if not same and sum(holdings(candidate, abstract, abstract, "bfloat16")[0].values()) < capacity:
            yield candidate


def planned_remat(stage: Training | PPO) -> str:
    return remat_on(stage.run, PLATFORM)


# Text -----------------------------------------------------------------------------------------------------------------


def heading(topology: Topology) -> str:
    chip = topology.chip
    split = f", {chip.devices} devices a chip: {topology.devices} devices of {chip.memory / chip.devices / GIB:.2f} GiB"
    return (f"{topology.name}: {topology.chips} chips{split if chip.devices > 1 else ''}; a chip: {chip.flops / 1e12:.0f} TFLOP/s bf16, "
            f"{chip.memory / GIB:.2f} GiB at {chip.bandwidth / 1e9:.0f} GB/s, links of {chip.link / 1e9:.0f} GB/s each way")  # fmt: skip


def report(e: Estimate, topology: Topology) -> Iterator[str]:
    """A step function in lines."""
    per, gib = topology.chip.devices, lambda n: f"{n / GIB:.2f} GiB"
    yield f"\n{e.run}: {e.stage} {e.phase}, mesh {' x '.join(f'{a} {n}' for a, n in e.mesh.items())}; {f'compiled in {e.compile_s:.0f} s' if e.compile_s else 'by formula'}"
    yield "  memory     " + ", ".join(f"{name} {gib(n)}" for name, n in e.memory.items() if n)
    spare = e.capacity - e.used
    if e.failure:
        yield f"  does not fit: {e.failure}"
    else:
        both = f" a device, {gib(per * e.used)} of {gib(per * e.capacity)} a chip" if per > 1 else " a chip"
        yield (f"  {'fits      ' if e.fits else 'DOES NOT FIT'} {gib(e.used)} of {gib(e.capacity)}{both}: "
               f"{gib(abs(spare))} {'to spare' if spare >= 0 else 'too much'}")  # fmt: skip
    compiled = f", {e.compiled:.3g} as compiled (loops as often as they run)" if e.compiled else ""
    yield f"  FLOPs      {e.work:.3g} by formula{compiled}"
    if e.hbm_bytes:
        yield f"  HBM        {e.hbm_bytes / 1e9:,.1f} GB read and written a device"
    kinds: dict[tuple, list[float]] = {}
    for c in e.collectives:
        row = kinds.setdefault((c.kind, c.axes, c.group), [0, 0])
        row[0], row[1] = row[0] + c.times, row[1] + c.times * c.bytes
    for (kind, axes, group), (times, total) in sorted(kinds.items(), key=lambda item: -item[1][1]):
        yield f"  {kind:<19}along {axes} ({group} devices): {times:,} times, {total / 1e9:,.2f} GB"
    if e.warnings:
        yield f"  WARNING    {e.warnings} involuntary full rematerialisations: an array is copied whole to be resharded"
    if e.seconds and not e.compiled:
        yield f"  at least   {e.predicted:.3g} s for the products alone, at {ATTAINABLE['compute']:.0%} of the peak"
    elif e.seconds:
        yield ("  roofline   " + ", ".join(f"{name} {s:.3g} s" for name, s in e.seconds.items()) + f"; bound by {e.bound}; one instruction after "
               f"another {e.serial:.3g} s")  # fmt: skip
        yield f"  predicted  {e.predicted:.3g} s, {e.positions / e.predicted:,.0f} tokens/s, MFU {mfu(e, topology):.2f}"


def mfu(e: Estimate, topology: Topology) -> float:
    """Model FLOPs by formula over what the chips could do in the predicted time."""
    return e.work / (e.predicted * topology.chips * topology.chip.flops)


def summary(steps: Sequence[Step], estimates: Sequence[Estimate], topology: Topology) -> list[dict]:
    """One row a trained stage, and one a run where a run has several. seconds: of an update or iteration; days and chip_hours: of all its
    `steps`, None where the stage's length is in epochs."""
    by_stage: dict[tuple, list[tuple[Step, Estimate]]] = {}
    for step, e in zip(steps, estimates):
        by_stage.setdefault((step.run, step.stage.name), []).append((step, e))
    rows = []
    for (name, stage_name), parts in by_stage.items():
        stage, found = parts[0][0].stage, [e for _, e in parts]
        seconds, known = sum(e.predicted for e in found), all(e.seconds for e in found)
        compiled = all(e.compiled for e in found)  # by formula seconds are the least there can be, and their MFU the assumed one
        days = seconds * stage.steps / 86400 if stage.steps and known else None
        widest = max(found, key=lambda e: e.used)
        rows.append({
            "run": name, "stage": stage_name, "mesh": "x".join(str(n) for n in found[-1].mesh.values()), "remat": planned_remat(stage),
            "batch": stage.batch_size, "gib": widest.used / GIB, "capacity_gib": widest.capacity / GIB, "fits": all(e.fits for e in found),
            "bound": max(found, key=lambda e: e.predicted).bound if compiled else "", "seconds": seconds if known else None,
            "tokens_per_s": found[-1].positions / seconds if compiled else None,
            "mfu": sum(e.work for e in found) / (seconds * topology.chips * topology.chip.flops) if compiled else None,
            "days": days, "chip_hours": days * 24 * topology.chips if days is not None else None,
            "compile_s": sum(e.compile_s for e in found),
        })  # fmt: skip
    return rows


def table(rows: Sequence[dict]) -> list[str]:
    """The stages of every run, and the sum of what has a length."""
    per = "GiB a device"
    lines = [("run", "stage", "mesh", "remat", "batch", per, "of", "fits", "bound", "s a step", "tokens/s", "MFU", "days", "chip-hours")]
    show = lambda x, form: "" if x is None else format(x, form)  # noqa: E731
    for r in rows:
        lines.append((r["run"], r["stage"], r["mesh"], r["remat"], str(r["batch"]), f"{r['gib']:.1f}", f"{r['capacity_gib']:.1f}",
                      "yes" if r["fits"] else "NO", r["bound"], show(r["seconds"], ".3g"), show(r["tokens_per_s"], ",.0f"),
                      show(r["mfu"], ".2f"), show(r["days"], ".3g"), show(r["chip_hours"], ",.0f" if (r["chip_hours"] or 0) >= 10 else ".3g")))  # fmt: skip
    total = [[r[k] for r in rows if r[k] is not None] for k in ("days", "chip_hours")]
    if len(rows) > 1 and total[0]:
        lines.append(("all, one after another", *[""] * 11, f"{sum(total[0]):.3g}", f"{sum(total[1]):,.0f}"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines]


def ranking(found: Sequence[tuple[Step, Estimate]], topology: Topology, of: int = 0) -> Iterator[str]:
    """A search's candidates, a line each; with a heading where it is told how many there are."""
    if of:
        yield f"\n{found[0][0].run}: {found[0][0].stage.name} {found[0][0].phase}, {len(found)} of {of} candidates, the fastest a row first"
    for step, e in found:
        mesh = "x".join(str(n) for n in e.mesh.values())
        rows, memory = step.stage.batch_size, e.failure or f"{e.used / GIB:.1f} GiB"
        said = f"{e.predicted:.3g} s, {1e3 * e.predicted / rows:.3g} ms a row, MFU {mfu(e, topology):.2f}, {e.bound}" if e.seconds else ""
        yield f"  mesh {mesh:<10} remat {planned_remat(step.stage):<5} batch {rows:<5} {'fits' if e.fits else 'NO  '} {memory:<10} {said}".rstrip()


def as_json(e: Estimate) -> dict:
    fields = asdict(e) | {"used": e.used, "fits": e.fits, "bound": e.bound, "predicted": e.predicted if e.seconds else None}
    return fields | {"collectives": [c._asdict() | {"shapes": [s.dims for s in c.shapes]} for c in e.collectives]}
