"""Every shipped experiment: it opens as DESIGN asks, its stages fit together, and the quickstart's runs to its report."""

import csv
import gzip
import html
import inspect
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hhjax.analysis.clinic import write_report
from hhjax.data.sources import EXAMS
from hhjax.evals.replies import HABITS
from hhjax.fields import ConfigError
from hhjax.flags import parse
from hhjax.model.sizes import SIZES
from hhjax.placing import place
from hhjax.sharding import MeshConfig
from hhjax.types import Rollout

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "experiments").glob("*.py"))
WORDS = "please tell me how to bake bread plant trees fix a bicycle write letters or learn some music at home".split()


@pytest.fixture(scope="session")
def hh_data(tmp_path_factory) -> Path:
    """A data folder of the real layout with made-up rows: the better helpful reply is longer, the better harmless one shorter."""
    folder, rng = tmp_path_factory.mktemp("hh"), random.Random(0)

    def say(n):
        return " ".join(rng.choice(WORDS) for _ in range(n))

    for kind, more in (("helpful-base", 6), ("harmless-base", -6)):
        for split, count in (("train", 500), ("test", 100)):
            path = folder / "hh-rlhf-split" / kind / f"{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = []
            for i in range(count):
                start = f"\n\nHuman: {kind} {split} {i} {say(6)}\n\nAssistant:"
                if i % 2:
                    start += f" {say(4)}\n\nHuman: {say(3)}\n\nAssistant:"
                rows.append({"chosen": f"{start} {say(10 + more)}", "rejected": f"{start} {say(10)}"})
            with gzip.open(path, "wt") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
    dialogues = folder / "dialogue-sgd" / "train.jsonl.gz"
    dialogues.parent.mkdir()
    with gzip.open(dialogues, "wt") as f:
        for i in range(300):
            turns = [{"speaker": s, "utterance": say(12)} for s in ("USER", "SYSTEM") * 3]
            f.write(json.dumps({"dialogue_id": str(i), "services": [], "turns": turns}) + "\n")
    for name in ("text-gutenberg/book.txt.gz", "text-wikitext2/valid.txt.gz"):
        path = folder / name
        path.parent.mkdir()
        with gzip.open(path, "wt") as f:
            f.write("\n".join(say(30) for _ in range(400)))
    exams = {name: folder / path for name, path in EXAMS.items()}
    for path in exams.values():
        path.parent.mkdir(exist_ok=True)
    options = [[say(2) + f" {i}{letter}" for letter in "abcd"] for i in range(12)]
    lines = {"arc-easy": [{"query": f"Question: {say(5)} {i}?", "choices": o, "gold": i % 4} for i, o in enumerate(options)],
             "lambada": [{"context": f"{say(8)} {i}", "continuation": o[0]} for i, o in enumerate(options)]}  # fmt: skip
    for name, rows in lines.items():
        with gzip.open(exams[name], "wt") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    endings = [{"question": f"{say(6)} {i}", "choices": dict(zip("ABCD", o)), "answer": "ABCD"[i % 4]} for i, o in enumerate(options)]
    with gzip.open(exams["hellaswag"], "wt") as f:
        json.dump({"test": endings, "dev": []}, f)
    with zipfile.ZipFile(exams["mmlu"], "w") as z:
        z.writestr("data/test/art_test.csv", "".join(f"{say(5)} {i}?,{','.join(o)},{'ABCD'[i % 4]}\n" for i, o in enumerate(options)))
    (folder / "text-us-speeches").mkdir()
    for name in ("inaugural", "state_union"):
        with zipfile.ZipFile(folder / "text-us-speeches" / f"{name}.zip", "w") as z:
            z.writestr(f"{name}/1.txt", say(3000))
    return folder


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_an_experiment_opens_with_what_a_reader_must_know(path):
    text = path.read_text()
    for heading in ("Question", "Figure", "Expected", "Cost", "Command"):
        assert re.search(rf"^{heading}", text, re.MULTILINE), f"{path.name} does not say its {heading}"
    assert f"experiments/{path.name}" in text


@pytest.mark.parametrize("fast", [[], ["--fast"]], ids=["full", "fast"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_stages_of_an_experiment_have_their_places(path, fast, hh_data, tmp_path):
    if fast and not re.search(r"^def runs\(fast", path.read_text(), re.MULTILINE):
        with pytest.raises(ConfigError, match="has no fast version"):
            parse([str(path), *fast], "hhjax run")
        return
    command, _ = parse([str(path), *fast], "hhjax run")
    for run in command.runs:
        placed = place(run, tmp_path, hh_data)
        assert len({p.dir for p in placed}) == len({p.id for p in placed})  # equal stages of two names are one
        assert placed[-1].stage.kind in ("report", "ppo", "comparisons", "elo", "evaluate", "detect", "exam")
        sizes = {p.size for p in placed if p.stage.kind in ("ppo", "best_of_n", "comparisons", "elo", "exam", "detect")}
        assert not sizes - set(SIZES)  # folders are named by models, not by the data


def test_the_changed_loss_is_under_ten_lines_and_changes_the_loss():
    source = (ROOT / "experiments" / "pm_margin.py").read_text()
    body = re.search(r"^def margin_objective.*?(?=^\S(?!ef))", source, re.MULTILINE | re.DOTALL).group()
    assert len([line for line in body.splitlines() if line.strip()]) < 10
    command, _ = parse([str(ROOT / "experiments" / "pm_margin.py")], "hhjax run")
    assert [r.experiment.stage("pm").loss.margin for r in command.runs] == [0.0, 0.5, 1.0]


def test_the_changed_ppo_losses_are_short_and_say_what_they_are():
    """Under ten lines each. At ratio 1.5 and advantage 1 the clip pays 1.2, its absence 1.5; the penalty adds beta * k2 to the loss."""
    command, _ = parse([str(ROOT / "experiments" / "ppo_losses.py")], "hhjax run")
    stages = {run.experiment.name: run.experiment.stage("ppo") for run in command.runs}
    for name in ("kl_in_loss", "unclipped"):
        lines = inspect.getsource(stages[f"ppo_losses_{name}"].objective).splitlines()
        assert len([line for line in lines if line.strip()]) < 10
    mask, ones = np.ones((1, 3), bool), np.ones((1, 3), np.float32)
    rollout = Rollout(None, mask, 0 * ones, -ones, 0 * ones, ones, 0 * ones)
    actor = lambda params, rows: (params, 0 * ones, 0 * ones)  # noqa: E731
    logp = np.log(1.5) * ones
    value = {n: float(s.objective(actor, s.loss)(logp, rollout, None)[0]) for n, s in stages.items()}
    assert value["ppo_losses_ppo"] == pytest.approx(-1.2)
    assert value["ppo_losses_unclipped"] == pytest.approx(-1.5)
    assert value["ppo_losses_kl_in_loss"] == pytest.approx(-1.2 + 0.001 * (1 + np.log(1.5)) ** 2 / 2, rel=1e-6)
    assert stages["ppo_losses_kl_in_loss"].kl.beta == 0


def test_what_is_left_out_by_default_has_flags_too():
    """Optional configs, such as PPO's mesh for sampling and the raters of an evaluation: no subcommands, and None unless something is set."""
    file = str(ROOT / "experiments" / "rlhf_hh.py")
    plain, _ = parse([file], "hhjax run")
    command, _ = parse([file, "--ppo.rollout-mesh.tensor", "2"], "hhjax run")
    assert plain.runs[0].experiment.stage("ppo").rollout_mesh is None
    assert command.runs[0].experiment.stage("ppo").rollout_mesh == MeshConfig(tensor=2)
    assert command.runs[0].name == plain.runs[0].name  # how it is executed, not what


def test_robustness_scans_both_ways():
    """Scan a: every policy under the largest PM; scan b: each under its own size. Judged by the other half's PMs."""
    command, _ = parse([str(ROOT / "experiments" / "robustness.py"), "--sizes", "0.1M,0.4M"], "hhjax run")
    pairs = [(run.experiment.stage("ppo").policy, run.experiment.stage("ppo").reward) for run in command.runs]
    assert sorted(pairs) == [("lm_0_1M", "pm_0_1M"), ("lm_0_1M", "pm_0_4M"), ("lm_0_4M", "pm_0_4M")]
    for run in command.runs:
        for test in run.experiment.stage("ppo").tests:
            assert run.experiment.stage(test).data.half == "B"
        assert run.experiment.stage(run.experiment.stage("ppo").reward).data.half == "A"


def test_tension_is_judged_by_the_other_half_and_knows_the_tranche_of_a_prompt(hh_data, monkeypatch):
    monkeypatch.setenv("HHJAX_DATA", str(hh_data))
    command, _ = parse([str(ROOT / "experiments" / "tension_hh.py")], "hhjax run")
    assert [run.experiment.stage("ppo").reward for run in command.runs] == ["pm_helpful", "pm_both", "pm_harmless"]
    for run in command.runs:
        ppo = run.experiment.stage("ppo")
        halves = [run.experiment.stage(name).data.half for name in (ppo.reward, *ppo.tests)]
        assert halves == ["A", "B", "B"] and ppo.data.sources == ("helpful-base", "harmless-base")
    prompts = []
    for kind in ppo.data.sources:
        with gzip.open(hh_data / "hh-rlhf-split" / kind / "test.jsonl.gz", "rt") as f:
            prompts.append(json.loads(f.readline())["chosen"].rpartition("\n\nAssistant:")[0] + "\n\nAssistant:")
    seen = ppo.watch(prompts, ["Sorry, no. What else?", "Yes it is"])
    assert set(seen) == {f"{kind}_{habit}" for kind in ppo.data.sources for habit in HABITS} | {"words"}
    np.testing.assert_array_equal(seen["helpful-base_guarded"], [1, np.nan])
    np.testing.assert_array_equal(seen["harmless-base_asks"], [np.nan, 0])
    np.testing.assert_array_equal(seen["words"], [4, 3])


def test_both_arms_of_the_online_loop_have_as_many_comparisons_and_the_same_prompts():
    """Of the half that gold learned from no other preference model sees a human label: theirs are all gold's."""
    command, _ = parse([str(ROOT / "experiments" / "online_hh.py")], "hhjax run")
    arms = {dict(run.axes)["arm"]: run.experiment for run in command.runs}
    limits, skips = {}, {}
    for arm, experiment in arms.items():
        limits[arm] = experiment.stage(f"pm_{arm}").data.limit
        fresh = [stage for stage in experiment.stages if stage.kind == "comparisons"]
        skips[arm] = [stage.skip for stage in fresh]
        assert {stage.labeler for stage in fresh} == {"gold"} and experiment.stage("ppo").tests == ("gold",)
        paying = [s for s in experiment.stages if s.kind == "pm" and s.name != "gold"]
        assert all(set(pm.data.sources) <= {stage.name for stage in fresh} for pm in paying)
    assert limits["online"] == limits["control"] and skips["online"] == skips["control"] == [0, 600, 1200]


@pytest.mark.slow
def test_the_tax_on_public_exams_goes_from_data_to_figures(hh_data, hhjax, tmp_path):
    """The policies are those that tension_hh.py makes: their behaviours are drawn by the clinic's script."""
    process = hhjax("run", ROOT / "experiments" / "tax_hh.py", "--fast", "--data-dir", hh_data, "--tok.vocab", 320, env={"HHJAX_DATA": ""})
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    for script, expected in (("plot_tax", "lambada, 0.4M after, 2 shots"), ("plot_behaviour", "ppo_small: helpful-base")):
        command = [sys.executable, ROOT / "scripts" / f"{script}.py", tmp_path / "runs" / "experiments" / "tax_hh.json"]
        drawn = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert drawn.returncode == 0, drawn.stderr
        assert expected in drawn.stdout


@pytest.mark.slow
def test_ppo_and_rejection_sampling_go_from_data_to_figure(hh_data, hhjax, tmp_path):
    args = ("run", ROOT / "experiments" / "best_of_n.py", "--fast", "--data-dir", hh_data, "--tok.vocab", 320)
    process = hhjax(*args, "--dry-run")
    planned, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "4 iterations of 1 updates" in planned, planned
    process = hhjax(*args)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    [ppo] = (tmp_path / "runs" / "ppo").glob("*")
    process = hhjax("show", ppo, "--samples")
    shown, _ = process.communicate(timeout=60)
    assert "[reply] " in shown and "[reply at 4] " in shown and "first_log_ratio_max" in shown
    script = [sys.executable, ROOT / "scripts" / "plot_reward_vs_sqrt_kl.py", tmp_path / "runs" / "experiments" / "best_of_n.json"]
    drawn = subprocess.run(script, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert drawn.returncode == 0, drawn.stderr
    assert "Best of 4 gains" in drawn.stdout
    assert (tmp_path / "runs" / "figures" / "best_of_n" / "reward_vs_sqrt_kl.png").stat().st_size > 5000


@pytest.fixture(scope="session")
def clinic(tmp_path_factory, start_hhjax):
    """(a folder in which the quickstart has run, what it printed): its world and language model are the clinic's other experiments' too."""
    folder = tmp_path_factory.mktemp("clinic")
    process = start_hhjax(folder, "run", ROOT / "experiments" / "quickstart.py", "--fast", "--jobs", 2, env={"HHJAX_DATA": ""})
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    return folder, output


@pytest.mark.slow
def test_the_online_loop_goes_to_ratings(clinic, start_hhjax):
    folder, _ = clinic
    args = ("run", ROOT / "experiments" / "clinic_online.py", "--fast", "--seeds", 1, "--jobs", 2)
    process = start_hhjax(folder, *args, env={"HHJAX_DATA": ""})
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    script = [sys.executable, ROOT / "scripts" / "plot_elo.py", folder / "runs" / "experiments" / "clinic_online.json"]
    drawn = subprocess.run(script, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert drawn.returncode == 0, drawn.stderr
    [rated] = (folder / "runs" / "elo").glob("*")
    rows = {row["policy"]: row for row in json.loads((rated / "evals" / "elo.json").read_text())["rows"]}
    with open(folder / "runs" / "figures" / "clinic_online" / "elo.csv") as f:
        points = [row for row in csv.DictReader(f) if row["line"] == "ppo_online"]
    ends = {row["panel"]: row for row in points if float(row["x"]) == 15 * 64}
    assert float(ends["raters"]["y"]) == pytest.approx(rows["ppo_online"]["elo"])
    assert float(ends["guess"]["y"]) == pytest.approx(rows["ppo_online"]["guesses"]["pm_online"]["value"])
    assert [float(row["x"]) for row in points if row["panel"] == "raters"] == [0, 5 * 64, 15 * 64]


@pytest.mark.slow
def test_the_quickstart_goes_from_nothing_to_a_report(clinic, tmp_path):
    """With two processes that share its stages; the report's figures are those that the figure functions draw from the folders."""
    runs, output = clinic[0] / "runs", clinic[1]
    index = json.loads((runs / "experiments" / "quickstart.json").read_text())["runs"]["quickstart"]
    assert f"{len(set(index.values()))} of {len(set(index.values()))} stages done" in output
    events = [json.loads(line) for stage in set(index.values()) for line in (runs / stage / "events.jsonl").read_text().splitlines()]
    starts = [e for e in events if e["event"] == "start"]
    assert len(starts) == len(set(index.values())) and len({e["pid"] for e in starts}) == 2  # each once, by two processes
    report = runs / index["report"]
    page = (report / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 10 and "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    folders = {stage: runs / folder for stage, folder in index.items()}
    again = write_report(folders, tmp_path / "again")
    assert again.splitlines()[:-1] == (report / "report.txt").read_text().splitlines()[:-1]
    for found in again.splitlines()[:-1]:
        assert html.escape(found.split(": ", 1)[1]) in page
    for drawn in (tmp_path / "again" / "figures").glob("*.csv"):
        assert drawn.read_text() == (report / "figures" / drawn.name).read_text()


@pytest.mark.slow
def test_the_human_comparisons_go_from_data_to_report(hh_data, hhjax, tmp_path):
    process = hhjax("run", ROOT / "experiments" / "pm_hh.py", "--fast", "--data-dir", hh_data, "--tok.vocab", 320)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    (report,) = (tmp_path / "runs" / "report").glob("*/report.txt")
    assert report.read_text().strip() in output
    for kind in ("helpful", "harmless", "mixed"):
        assert f"eval_{kind}: 0.4M model trained on" in report.read_text()
        assert (report.parent / "figures" / f"calibration_eval_{kind}.png").stat().st_size > 5000
    again = hhjax("run", ROOT / "experiments" / "pm_hh.py", "--fast", "--data-dir", hh_data, "--tok.vocab", 320)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and output.count("is done") == 9
