"""Figures of what policies do and know: behaviours, capabilities, out-of-distribution scores, scores by tranche. No jax."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from hhjax.analysis.figures import COLORS, Line, finish, legend
from hhjax.analysis.runs import Result
from hhjax.analysis.stats import Estimate
from hhjax.io.metrics import read_rows

WATCHED = "eval/watch/"


class Shares(NamedTuple):
    """What a policy does: behaviour -> share of its replies to held-out prompts, with how many prompts there were of each kind."""

    label: str
    shares: dict[str, float]
    prompts: int


def read_shares(folder: Path, label: str, last: bool = True) -> Shares:
    """Of a PPO run's last look at held-out prompts, or of its first, which is the initial policy's."""
    looks = [row for row in read_rows(folder / "metrics.jsonl") if "eval/score" in row]
    if not looks or not any(name.startswith(WATCHED) for name in looks[-1]):
        raise ValueError(f"{folder} has no look that was watched; give the PPO stage a `watch` and finish it")
    row = looks[-1 if last else 0]
    shares = {name.removeprefix(WATCHED): value for name, value in row.items() if name.startswith(WATCHED)}
    return Shares(label, shares, json.loads((folder / "config.json").read_text())["config"]["eval_prompts"])


def behaviour_figure(policies: Sequence[Shares], kinds: Mapping[str, Sequence[str]], path: Path) -> str:
    """A group of bars a policy and a panel a kind of request: how often it does what.

    kinds: kind -> behaviours; the share of behaviour b to requests of kind k is called k_b. Bars are 95 % intervals (Wilson) for
    half of the prompts of each kind.
    """
    fig, axes = plt.subplots(len(kinds), 1, figsize=(10, 2.7 * len(kinds)), squeeze=False)
    panels = {}
    for ax, (kind, behaviours) in zip(axes[:, 0], kinds.items()):
        wide, lines = 0.8 / len(policies), []
        for number, (color, policy) in enumerate(zip(COLORS * len(policies), policies)):
            values = [policy.shares.get(f"{kind}_{b}", 0.0) for b in behaviours]
            estimates = [wilson(value, policy.prompts // len(kinds)) for value in values]
            low, high = ([abs(getattr(e, side) - e.value) for e in estimates] for side in ("low", "high"))
            at = np.arange(len(behaviours)) + (number - (len(policies) - 1) / 2) * wide
            ax.bar(at, values, wide * 0.92, color=color, label=policy.label, yerr=[low, high], error_kw={"elinewidth": 0.8, "alpha": 0.5})
            lines.append(Line(policy.label, range(len(values)), values, [e.low for e in estimates], [e.high for e in estimates]))
        ax.set_xticks(range(len(behaviours)), behaviours)
        ax.set(ylabel=f"share of replies to\n{kind} requests", ylim=(0, 1))
        ax.spines[["top", "right"]].set_visible(False)
        panels[kind] = lines
    legend(axes[0, 0])
    found = " ".join(
        f"{policy.label}: {', '.join(top_shares(policy, kind, behaviours) for kind, behaviours in kinds.items())}." for policy in policies
    )
    claim = ("Paper (section 4.4, Fig. 1): harmlessness is over-optimised before helpfulness, which makes policies evasive unless helpful "
             "prompts have a larger share; policies of helpfulness alone are easier to red-team.")  # fmt: skip
    return finish(fig, path, claim, found, panels)


def top_shares(policy: Shares, kind: str, behaviours: Sequence[str]) -> str:
    """The two commonest behaviours to a kind of request, in words."""
    ordered = sorted(behaviours, key=lambda b: -policy.shares.get(f"{kind}_{b}", 0.0))[:2]
    return f"{kind} " + " and ".join(f"{policy.shares.get(f'{kind}_{b}', 0.0):.0%} {b}" for b in ordered)


def wilson(share: float, n: int) -> Estimate:
    """A share of n with its 95 % interval."""
    z = 1.96
    middle, half = (share + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return Estimate(share, middle - half, middle + half, n, n)


class Grades(NamedTuple):
    """An exam. rows: {"subject", "shots", "questions", "accuracy", "nats", "right"} each."""

    size: str
    policy: str
    rows: list[dict]


def read_grades(folder: Path, size: str, policy: str) -> Grades:
    """An Exam folder. Raises ValueError where it is not finished."""
    path = folder / "evals" / "exam.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no evals/exam.json; finish that stage with `hhjax run` first")
    return Grades(size, policy, json.loads(path.read_text())["rows"])


def tax_figure(exams: Sequence[Grades], path: Path) -> str:
    """Figure 3: capability before and after RLHF by size, zero- and few-shot: accuracy over all questions, and nats by subject."""
    sizes, kinds = list(dict.fromkeys(e.size for e in exams)), list(dict.fromkeys(e.policy for e in exams))
    all_shots = sorted({row["shots"] for e in exams for row in e.rows})
    fig, axes = plt.subplots(1, len(all_shots), figsize=(5 * len(all_shots), 3.6), sharey=True, squeeze=False)
    panels, found = {}, []
    for ax, shots in zip(axes[0], all_shots):
        lines = []
        for color, policy in zip(COLORS * len(kinds), kinds):
            found_here = {e.size: graded(e, shots) for e in exams if e.policy == policy}
            at = [sizes.index(size) for size in found_here]
            estimates = list(found_here.values())
            bars = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
            aside = np.add(at, 0.03 * (kinds.index(policy) - (len(kinds) - 1) / 2))  # bars beside each other
            ax.errorbar(aside, [e.value for e in estimates], bars, color=color, marker="o", ms=4, lw=1.4, label=policy)
            lines.append(Line(policy, at, *([getattr(e, n) for e in estimates] for n in ("value", "low", "high"))))
            found += [f"{size} {policy}, {shots} shots: {e.value:.3f} ({nats(x, shots):.3f} nats)" for (size, e), x in
                      zip(found_here.items(), (e for e in exams if e.policy == policy))]  # fmt: skip
        ax.set_xticks(range(len(sizes)), sizes)
        ax.set(xlabel=f"policy, {shots} shots", ylabel="accuracy")
        ax.label_outer()
        ax.spines[["top", "right"]].set_visible(False)
        panels[f"{shots} shots"] = lines
    legend(axes[0, 0])
    claim = "Paper (Fig. 3): RLHF costs small models some capability (an alignment tax) and gives large ones some (a bonus)."
    return finish(fig, path, claim, "; ".join(found) + ".", panels)


def graded(exam: Grades, shots: int) -> Estimate:
    """Accuracy over all questions."""
    right = [x for row in exam.rows if row["shots"] == shots for x in row["right"]]
    return wilson(float(np.mean(right)), len(right))


def nats(exam: Grades, shots: int) -> float:
    """Minus log-probability of the right option, over all questions."""
    rows = [row for row in exam.rows if row["shots"] == shots]
    return float(np.average([row["nats"] for row in rows], weights=[row["questions"] for row in rows]))


def detection_figure(folder: Path, path: Path) -> str:
    """Figure 22: scores of inside and outside prompts, and AUROC by method."""
    if not (folder / "evals" / "detect.json").is_file():
        raise ValueError(f"{folder} has no evals/detect.json; finish that stage with `hhjax run` first")
    found = json.loads((folder / "evals" / "detect.json").read_text())
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    scores = found["scores"]["relative_mahalanobis"]
    low, high = np.percentile([*scores["inside"], *scores["outside"]], [0.5, 98])
    for color, side in zip(COLORS, ("inside", "outside")):
        axes[0].hist(np.clip(scores[side], low, high), bins=np.linspace(low, high, 40), color=color, alpha=0.55, label=side)
    axes[0].set(xlabel="simplified relative Mahalanobis score", ylabel="prompts")
    names = list(found["auroc"])
    means = [float(np.mean(found["auroc"][n])) for n in names]
    spread = [float(np.std(found["auroc"][n], ddof=1)) if len(found["auroc"][n]) > 1 else 0.0 for n in names]
    axes[1].barh([n.replace("_", " ") for n in names], means, xerr=spread, color=COLORS[0])
    axes[1].set(xlabel="AUROC", xlim=(0.4, 1))
    axes[1].axvline(0.5, color="#999999", lw=0.8, ls=":")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    legend(axes[0])
    line = Line("auroc", range(len(means)), means, np.subtract(means, spread), np.add(means, spread))
    said = "AUROC " + ", ".join(f"{n.replace('_', ' ')} {m:.3f}" for n, m in zip(names, means)) + "."
    claim = ("Paper (Fig. 22, section B.9): the simplified relative score beats the plain Mahalanobis distance (0.85 at 52B, middle "
             "layers); ten harmful examples bring 0.94.")  # fmt: skip
    return finish(fig, path, claim, said, {"auroc": [line]})


def tranche_figure(result: Result, path: Path) -> str:
    """Scores of chosen and rejected replies by tranche."""
    sources = list(dict.fromkeys(result.scores.source.tolist()))
    fig, axes = plt.subplots(1, len(sources), figsize=(5 * len(sources), 3.4), sharey=True, squeeze=False)
    low, high = np.percentile([*result.scores.chosen, *result.scores.rejected], [0.5, 99.5])
    panels, found = {}, []
    for ax, source in zip(axes[0], sources):
        here, lines = result.scores.source == source, []
        for color, side in zip(COLORS, ("chosen", "rejected")):
            x = getattr(result.scores, side)[here]
            heights, edges = np.histogram(np.clip(x, low, high), bins=np.linspace(low, high, 31), density=True)
            ax.stairs(heights, edges, color=color, fill=True, alpha=0.5, label=side)
            lines.append(Line(side, (edges[1:] + edges[:-1]) / 2, heights, heights, heights))
        ax.set(xlabel=f"PM score, {source}", ylabel="density")
        ax.label_outer()
        ax.spines[["top", "right"]].set_visible(False)
        panels[source] = lines
        margin = result.scores.chosen[here] - result.scores.rejected[here]
        found.append(f"{source}: mean {result.scores.chosen[here].mean():+.2f} chosen, {result.scores.rejected[here].mean():+.2f} rejected, "
                     f"spread of their difference {margin.std():.2f}.")  # fmt: skip
    legend(axes[0, 0])
    claim = "No figure of the paper: on every tranche chosen replies should score above rejected ones."
    return finish(fig, path, claim, " ".join(found), panels)
