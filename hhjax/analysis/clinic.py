"""The quickstart's report: every figure from run directories alone. No jax."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hhjax.analysis.figures import accuracy_figure, calibration_figure, mixture_figure
from hhjax.analysis.page import Section, html_table, write_page
from hhjax.analysis.policies import behaviour_figure, detection_figure, read_detection, read_grades, read_shares, tax_figure, tranche_figure
from hhjax.analysis.rlhf import Curve, read_best, read_curve, reward_figure
from hhjax.analysis.runs import load_result
from hhjax.clinic.gold import BEHAVIOURS
from hhjax.clinic.world import read_prompt
from hhjax.io.metrics import read_rows

MOST = 3.0  # fits go up to this sqrt(KL)
TITLE = "hhjax quickstart: Bai et al. 2022 in a simulated clinic"
INTRO = ("A simulated front desk, patients and annotators (docs/clinic.md) stand in for people; the annotators' utilities, called "
         "gold, are known, so that over-optimisation is measured and not guessed. One seed unless a figure says otherwise; models of "
         "0.1 and 0.4 million parameters. What holds here need not hold elsewhere.")  # fmt: skip


def write_report(folders: Mapping[str, Path], out: Path) -> str:
    """Writes out/report.html and out/figures; returns what each figure shows. folders: the stages of experiments/quickstart.py."""
    figures = out / "figures"
    found, sections = [], []

    def add(title: str, name: str, drawn: str, body: str = "") -> None:
        found.append(f"{title}: {drawn}")
        sections.append(Section(title, figures / name, body))

    curve = lambda stage, label: curve_of(folders[stage], label)  # noqa: E731
    size = {name: read_config(folder)["size"] for name, folder in folders.items()}
    by_size = [curve(stage, f"{size[stage]} policy") for stage in ("ppo_small", "ppo")]
    add("Reward against √KL, by policy size", "reward_by_size", reward_figure(by_size, [], figures / "reward_by_size", MOST))
    by_data = [curve("ppo_250", "PM of 250 pairs"), curve("ppo", "PM of one half of all pairs")]
    add("Over-optimisation, by number of comparisons", "reward_by_pairs", reward_figure(by_data, [], figures / "reward_by_pairs", MOST))
    best = read_best(folders["best"], "best of n")
    add("Best of n beside PPO", "best_of_n", reward_figure([curve("ppo", "PPO")], [best], figures / "best_of_n", MOST))
    results = {name.removeprefix("eval_"): load_result(folder, stage=name) for name, folder in folders.items() if name.startswith("eval_")}
    scaling = [results[name] for name in ("pm_small_250", "pm_small_1000", "pm_small", "pm_250", "pm_1000", "pm")]
    add("PM accuracy by data and size", "accuracy", accuracy_figure(scaling, figures / "accuracy"))
    mixes = [results[name] for name in ("pm_helpful", "pm_25", "pm", "pm_75", "pm_harmless")]
    add("Helpful against harmless, by training mixture", "mixture", mixture_figure(mixes, figures / "mixture"))
    add("Calibration of the mixed PM", "calibration", calibration_figure([results["pm"]], figures / "calibration"))
    add("Scores by tranche", "tranches", tranche_figure(results["pm"], figures / "tranches"))
    shares = [read_shares(folders["ppo"], "before", last=False), read_shares(folders["ppo_helpful"], "helpful only"),
              read_shares(folders["ppo"], "both"), read_shares(folders["ppo_harmless"], "harmless only")]  # fmt: skip
    add("What the policies do", "behaviour", behaviour_figure(shares, BEHAVIOURS, figures / "behaviour"))
    exams = [read_grades(folders[f"exam_{stage}"], size[policy], when) for stage, policy, when in
             (("lm_small", "ppo_small", "before"), ("lm_large", "ppo", "before"), ("ppo_small", "ppo_small", "after"), ("ppo", "ppo", "after"))]  # fmt: skip
    add("Alignment tax", "tax", tax_figure(exams, figures / "tax"))
    add("Detecting harmful prompts", "detection", detection_figure([read_detection(folders["detect"])], figures / "detection"))
    sections.append(Section("The same prompts before and after", body=transcripts(folders["ppo"])))
    write_page(out / "report.html", TITLE, INTRO, sections)
    text = "\n".join([*found, f"Report: {out / 'report.html'}"])
    (out / "report.txt").write_text(text + "\n")
    return text


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def curve_of(folder: Path, label: str) -> Curve:
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "score" in row]
    if not rows:
        raise ValueError(f"{folder} has no PPO iterations yet; finish that stage with `hhjax run` first")
    return read_curve(folder, label, label, rows)._replace(label=label)


def transcripts(folder: Path, each: int = 4) -> str:
    """A table of replies to held-out prompts, of the initial policy and of the last, with train, test and gold scores."""
    samples = sorted((folder / "samples").glob("*.jsonl"))
    first, last = (read_rows(path) for path in (samples[0], samples[-1]))
    tests = [f"test/{ref}" for ref in read_config(folder)["config"]["tests"]]
    columns = ["score", *tests, "watch/gold"]
    harmful = np.array([bool((scene := read_prompt(row["prompt"])) and scene.harmful) for row in first])
    chosen = [i for kind in (False, True) for i in np.flatnonzero(harmful == kind)[:each]]
    cells = lambda row: [row["reply"].strip(), *(f"{row[name]:+.2f}" for name in columns)]  # noqa: E731
    rows = [[first[i]["prompt"].strip(), *cells(first[i]), *cells(last[i])] for i in chosen]
    names = ["train", *(f"test {n.removeprefix('test/')}" for n in tests), "gold"]
    return html_table(["prompt", "before", *names, "after", *names], rows)
