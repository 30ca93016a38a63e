"""`hhjax plan`: what is counted by hand, and what the compiler says of the paper's sizes on pods."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from hhjax import lowering, pods
from hhjax.aot import COMPILERS, Compiled, Compiler, compile_ahead
from hhjax.chips import GIB, Topology, parse_topology
from hhjax.experiment import Run, edit
from hhjax.fields import ConfigError
from hhjax.flags import parse
from hhjax.hlo import Collective, Program, full_gathers
from hhjax.model.sizes import model_config
from hhjax.model.transformer import make_model
from hhjax.sharding import AXES, MeshConfig, mesh_sizes

POD = Path(__file__).resolve().parent.parent / "experiments" / "pods.py"
TPU = (Path(__file__).parent / "golden" / "tpu_step.hlo").read_text()
needs_libtpu = pytest.mark.skipif(not COMPILERS["tpu"].package, reason="libtpu is not installed: pip install -e '.[plan]'")
needs_cuda = pytest.mark.skipif(not COMPILERS["cuda"].package, reason="jax's CUDA plugin is not installed: pip install -e '.[cuda]'")


def command(*flags):
    return parse([str(POD), *map(str, flags)], "hhjax plan", pods.PlanFlags)


def steps(size: str, stage: str, chip: str = "v5p", **changes) -> list[lowering.Step]:
    """The step functions of a stage of the shipped ladder, with fields changed."""
    [run] = command("--chip", chip, "--only", size)[0].runs
    experiment = run.experiment
    for path, value in changes.items():
        experiment = edit(experiment, f"{stage}.{path}", value)
    return list(pods.steps_of(Run(experiment, run.axes), stage))


def abstract(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), AXES)


# By hand --------------------------------------------------------------------------------------------------------------


def test_the_state_of_52b_over_fsdp_16_and_tensor_4():
    """f32 weights and two moments of 64 x 12 x 8192^2 + 50,304 x 8192 matrix elements over 64 devices, vectors whole: 9.1 GiB."""
    [step] = steps("52B", "pm")
    held, beside = lowering.holdings(step, abstract(1, 16, 4), abstract(1, 16, 4), "bfloat16")
    matrices, vectors = 64 * 12 * 8192**2 + 50_304 * 8192, (4 * 64 + 3) * 8192
    weights = 4 * (matrices // 64 + vectors)
    assert 0 < held["optimiser"] - 2 * weights < 32  # counters and the key
    assert held["parameters"] == weights and 9.0 < sum(held.values()) / GIB < 9.2 and beside == 0


def test_ppo_holds_two_trained_models_and_two_frozen_ones_in_every_phase():
    sample, score, update = steps("52B", "ppo")
    mesh, decode = abstract(1, 16, 4), abstract(16, 1, 4)
    elements, vectors = (64 * 12 * 8192**2 + 50_304 * 8192), (4 * 64 + 3) * 8192
    for step in (sample, score, update):
        held, _ = lowering.holdings(step, mesh, decode, "bfloat16")
        assert held["parameters"] == 2 * 4 * (elements // 64 + vectors)
        assert held["frozen models"] == 2 * (2 * elements // 64 + 4 * vectors)
    held, beside = lowering.holdings(sample, mesh, decode, "bfloat16")
    assert held["decode weights"] == 2 * elements // 4 + 4 * vectors
    assert held["cache"] == 2 * 2 * 64 * (512 // 16) * (64 // 4) * 256 * 128  # keys and values, bf16, of 32 rows and 16 heads
    assert beside == held["parameters"] + held["optimiser"] + held["frozen models"]
    assert lowering.holdings(update, mesh, decode, "bfloat16")[1] == held["frozen models"]


def test_an_exchange_takes_its_share_of_the_whole_over_the_links():
    cube, extent = Topology("v5p", (4, 4, 4)), {"fsdp": {0: 4, 1: 4}, "tensor": {2: 4}}
    one = lambda kind, axes, group: Collective(kind, 10**9, axes, group, 3, True, ())  # noqa: E731
    gather = pods.exchange_seconds(one("all-gather", "fsdp", 16), cube, extent)
    assert gather == pytest.approx(3 * 15 / 16 * 1e9 / 400e9)
    assert pods.exchange_seconds(one("reduce-scatter", "fsdp", 16), cube, extent) == gather
    assert pods.exchange_seconds(one("all-reduce", "tensor", 4), cube, extent) == pytest.approx(3 * 2 * 3 / 4 * 1e9 / 200e9)
    assert pods.exchange_seconds(one("all-reduce", "none", 1), cube, extent) == 0


def test_a_compiled_program_becomes_an_estimate():
    [step] = steps("52B", "pm")
    facts = {"mesh": {"data": 1, "fsdp": 4, "tensor": 2}, "held": {"parameters": 100, "optimiser": 200}, "beside": 0,
             "extent": {"fsdp": {0: 2}, "tensor": {1: 2}}}  # fmt: skip
    topology = Topology("v5p", (2, 2, 2))
    found = pods.read(step, topology, Compiled(facts, TPU, 350, 1000, "", (), 1.5), 10**6, 8e15)
    assert found.memory == {"parameters": 100, "optimiser": 200, "activations": 1000, "batch": 50} and found.used == 1350
    assert found.compiled == 8 * Program(TPU).flops() and found.seconds["compute"] == pytest.approx(Program(TPU).flops() / 459e12)
    assert found.serial == pytest.approx(Program(TPU).serial_seconds(0.8 * 459e12, 0.8 * 2765e9))
    assert found.fits and found.predicted == max(found.serial, *(s / pods.ATTAINABLE[b] for b, s in found.seconds.items()))
    assert pods.mfu(found, topology) == pytest.approx(8e15 / (found.predicted * 8 * 459e12))
    lost = pods.read(step, topology, Compiled(facts, "", 0, 0, "HBM is full", ("w",), 1.0), 10**6, 8e15)
    assert not lost.fits and math.isinf(lost.predicted) and "does not fit: HBM is full" in "\n".join(pods.report(lost, topology))


def test_a_gpu_is_planned_by_formula_without_its_compiler(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Compiler, "package", "")
    flags = ("--topology", "h200:64", "--only", "52B", "--stage", "pm", "--json", tmp_path / "plan.json")
    assert pods.run(*command(*flags)) == 0
    text = capsys.readouterr().out
    assert "need jax's CUDA plugin: pip install -e '.[cuda]'" in text and "parameters 3.03 GiB" in text and "at least" in text and "compiled in" not in text
    saved = json.loads((tmp_path / "plan.json").read_text())
    [row] = saved["rows"]
    [step] = saved["steps"]
    seconds = step["work"] / (64 * 989e12) / 0.8
    assert row["seconds"] == pytest.approx(seconds) and row["days"] == pytest.approx(5025 * seconds / 86400)
    assert row["chip_hours"] == pytest.approx(row["days"] * 24 * 64) and step["compiled"] is None


@pytest.mark.parametrize(("flags", "message"), [(("--chip", "v5e", "--topology", "v5e:2x2"), r"v5e:2x2 needs libtpu: pip install -e '\.\[plan\]'"),
                                                (("--topology", "h100:1", "--search"), r"--search needs jax_cuda13_plugin: pip install -e '\.\[cuda\]'")])  # fmt: skip
def test_what_needs_a_compiler_says_so_first(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(Compiler, "package", "")
    with pytest.raises(ConfigError, match=message):
        pods.run(*command(*flags, "--only", "13M", "--stage", "pm"))
    assert not capsys.readouterr().out


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ConfigError, match="--tries 0: give at least 1"):
        pods.run(*command("--only", "13M", "--topology", "v5e:2x2", "--search", "--tries", 0))
    with pytest.raises(ConfigError, match="needs --topology"):
        pods.run(*command("--only", "13M"))
    with pytest.raises(ConfigError, match="unknown chip"):
        pods.run(*command("--only", "13M", "--topology", "v9:4x4"))
    with pytest.raises(ValueError, match="does not fill 6 devices"):
        pods.run(*command("--only", "52B", "--topology", "h100:6"))
    with pytest.raises(ConfigError, match="nothing to plan"):
        pods.run(*command("--only", "52B", "--topology", "h100:64", "--stage", "tok"))


def test_candidates_divide_the_model_the_batch_and_the_devices():
    [step] = steps("13B", "pm")
    topology = parse_topology("v5p:2x4x4")
    first, *others = pods.candidates(step, topology)
    assert first == step and len(others) > 20
    assert {c.stage.batch_size for c in others[:24]} == {32, 64} and {c.stage.run.remat for c in others[:24]} == {"dots"}
    assert all(abs(c.stage.steps * c.stage.batch_size - step.stage.steps * 32) < 4 * 32 for c in others)  # as much data
    as_it_is = (step.stage.batch_size, mesh_sizes(step.stage.mesh, 32), "dots")  # what "auto" is off a CPU: not compiled twice
    assert as_it_is not in [(c.stage.batch_size, mesh_sizes(c.stage.mesh, 32), c.stage.run.remat) for c in others]
    for candidate in others:
        mesh, batch = candidate.stage.mesh, candidate.stage.batch_size
        assert mesh.data * mesh.fsdp * mesh.tensor == 32 and batch % (mesh.data * mesh.fsdp) == 0 and 40 % mesh.tensor == 0
    assert {c.stage.run.remat for c in others} == {"full", "dots", "none"} and {c.stage.batch_size for c in others} == {32, 64, 128}


def test_a_search_leaves_the_phases_of_ppo_one_stage(monkeypatch):
    """It looks at the update alone, and what is found there is how all three are planned."""
    seen = []

    def search(step, topology, most, limit_s):
        seen.append(step.phase)
        return [(list(pods.candidates(step, topology))[5], known(serial=1.0))]

    monkeypatch.setattr(pods, "search", search)
    given = steps("13M", "ppo") + steps("13M", "pm")
    found = pods.searched(given, parse_topology("v5p:2x2x1"), 24, 1.0)
    assert seen == ["update", "update"] and [s.phase for s in found] == [s.phase for s in given]
    assert found[0].stage == found[1].stage == found[2].stage != given[0].stage


def known(serial: float, **seconds) -> pods.Estimate:
    """An estimate of which only times are known."""
    return pods.Estimate("", "", "", {}, {}, 1.0, 1.0, 1.0, 1, (), {"compute": 0.08, "HBM": 0.16, "interconnect": 0.0} | seconds, serial, 1, 0, "", 1.0)


def test_the_bound_is_what_the_predicted_time_comes_from():
    """Instructions one after another, as long as exchanges beside them take no longer."""
    beside, alone = known(0.3, interconnect=0.2), known(0.3, interconnect=0.4)
    assert (beside.predicted, beside.bound) == (0.3, "HBM") and (alone.predicted, alone.bound) == (pytest.approx(0.5), "interconnect")


def test_a_run_is_picked_by_its_size():
    names = [run.name for run in command("--only", "52B")[0].runs]
    assert names == ["lm.model=52B"] and len(command()[0].runs) == 7


@pytest.mark.parametrize("chip", ["v5p", "v5e", "v6e"])
def test_every_slice_holds_its_models_and_divides_its_batches(chip):
    runs = command("--chip", chip)[0].runs
    slices = importlib.import_module("pods").SLICES[chip]
    for run, (shape, *_) in zip(runs, slices.values(), strict=True):
        topology = parse_topology(f"{chip}:{shape}")
        for step in pods.steps_of(run):
            mesh, decode = (abstract(*mesh_sizes(m or step.stage.mesh, topology.devices))
                            for m in (step.stage.mesh, getattr(step.stage, "rollout_mesh", None)))  # fmt: skip
            lowering.check_step(step, mesh)
            assert sum(lowering.holdings(step, mesh, decode, "bfloat16")[0].values()) < topology.chip.memory


# By the compiler ------------------------------------------------------------------------------------------------------


@needs_libtpu
def test_a_small_step_is_compiled_for_a_pod(capsys):
    assert pods.run(*command("--chip", "v5e", "--topology", "v5e:2x2", "--only", "13M", "--stage", "pm")) == 0
    text = capsys.readouterr().out
    assert "v5e:2x2: 4 chips" in text and "all-reduce         along data (4 devices)" in text and "fits " in text


@needs_cuda
def test_a_small_step_is_compiled_for_gpus(capsys):
    """Of two machines: what goes between them is told, and takes as long as their adapters let it."""
    assert pods.run(*command("--topology", "h100:16", "--only", "13M", "--stage", "pm")) == 0
    text = capsys.readouterr().out
    assert "h100:16: 16 chips" in text and "all-reduce         along data (16 devices)" in text and "fits " in text and "compiled in" in text


@needs_cuda
@pytest.mark.slow
def test_an_iteration_of_ppo_on_eight_gpus_fits_and_reshards_nothing():
    for step in steps("810M", "ppo", **{"mesh.fsdp": 8}):
        compiled = compile_ahead(COMPILERS["cuda"], lowering.lower, step, parse_topology("h100:8"))
        assert not compiled.failure and compiled.warnings == ()
        found = pods.read(step, parse_topology("h100:8"), compiled, *pods.work_of(step, 8))
        assert found.fits and 0.9 < found.compiled / found.work < 1.4  # in bf16 the policy is scored once more, which no formula counts


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("size", "topology"), [("2.7B", "v5p:2x2x4"), ("13B", "v5p:2x4x4"), ("52B", "v5p:4x4x4")])
@pytest.mark.parametrize("stage", ["pm", "ppo"])
def test_nothing_is_replicated_or_resharded_by_accident(size, topology, stage):
    """An update gathers each layer's weights inside the loop over layers, in bf16, and no stack of layers outside it; gradients are
    scattered as they are reduced; the partitioner never copies an array whole; and all of it fits."""
    step = steps(size, stage)[-1]
    compiled = compile_ahead(COMPILERS["tpu"], lowering.lower, step, parse_topology(topology))
    assert not compiled.failure and compiled.warnings == ()
    found = pods.read(step, parse_topology(topology), compiled, *pods.work_of(step, step.stage.mesh.fsdp))
    assert found.fits and found.memory["batch"] < 1e-3 * found.used  # what it is given is what was counted by formula, and rows
    cfg = model_config(size, 50_257)
    shapes = jax.eval_shape(make_model(cfg).init, jax.random.key(0))
    tensor = found.mesh["tensor"]
    stacks = {x.shape for x in jax.tree.leaves(shapes["blocks"])}
    split = {tuple(n // tensor if i == at else n for i, n in enumerate(s)) for s in stacks for at in range(1, len(s))}
    whole = stacks | split | ({shapes["embed"].shape} if tensor > 1 else set())  # of the embedding, a tensor's share is gathered
    assert not list(full_gathers(found.collectives, whole))
    gathers = [c for c in found.collectives if c.kind == "all-gather" and c.looped and c.bytes > 1e6]
    assert gathers and all(s.dtype == "bf16" for c in gathers for s in c.shapes)
    # Of matrices' gradients only the embedding's are summed whole, where fsdp cuts its rows into no whole tiles: at most its two uses in the
    # policy, and the value network's, a part of the batch. Else vectors (norms, sums of loss) and numbers.
    summed = [c for c in found.collectives if c.kind == "all-reduce" and "fsdp" in c.axes]
    rows, width = shapes["embed"].shape
    embedding = [c for c in summed if any(s.dims == (rows // tensor, width) for s in c.shapes)]
    assert sum(c.times for c in embedding) <= 3 * step.stage.micro_batches
    assert all(len(s.dims) <= 1 for c in summed if c not in embedding for s in c.shapes)
    assert any(c.kind == "reduce-scatter" and c.looped for c in found.collectives)
    # Three forwards, and a fourth to recompute, of which the last product of a block is not needed; attention is not causal here.
    assert 1.0 < found.compiled / found.work < 1.4


@needs_libtpu
@pytest.mark.slow
def test_decoding_gathers_no_weights():
    """They are resharded once an iteration: inside the loop over tokens only activations travel."""
    sample = steps("197M", "ppo")[0]
    sample = sample._replace(stage=replace(sample.stage, rollout_mesh=MeshConfig(-1, 1, 2)))
    compiled = compile_ahead(COMPILERS["tpu"], lowering.lower, sample, parse_topology("v5p:2x2x1"))
    found = pods.read(sample, parse_topology("v5p:2x2x1"), compiled, *pods.work_of(sample, 4))
    assert not compiled.failure and compiled.warnings == () and found.mesh == {"data": 2, "fsdp": 1, "tensor": 2}
    smallest = 2 * 1280 * 1280 // 2  # the least of a block's matrices, in bf16, on one device
    assert not [c for c in found.collectives if c.kind == "all-gather" and c.looped and c.bytes >= smallest]
    assert found.compiled == pytest.approx(found.work, rel=0.05)
