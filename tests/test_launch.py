"""Launching: stages in order, each trained once, in folders that say where they come from; sweeps; exit codes."""

import json
import sys
from pathlib import Path

import pytest

from hhjax import cli, flags, launch, sweep
from hhjax.fields import ConfigError
from hhjax.identity import folder_digest
from hhjax.io.metrics import read_events
from hhjax.sharding import MeshConfig, make_mesh
from hhjax.stages import Diverged, Preempted

CHAIN = '''"""A chain of three stages, for two seeds."""
from hhjax.data.comparisons import ComparisonData
from hhjax.data.sources import TextData
from hhjax.experiment import Experiment, grid
from hhjax.stages import LM, PM, Tokenizer
from losses import doubled

TEXT = TextData(sources=("text.jsonl",))
SHORT = dict(batch_size=8, steps=2, log_every=1, eval_rows=8)
BASE = Experiment("chain", (
    Tokenizer("tok", data=TEXT, vocab=320),
    LM("lm", tokenizer="tok", model="0.1M", data=TEXT, seq_len=32, **SHORT),
    PM("pm", init="lm", data=ComparisonData(sources=("pairs.jsonl",)), seq_len=96, objective=doubled, **SHORT),
))
RUNS = grid(BASE, {"seed": (0, 1)})
'''
LOSSES = """
from hhjax.objectives.preference import preference_objective

def doubled(model, cfg):
    loss = preference_objective(model, cfg)
    def twice(params, batch, key):
        value, metrics = loss(params, batch, key)
        return 2 * value, metrics
    return twice
"""


FOREIGN = """
from hhjax.data.comparisons import ComparisonData
from hhjax.experiment import Experiment
from hhjax.stages import PM

RUNS = Experiment("foreign", (
    PM("pm", init={folder!r}, data=ComparisonData(("pairs.jsonl",)), seq_len=160, batch_size=8, steps=2, eval_rows=8),
))
"""


@pytest.fixture
def chain(tmp_path, tiny_data, monkeypatch):
    """tmp_path as the working folder, with chain.py in it; launch.run works in this process."""
    (tmp_path / "chain.py").write_text(CHAIN)
    (tmp_path / "losses.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HHJAX_DATA", str(tiny_data))
    monkeypatch.setattr(launch, "join_cluster", lambda seconds: lambda: False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("chain", "losses"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def starts(folder) -> int:
    return sum(e["event"] == "start" for e in read_events(folder))


def test_stages_of_other_source_are_told(chain, capsys, monkeypatch):
    """Once, with the commit; not where source and commit are those that made them."""
    monkeypatch.setattr("hhjax.io.rundir.source_state", lambda: ("0123456789", ""))
    for _ in range(2):
        assert launch.run(["chain.py", "--only", "seed=0", "--stage", "tok"]) == 0
    assert "last started" not in capsys.readouterr().out
    for state in (("abcdef0123", ""), ("0123456789", "a diff")):
        monkeypatch.setattr("hhjax.io.rundir.source_state", lambda state=state: state)
        assert launch.run(["chain.py", "--only", "seed=0", "--stage", "tok"]) == 0
        assert capsys.readouterr().out.count("finished stages last started at commit 0123456: 1, which stay") == 1


def test_stages_run_in_order_once_and_are_shared(chain, capsys):
    assert launch.run(["chain.py", "--only", "seed=0"]) == 0
    index = json.loads((chain / "runs/experiments/chain.json").read_text())
    stages = {name: chain / "runs" / folder for name, folder in index["runs"]["seed=0"].items()}
    assert list(stages) == ["tok", "lm", "pm"] and all((f / "DONE").exists() for f in stages.values())
    ends = [read_events(f)[-1]["time"] for f in stages.values()]
    assert ends == sorted(ends)
    # A second run of the same file trains only what another seed needs; the tokenizer is shared.
    assert launch.run(["chain.py"]) == 0
    assert "chain:seed=1: tok is done" in capsys.readouterr().out
    assert [starts(f) for f in stages.values()] == [1, 1, 1]
    index = json.loads((chain / "runs/experiments/chain.json").read_text())["runs"]
    assert index["seed=1"]["tok"] == index["seed=0"]["tok"] and index["seed=1"]["lm"] != index["seed=0"]["lm"]
    assert sorted(p.name for p in (chain / "runs/lm").iterdir()) == sorted(index[s]["lm"][3:] for s in index)


def test_a_folder_says_where_it_comes_from(chain):
    assert launch.run(["chain.py", "--only", "seed=0", "--stage", "tok"]) == 0
    index = chain / "runs/experiments/chain.json"
    assert list(json.loads(index.read_text())["runs"]) == ["seed=0"]  # of one stage alone too, so that plots find it
    written = index.stat().st_mtime_ns
    assert launch.run(["chain.py", "--only", "seed=0", "--stage", "tok"]) == 0 and index.stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="pm needs 'lm', which is not done"):
        launch.run(["chain.py", "--only", "seed=0", "--stage", "pm"])
    folder = next((chain / "runs/tokenizer").iterdir())
    assert (folder / "experiment.py").read_text() == CHAIN
    assert (folder / "modules/losses.py").read_text() == LOSSES
    assert "hhjax run chain.py --only seed=0 --stage tok" in (folder / "command.txt").read_text()
    env = json.loads((folder / "env.json").read_text())
    assert env["versions"]["jax"] and env["devices"]["count"] == 8
    config = json.loads((folder / "config.json").read_text())
    assert config["kind"] == "tokenizer" and config["config"]["vocab"] == 320 and config["id"] in folder.name


def test_a_hugging_face_folder_is_a_parent(chain, hugging_face_folder):
    (chain / "foreign.py").write_text(FOREIGN.format(folder=str(hugging_face_folder)))
    assert launch.run(["foreign.py"]) == 0
    (pm,) = (chain / "runs/pm").iterdir()
    assert (pm / "DONE").exists() and pm.name.startswith("llama_tiny-s0-")
    config = json.loads((pm / "config.json").read_text())
    assert config["parents"] == {str(hugging_face_folder): str(hugging_face_folder)}
    assert config["identity"]["init"] == folder_digest(hugging_face_folder)


@pytest.mark.parametrize("config", [{"id": "x"}, {}])
def test_a_host_that_sees_files_late_makes_every_collective(chain, hugging_face_folder, monkeypatch, config):
    """Of a parent given by its path: whether its config.json is there yet or not, each host asks as often as the others."""
    (chain / "foreign.py").write_text(FOREIGN.format(folder=str(hugging_face_folder)))
    command, _ = flags.parse(["foreign.py"], "x")
    [(run, [stage])] = [(r, launch.place(r, command.launch.out)) for r in command.runs]
    asked, answers = [], iter((False, True, True, True))  # process 0's: not done, the parent is, the LOCK is held, done meanwhile
    monkeypatch.setattr(launch, "read_config", lambda folder: config)
    monkeypatch.setattr(launch, "agreed", lambda value: asked.append(value) or next(answers))
    launch.run_stage(command, run, stage, lambda: False)
    assert len(asked) == 4


def test_checkpoints_may_be_elsewhere(chain):
    """A child finds its parent's there, and a later command needs not say it again."""
    assert launch.run(["chain.py", "--only", "seed=0", "--checkpoints", "elsewhere"]) == 0
    [lm], [pm] = ((chain / "runs" / kind).iterdir() for kind in ("lm", "pm"))
    for folder in (lm, pm):
        assert not (folder / "checkpoints").exists()
        assert (chain / "elsewhere" / folder.parent.name / folder.name / "2.json").is_file()
    (pm / "DONE").unlink()
    with pytest.raises(ConfigError, match="has its checkpoints in .*elsewhere.*, not in /other"):
        launch.run(["chain.py", "--only", "seed=0", "--checkpoints", "/other"])
    assert launch.run(["chain.py", "--only", "seed=0", "--checkpoints", "elsewhere"]) == 0
    (pm / "DONE").unlink()
    assert launch.run(["chain.py", "--only", "seed=0"]) == 0
    assert [e["step"] for e in read_events(pm) if e["event"] == "restore"] == [2, 2]


def test_a_folder_of_another_config_is_refused_by_field(chain):
    assert launch.run(["chain.py", "--stage", "tok"]) == 0
    folder = next((chain / "runs/tokenizer").iterdir())
    config = json.loads((folder / "config.json").read_text())
    config["identity"]["data"]["limit"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "DONE").unlink()
    with pytest.raises(ConfigError, match="was made with data.limit=99, this run has data.limit=None; move the folder"):
        launch.run(["chain.py", "--stage", "tok"])


def test_flags_change_every_run_and_their_name(chain):
    command, _ = flags.parse(["chain.py", "--pm.optim.lr", "3e-4", "--pm.loss.lm-coef", "0.5", "--lm.mesh.fsdp=2"], "x")
    shown = "pm.optim.lr=0.0003,pm.loss.lm_coef=0.5"  # and not the mesh, which changes no result
    assert [r.name for r in command.runs] == [f"seed=0,{shown}", f"seed=1,{shown}"]
    for run in command.runs:
        pm, lm = run.experiment.stage("pm"), run.experiment.stage("lm")
        assert (pm.optim.lr, pm.loss.lm_coef, lm.mesh.fsdp, lm.optim.lr) == (3e-4, 0.5, 2, 1e-3)
    command, _ = flags.parse(["chain.py", "--seed", "5", "--pm.data.sources", "a.jsonl", "b.jsonl"], "x")
    assert [r.name for r in command.runs] == ["seed=5,pm.data.sources=a.jsonl+b.jsonl"] and command.runs[0].experiment.seed == 5
    assert command.runs[0].experiment.stage("pm").data.sources == ("a.jsonl", "b.jsonl")


def test_a_flag_that_does_not_exist_names_the_nearest(chain, capsys):
    with pytest.raises(SystemExit) as end:
        flags.parse(["chain.py", "--pm.optim.lrr", "1"], "hhjax run")
    assert end.value.code == 2 and "--pm.optim.lr" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="matches no run; known are chain:seed=0, chain:seed=1"):
        flags.parse(["chain.py", "--only", "zzz"], "hhjax run")
    with pytest.raises(ConfigError, match="has no stage 'mp'; did you mean 'pm'"):
        launch.run(["chain.py", "--stage", "mp"])
    with pytest.raises(ConfigError, match="'none.py' does not exist"):
        flags.parse(["none.py"], "hhjax run")


def test_help_begins_with_the_file_s_own_words(chain, capsys):
    with pytest.raises(SystemExit) as end:
        flags.parse(["chain.py", "--help"], "hhjax run")
    words = capsys.readouterr().out
    assert end.value.code == 0 and words.startswith("A chain of three stages, for two seeds.\nusage: hhjax run chain.py")
    assert "--pm.optim.lr FLOAT" in words and "Runs whose name matches this pattern." in words


@pytest.mark.parametrize("command, own", [("run", "--data-dir"), ("sweep", "--backend"), ("plan", "--topology")])
def test_help_without_a_file_lists_what_every_file_has(command, own, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    words = capsys.readouterr().out
    assert end.value.code == 0 and f"`hhjax {command} FILE --help` lists them" in words
    assert own in words and "Runs whose name matches this pattern." in words
    with pytest.raises(SystemExit) as end:
        cli.main([command])
    assert end.value.code == 2


def test_arguments_of_runs_become_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "made.py").write_text(
        "from hhjax.experiment import Experiment, grid\n"
        "from hhjax.stages import Tokenizer\n"
        "def runs(fast=False, folds: int = 2):\n"
        "    base = Experiment('made', (Tokenizer('tok', vocab=300 if fast else 400),))\n"
        "    return grid(base, {'seed': range(folds)})\n"
    )
    path = str(tmp_path / "made.py")
    assert len(flags.parse([path], "x")[0].runs) == 2
    command, _ = flags.parse([path, "--folds", "3", "--fast"], "x")
    assert len(command.runs) == 3 and command.runs[0].experiment.stage("tok").vocab == 300
    (tmp_path / "two.py").write_text(
        "from hhjax.experiment import Experiment, grid\n"
        "from hhjax.stages import Tokenizer\n"
        "RUNS = [r for n in 'ab' for r in grid(Experiment(n, (Tokenizer('tok'),)), {'seed': (0, 1)})]\n"
    )
    two = str(tmp_path / "two.py")
    assert [r.full_name for r in flags.parse([two, "--only", "b:*"], "x")[0].runs] == ["b:seed=0", "b:seed=1"]
    assert len(flags.parse([two, "--only", "seed=0"], "x")[0].runs) == 2
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="defines neither RUNS nor a function `runs`"):
        flags.parse([str(tmp_path / "empty.py")], "x")


def raising(error):
    def main():
        raise error

    return main


def test_exit_codes(capsys):
    assert launch.exit_code(lambda: 0) == 0
    assert launch.exit_code(raising(Preempted("saved"))) == 75
    assert launch.exit_code(raising(Diverged("nan"))) == 65
    assert launch.exit_code(raising(ConfigError("bad"))) == 2
    assert launch.exit_code(lambda: make_mesh(MeshConfig(data=3))) == 2  # a check of this package
    assert "error: mesh" in capsys.readouterr().err
    with pytest.raises(ValueError):  # a bug elsewhere keeps its traceback
        launch.exit_code(lambda: int("x"))


# Sweeps


class FakeProcess:
    """A process that ends with `code` when it is polled the second time."""

    def __init__(self, code):
        self.returncode, self.polls, self.code = None, 0, code

    def poll(self):
        self.polls += 1
        self.returncode = self.code if self.polls > 1 else None
        return self.returncode


def job(name, *needs):
    return sweep.Job(Path(name), "run", name, frozenset(map(Path, needs)))


def test_a_failing_stage_stops_only_what_needs_it(monkeypatch):
    monkeypatch.setattr(sweep, "POLL_S", 0)
    jobs = [job("tok"), job("a", "tok"), job("b", "tok"), job("a2", "a"), job("a3", "a2"), job("b2", "b")]
    started, alive, most = [], [], []

    def start(one):
        started.append(one.stage)
        alive.append(FakeProcess(65 if one.stage == "a" else 0))
        most.append(sum(p.returncode is None for p in alive))
        return alive[-1]

    assert sweep.schedule(jobs, 2, start) == 65
    assert started == ["tok", "a", "b", "b2"] and max(most) == 2


def test_a_sweep_lists_each_missing_stage_once(chain):
    command, _ = flags.parse(["chain.py"], "x")
    placed = [(r, launch.place(r, command.launch.out)) for r in command.runs]
    jobs = sweep.list_jobs(placed)
    assert [j.stage for j in jobs] == ["tok", "lm", "pm", "lm", "pm"]
    assert [j.run for j in jobs] == ["chain:seed=0"] * 3 + ["chain:seed=1"] * 2
    assert jobs[3].needs == {jobs[0].folder} and jobs[4].needs == {jobs[3].folder}
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "DONE").touch()
    assert [j.stage for j in sweep.list_jobs(placed)] == ["lm", "pm", "lm", "pm"]
    assert sweep.without(["f.py", "--jobs", "2", "--only=x", "--lm.steps", "3"], ("--jobs", "--only")) == [
        "f.py", "--lm.steps", "3",
    ]  # fmt: skip
    # An empty value is a value, and tyro takes underscores too.
    assert sweep.passed_on(["f.py", "--sbatch=", "--seed", "3", "--service_account", "me", "--dry_run", "--data_dir=a_b"]) == [
        "f.py", "--seed", "3", "--data_dir=a_b",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_sweep_trains_two_seeds_side_by_side(chain, hhjax):
    process = hhjax("sweep", "chain.py", "--jobs", "2")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert output.count("started tok") == 1 and output.count("started pm") == 2
    assert len(list((chain / "runs").glob("*/*/DONE"))) == 5
    again = hhjax("sweep", "chain.py", "--jobs", "2")
    assert "started" not in again.communicate(timeout=60)[0] and again.returncode == 0


@pytest.mark.slow
def test_two_writers_of_one_folder_take_turns(chain, hhjax):
    first, second = (hhjax("run", "chain.py", "--only", "seed=0") for _ in range(2))
    outputs = [p.communicate(timeout=300)[0] for p in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert all(starts(f) == 1 for f in (chain / "runs").glob("*/*") if f.parent.name != "experiments")


@pytest.mark.slow
def test_a_hang_is_ended_with_its_traceback(chain, hhjax):
    sleep = "        __import__('time').sleep(600)\n        value, metrics"
    hang = LOSSES.replace("        value, metrics", sleep)
    (chain / "losses.py").write_text(hang)
    process = hhjax("run", "chain.py", "--only", "seed=0", "--pm.watchdog-s", "3")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Timeout" in output and "losses.py" in output


@pytest.mark.slow
def test_two_processes_train_as_one(chain, hhjax, start_two):
    """The same rows in the same batches, half on each process."""
    alone = hhjax("run", "chain.py", "--only", "seed=0", "--out", "alone", devices=2)
    assert alone.wait(300) == 0
    started = start_two(chain, "run", "chain.py", "--only", "seed=0", "--out", "together")
    outputs = [p.communicate(timeout=300)[0] for p in started]
    assert [p.returncode for p in started] == [0, 0], outputs
    rows = [losses_of(next((chain / out / "pm").iterdir())) for out in ("alone", "together")]
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


@pytest.mark.slow
def test_a_process_that_fails_ends_its_peer(chain, start_two):
    """The one exits with 1 at once; the other too, when a collective fails, or with 134, when it misses the heartbeat."""
    fail = "        import jax\n        assert jax.process_index() == 0, 'boom'\n        value, metrics"
    (chain / "losses.py").write_text(LOSSES.replace("        value, metrics", fail))
    started = start_two(chain, "run", "chain.py", "--only", "seed=0", "--heartbeat-timeout-s", "10")
    outputs = [p.communicate(timeout=300)[0] for p in started]
    assert started[1].returncode == 1 and started[0].returncode in (1, -6), outputs  # -6 is what a shell calls 134
    assert "boom" in outputs[1]


def losses_of(folder) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]
