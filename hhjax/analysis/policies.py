"""Figures of what policies do and know: behaviours, capabilities, out-of-distribution scores, scores by tranche. No jax."""

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from hhjax.analysis.figures import COLORS, Line, estimate_line, finish, legend
from hhjax.analysis.runs import Result, finished_stages, without_seed
from hhjax.analysis.stats import Estimate, over_seeds, paired_difference
from hhjax.io.metrics import read_rows

WATCHED = "watch/"


class Shares(NamedTuple):
    """What a policy does: behaviour -> share of its replies to the held-out prompts that it applies to, and how many those are."""

    label: str
    shares: dict[str, float]
    prompts: dict[str, int]


def read_shares(folder: Path, label: str, last: bool = True) -> Shares:
    """Of the replies to held-out prompts at a PPO run's last look, or at its first, which are the initial policy's."""
    looks = sorted((folder / "samples").glob("*.jsonl"))
    rows = read_rows(looks[-1 if last else 0]) if looks else []
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(WATCHED))
    said = {name.removeprefix(WATCHED): [row[name] for row in rows if row.get(name) is not None] for name in names}
    if not said:
        raise ValueError(f"{folder} has no look that was watched; give the PPO stage a `watch` and finish it")
    return Shares(label, {name: float(np.mean(x)) for name, x in said.items()}, {name: len(x) for name, x in said.items()})


def load_shares(index: Path, only: str = "*", stage: str = "*") -> list[Shares]:
    """The first look of an experiment's first PPO run, called "before", and the last one of each, called by what is varied and, where a
    run has several, by the stage."""
    found = finished_stages(index, "ppo", only, stage)
    several = len({name for _, name, _ in found}) > 1
    labels = [" ".join(filter(None, (without_seed(run), name * several))) or name for run, name, _ in found]
    return [read_shares(found[0][2], "before", last=False), *(read_shares(folder, label) for label, (_, _, folder) in zip(labels, found))]


def behaviour_figure(policies: Sequence[Shares], kinds: Mapping[str, Sequence[str]], path: Path) -> str:
    """A group of bars a policy and a panel a kind of request: how often it does what.

    policies of one label are seeds. kinds: kind -> behaviours; the share of behaviour b to requests of kind k is called k_b. Bars are
    95 % intervals (Wilson), or the range of the seeds. A kind that not all
    were asked is left out.
    """
    groups = by_label(policies, lambda p: p.label)
    kinds = {kind: bs for kind, bs in kinds.items() if all(f"{kind}_{b}" in p.shares for p in policies for b in bs)}
    if not kinds:
        raise ValueError("no kind of request was put to all of these policies; choose some with --only")
    fig, axes = plt.subplots(len(kinds), 1, figsize=(10, 2.7 * len(kinds)), squeeze=False)
    panels, said = {}, defaultdict(list)
    for ax, (kind, behaviours) in zip(axes[:, 0], kinds.items()):
        wide, lines = 0.8 / len(groups), []
        for number, (color, (label, seeds)) in enumerate(zip(COLORS * len(groups), groups.items())):
            shares = {b: over_seeds([wilson(p.shares[f"{kind}_{b}"], p.prompts[f"{kind}_{b}"]) for p in seeds]) for b in behaviours}
            line = estimate_line(label, range(len(behaviours)), list(shares.values()))
            at = np.arange(len(behaviours)) + (number - (len(groups) - 1) / 2) * wide
            ends = [np.abs(np.subtract(end, line.y)) for end in (line.low, line.high)]
            ax.bar(at, line.y, wide * 0.92, color=color, label=label, yerr=ends, error_kw={"elinewidth": 0.8, "alpha": 0.5})
            lines.append(line)
            top = sorted(behaviours, key=lambda b: -shares[b].value)[:2]
            said[label].append(f"{kind} " + " and ".join(f"{shares[b].value:.0%} {b}" for b in top))
        ax.set_xticks(range(len(behaviours)), behaviours)
        ax.set(ylabel=f"share of replies to\n{kind} requests", ylim=(0, 1))
        ax.spines[["top", "right"]].set_visible(False)
        panels[kind] = lines
    legend(axes[0, 0])
    found = " ".join(f"{label}: {', '.join(parts)}." for label, parts in said.items()) + seeds_in_words(groups)
    claim = ("Paper (section 4.4, Fig. 1): harmlessness is over-optimised before helpfulness, which makes policies evasive unless helpful "
             "prompts have a larger share; policies of helpfulness alone are easier to red-team.")  # fmt: skip
    return finish(fig, path, claim, found, panels)


def by_label(items, key) -> dict:
    """key(item) -> the items of it, in the order of their first."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def seeds_in_words(groups: Mapping) -> str:
    """What a caption adds where some of its points are of several seeds. groups: label -> seeds."""
    several = {label: len(seeds) for label, seeds in groups.items() if len(seeds) > 1}
    if not several:
        return ""
    named = ", ".join(f"{' '.join(label) if isinstance(label, tuple) else label} {count}" for label, count in several.items())
    return f" Means of several seeds, bars their range ({named}); one run elsewhere, bars its 95 % interval."


def wilson(share: float, n: int) -> Estimate:
    """A share of n with its 95 % interval."""
    z = 1.96
    middle, half = (share + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return Estimate(share, min(share, middle - half), max(share, middle + half), n, n)  # at 0 and 1 but for rounding


class Grades(NamedTuple):
    """An exam. rows: {"subject", "shots", "questions", "accuracy", "nats", "right", "each_nats"} each; sheet: where its questions lie."""

    size: str
    policy: str
    rows: list[dict]
    sheet: str = ""


def read_grades(folder: Path, size: str, policy: str) -> Grades:
    """An Exam folder. Raises ValueError where it is not finished."""
    path = folder / "evals" / "exam.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no evals/exam.json; finish that stage with `hhjax run` first")
    about = json.loads((folder / "config.json").read_text())
    return Grades(size, policy, json.loads(path.read_text())["rows"], about["parents"][about["config"]["data"]])


def load_exams(index: Path, only: str = "*", stage: str = "*") -> list[Grades]:
    """An experiment's exams, "before" of language models and "after" of PPO runs."""
    found = []
    for _, _, folder in finished_stages(index, "exam", only, stage):
        about = json.loads((folder / "config.json").read_text())
        kind = Path(about["parents"][about["config"]["of"]]).parent.name
        found.append(read_grades(folder, about["size"], "after" if kind == "ppo" else "before"))
    return sorted(found, key=lambda e: (e.size, e.policy == "after"))


def tax_figure(exams: Sequence[Grades], path: Path) -> str:
    """Figure 3: accuracy before and after RLHF by size, zero- and few-shot, a row a subject; with the nats of the right options.

    Exams of one size and policy are seeds. Subjects in which every exam has everything right are named and not drawn, unless that is all.
    """
    groups = by_label(exams, lambda e: (e.size, e.policy))
    sizes, kinds = list(dict.fromkeys(size for size, _ in groups)), list(dict.fromkeys(policy for _, policy in groups))
    all_shots = sorted({row["shots"] for e in exams for row in e.rows})
    subjects = list(dict.fromkeys(row["subject"] for e in exams for row in e.rows))
    full = [s for s in subjects if all(row["accuracy"] == 1 for e in exams for row in e.rows if row["subject"] == s)]
    drawn = [s for s in subjects if s not in full] or subjects
    shape = len(drawn), len(all_shots)
    fig, axes = plt.subplots(*shape, figsize=(5 * shape[1], 0.8 + 2.8 * shape[0]), sharex=True, sharey=True, squeeze=False)
    panels, found = {}, []
    for ax, (subject, shots) in zip(axes.flat, itertools.product(drawn, all_shots)):
        lines = []
        for color, policy in zip(COLORS * len(kinds), kinds):
            rows = {size: rows_of(groups.get((size, policy), ()), subject, shots) for size in sizes}
            rows = {size: several for size, several in rows.items() if several}
            estimates = [over_seeds([wilson(row["accuracy"], row["questions"]) for row in several]) for several in rows.values()]
            line = estimate_line(policy, [sizes.index(size) for size in rows], estimates)
            aside = np.add(line.x, 0.03 * (kinds.index(policy) - (len(kinds) - 1) / 2))  # bars beside each other
            bars = [np.subtract(line.y, line.low), np.subtract(line.high, line.y)]
            ax.errorbar(aside, line.y, bars, color=color, marker="o", ms=4, lw=1.4, label=policy)
            lines.append(line)
            found += [f"{subject}, {size} {policy}, {shots} shots: {e.value:.3f} ({np.mean([row['nats'] for row in several]):.3f} nats)"
                      for (size, several), e in zip(rows.items(), estimates)]  # fmt: skip
        ax.set_xticks(range(len(sizes)), sizes)
        ax.set(xlabel=f"policy, {shots} shots", ylabel=f"accuracy, {subject}")
        ax.label_outer()
        ax.spines[["top", "right"]].set_visible(False)
        panels[f"{subject}, {shots} shots"] = lines
    legend(axes[0, 0])
    claim = "Paper (Fig. 3): RLHF costs small models some capability (an alignment tax) and gives large ones some (a bonus)."
    room = f"Every question of {', '.join(full)} is answered by every model, so that there is no room for a tax. " if full else ""
    said = changes_in_words(list(changes(groups, sizes, drawn, all_shots)))
    return finish(fig, path, claim, room + said + "; ".join(found) + "." + seeds_in_words(groups), panels)


def changes_in_words(found: Sequence[tuple[str, Estimate, Estimate]]) -> str:
    """What of `changes` an interval tells from 0, and the changes themselves; "" where there are none."""
    if not found:
        return ""
    clear = [f"{where} {e.value:+.3f}" for where, e, _ in found if e.low > 0 or e.high < 0]
    named = f" ({', '.join(clear)})" if clear else ""
    nats = [e.value for *_, e in found]
    told = lambda e: f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"  # noqa: E731
    listed = "; ".join(f"{where} {told(a)}, {told(n)} nats" for where, a, n in found)
    return (f"RLHF changes accuracy beyond its interval in {len(clear)} of {len(found)} comparisons{named}, and the right option's nats by "
            f"{min(nats):+.2f} to {max(nats):+.2f}. After minus before on the same questions, 95 % intervals over them: {listed}. ")  # fmt: skip


def changes(groups: Mapping, sizes: Sequence[str], subjects: Sequence[str], all_shots: Sequence[int]):
    """What RLHF changes: (size, subject and shots in words, accuracy, nats of the right option), with 95 % intervals. Differences are
    paired by question, each the mean of the seeds that were asked it. Exams that did not keep the nats of every answer have none."""
    for size, subject, shots in itertools.product(sizes, subjects, all_shots):
        before, after = (by_sheet(groups.get((size, policy), ()), subject, shots) for policy in ("before", "after"))
        if both := [sheet for sheet in before if sheet in after]:
            estimates = []
            for name in ("right", "each_nats"):
                a, b = (np.concatenate([np.mean([row[name] for row in rows[sheet]], 0) for sheet in both]) for rows in (after, before))
                estimates.append(paired_difference(a, b, np.arange(len(a)))[0])
            yield f"{subject}, {size}, {shots} shots", *estimates


def by_sheet(exams: Sequence[Grades], subject: str, shots: int) -> dict[str, list[dict]]:
    """`rows_of` those exams that kept the nats of every answer, by where their questions lie."""
    kept = {sheet: rows_of(same, subject, shots) for sheet, same in by_label(exams, lambda e: e.sheet).items()}
    return {sheet: rows for sheet, rows in kept.items() if rows and all("each_nats" in row for row in rows)}


def rows_of(exams: Sequence[Grades], subject: str, shots: int) -> list[dict]:
    """What those exams that asked so found on a subject with that many solved questions before each."""
    return [row for exam in exams for row in exam.rows if (row["subject"], row["shots"]) == (subject, shots)]


def read_detection(folder: Path) -> dict:
    """A Detect folder's scores and AUROCs. Raises ValueError where it is not finished."""
    if not (folder / "evals" / "detect.json").is_file():
        raise ValueError(f"{folder} has no evals/detect.json; finish that stage with `hhjax run` first")
    return json.loads((folder / "evals" / "detect.json").read_text())


def load_detections(index: Path, only: str = "*", stage: str = "*") -> list[dict]:
    """An experiment's Detect stages."""
    return [read_detection(folder) for _, _, folder in finished_stages(index, "detect", only, stage)]


def detection_figure(draws: Sequence[dict], path: Path) -> str:
    """Figure 22: scores of inside and outside prompts (of the first stage), and AUROC by method.

    draws: Detect stages of one model that differ in noise or split, and in what probes are shown. Bars are the standard deviation over them, of one
    stage over the draws of what a probe is shown.
    """
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    scores = draws[0]["scores"]["relative_mahalanobis"]
    low, high = np.percentile([*scores["inside"], *scores["outside"]], [0.5, 98])
    for color, side in zip(COLORS, ("inside", "outside")):
        axes[0].hist(np.clip(scores[side], low, high), bins=np.linspace(low, high, 40), color=color, alpha=0.55, label=side)
    axes[0].set(xlabel="simplified relative Mahalanobis score", ylabel="prompts")
    means_of = lambda name: [float(np.mean(found["auroc"][name])) for found in draws]  # noqa: E731
    drawn = {name: means_of(name) if len(draws) > 1 else values for name, values in draws[0]["auroc"].items()}
    means = [float(np.mean(values)) for values in drawn.values()]
    spread = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in drawn.values()]
    axes[1].barh([n.replace("_", " ") for n in drawn], means, xerr=spread, color=COLORS[0])
    axes[1].set(xlabel="AUROC", xlim=(0.4, 1))
    axes[1].axvline(0.5, color="#999999", lw=0.8, ls=":")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    legend(axes[0])
    line = Line("auroc", range(len(means)), means, np.subtract(means, spread), np.add(means, spread))
    said = "AUROC " + ", ".join(f"{n.replace('_', ' ')} {m:.3f}" for n, m in zip(drawn, means)) + "."
    claim = ("Paper (Fig. 22, section B.9): the simplified relative score beats the plain Mahalanobis distance (0.85 at 52B, middle "
             "layers); ten harmful examples bring 0.94.")  # fmt: skip
    said += f" One model, {len(draws)} draws of noise or of the split, bars their standard deviation." if len(draws) > 1 else ""
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
