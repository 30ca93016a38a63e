"""Figures of preference modelling, each as PNG and CSV with the paper's claim beside what was found. No jax."""

import csv
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")  # figures are files
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.transforms import ScaledTranslation  # noqa: E402

from hhjax.analysis.runs import Result, alike, require_alike  # noqa: E402
from hhjax.analysis.scores import pooled  # noqa: E402
from hhjax.analysis.stats import (  # noqa: E402
    Estimate, calibration_error, confidence_bins, correct, log_linear_fit, mean_estimate, win_probability,
)  # fmt: skip

COLORS = ("#1f5a8c", "#c8501e", "#3d8a4e", "#8457a6", "#a67c00", "#5b5b5b")


class Line(NamedTuple):
    """A curve with an interval at each point; all of one length."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def estimate_line(label: str, x, estimates: Sequence[Estimate]) -> Line:
    return Line(label, list(x), *([getattr(e, name) for e in estimates] for name in ("value", "low", "high")))


def by(results: Sequence[Result], key) -> dict:
    """key(result) -> the pooled scores of those results (seeds, folds), in the order of the keys."""
    groups = defaultdict(list)
    for r in results:
        groups[key(r)].append(r.scores)
    return {k: pooled(groups[k]) for k in sorted(groups)}


def accuracy_figure(results: Sequence[Result], path: Path) -> str:
    """Figure 7: accuracy against the number of comparisons (a line a size) and against parameters (a line a number).

    Where the evaluations say what the labels' noise leaves to be had (`bayes`, of simulated raters), a line shows it.
    """
    require_alike(results)
    scores = by(results, lambda r: (r.about["parameters"], r.about["comparisons"]))
    names = {r.about["parameters"]: r.about["size"] for r in results}
    sizes, amounts = ([*dict.fromkeys(sorted(k[i] for k in scores))] for i in (0, 1))
    by_amount = [
        estimate_line(names[s], [d for d in amounts if (s, d) in scores], [accuracy(scores[s, d]) for d in amounts if (s, d) in scores])
        for s in sizes
    ]
    by_size = [
        estimate_line(f"{d:,} pairs", [s for s in sizes if (s, d) in scores], [accuracy(scores[s, d]) for s in sizes if (s, d) in scores])
        for d in amounts
    ]
    biggest, most = by_amount[-1], by_size[-1]
    found = [trend(biggest, "comparisons", f"the {biggest.label} model"), trend(most, "parameters", most.label)]
    limits = [r.about["bayes"] for r in results if r.about.get("bayes")]
    best = float(np.mean(limits)) if limits else None
    if best is not None:
        found.append(f"The raters' noise leaves {best:.3f} (dashed): the best model is {best - max(max(line.y) for line in by_amount):.3f} below.")
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for ax, lines, label in zip(axes, (by_amount, by_size), ("comparisons", "parameters without embeddings")):
        draw(ax, lines, label, "test accuracy")
        chance(ax)
        if best is not None:
            ax.axhline(best, color="black", lw=0.9, ls="--")
        ax.label_outer()
    log_axis(axes[0], amounts, [f"{n:,}" for n in amounts])
    log_axis(axes[1], sizes, [names[s] for s in sizes])
    claim = "Paper (Fig. 7): accuracy grows about linearly in the logarithm of data and of model size."
    return finish(fig, path, claim, " ".join(found), {"comparisons": by_amount, "parameters": by_size})


def mixture_figure(results: Sequence[Result], path: Path) -> str:
    """Figures 19 and 26: accuracy on each kind of test, and their mean, against the harmless share of training.

    Raises ValueError where models of one size and share were trained on different numbers of pairs.
    """
    lines, means, found = [], [], []
    for kind in alike(results):
        if ", about " in kind:
            stages = ", ".join(dict.fromkeys(r.stage for r in results))
            raise ValueError(f"these models differ in more than their mixture: {kind}, among others; choose some with --only or --stage, of {stages}")
    for (_, name), group in _grouped(results, lambda r: (r.about["parameters"], r.about["size"])).items():
        scores = by(group, lambda r: round(sum(share for source, share in r.about["shares"].items() if source.startswith("harmless")), 2))
        shares = [100 * s for s in scores]
        kinds = {}
        for kind in ("helpful", "harmless"):
            points = [accuracy(p.only(np.char.startswith(p.source, kind))) for p in scores.values()]
            kinds[kind] = estimate_line(f"{name} on {kind}", shares, points)
        lines += kinds.values()
        means.append(estimate_line(f"{name}, both tests", shares, [mean_over_kinds(p) for p in scores.values()]))
        at = lambda share: [f"{kinds[kind].y[shares.index(share)]:.3f}" for kind in kinds]  # noqa: B023, E731
        alone = {"helpfulness": 0, "harmlessness": 100}
        said = [f"trained on {what} alone {' on helpful and '.join(at(share))} on harmless comparisons" for what, share in alone.items() if share in shares]
        best = int(np.argmax(means[-1].y))
        found.append(f"{name}: {'; '.join([*said, f'best mean {means[-1].y[best]:.3f} at {shares[best]:.0f} % harmless'])}.")
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for ax, drawn in zip(axes, (lines, means)):
        draw(ax, drawn, "harmless share of training pairs, %", "test accuracy")
        chance(ax)
        ax.label_outer()
    claim = "Paper (Figs. 19, 26): trained on one kind alone, far below chance on the other; mixtures are good at both."
    return finish(fig, path, claim, " ".join(found), {"kind": lines, "mean": means})


def calibration_figure(results: Sequence[Result], path: Path, bins: int = 10) -> str:
    """Figure 9: accuracy against score difference, beside 1/(1+exp(-difference))."""
    require_alike(results)
    everything = pooled([r.scores for r in results])
    lines, found = [], []
    for source in dict.fromkeys(everything.source.tolist()):
        part = everything.only(everything.source == source)
        points = [part.only(rows) for rows in confidence_bins(part.margin, bins)]
        lines.append(estimate_line(source, [np.abs(p.margin).mean() for p in points], [accuracy(p) for p in points]))
        confidence = win_probability(np.abs(part.margin)).mean()
        gap = correct(part.margin).mean() - confidence
        word = "under" if gap > 0 else "over"
        error = calibration_error(part.margin, bins)
        found.append(f"{source}: calibration error {error:.3f}, {word}-confident by {abs(gap):.3f} on average.")
    fig, ax = plt.subplots(figsize=(5.6, 4.4))
    draw(ax, lines, "|score difference|", "accuracy")
    x = np.linspace(0, max(max(line.x) for line in lines), 100)
    ax.plot(x, win_probability(x), color="black", ls="--", lw=1, label=r"$1/(1+e^{-\Delta})$")
    legend(ax)
    claim = "Paper (Fig. 9): helpful-only models are well calibrated, models of the mixture slightly under-confident."
    return finish(fig, path, claim, " ".join(found), {"difference": lines})


def turn_figure(results: Sequence[Result], path: Path, most_turns: int = 6) -> str:
    """Figure 8: accuracy and number of test pairs by turn of the dialogue (that many turns and more at the end)."""
    require_alike(results)
    everything = pooled([r.scores for r in results])
    turn = np.minimum(everything.turns, most_turns)
    lines = []
    for source in [*dict.fromkeys(everything.source.tolist()), "all"]:
        here = (everything.source == source) | (source == "all")
        turns = [t for t in range(1, most_turns + 1) if np.sum(here & (turn == t)) >= 20]
        lines.append(estimate_line(source, turns, [accuracy(everything.only(here & (turn == t))) for t in turns]))
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    counts = [int(np.sum(turn == t)) for t in range(1, most_turns + 1)]
    axes[0].bar(range(1, most_turns + 1), counts, color=COLORS[0])
    axes[0].set(xlabel="turn", ylabel="test pairs")
    draw(axes[1], lines, "turn", "test accuracy")
    chance(axes[1])
    for ax in axes:
        ax.set_xticks(range(1, most_turns + 1), [*map(str, range(1, most_turns)), f"{most_turns}+"])
        ax.spines[["top", "right"]].set_visible(False)
    first, later = (accuracy_in_words(everything.only(rows)) for rows in (turn == 1, turn > 1))
    found = f"First turn {first}, later turns {later}."
    claim = "Paper (Fig. 8): the first turn is two to four points easier, later turns are alike."
    return finish(fig, path, claim, found, {"turn": lines})


# Helpers --------------------------------------------------------------------------------------------------------------


def accuracy_in_words(scores) -> str:
    """Accuracy with its interval, or that there is nothing to take it of."""
    return str(accuracy(scores)) if len(scores.source) else "no pairs"


def accuracy(scores) -> Estimate:
    return mean_estimate(correct(scores.margin), scores.opening)


def mean_over_kinds(scores) -> Estimate:
    """The mean of the sources' accuracies, in spite of unequal tests."""
    _, kind, count = np.unique(scores.source, return_inverse=True, return_counts=True)
    weight = len(kind) / (len(count) * count[kind])
    return mean_estimate(weight * correct(scores.margin), scores.opening)


def trend(line: Line, what: str, who: str) -> str:
    """One sentence about a line: its ends, and the slope a factor of ten in x (R² where it says anything)."""
    if len(line.x) < 2:
        return f"{who}: {line.y[0]:.3f} [{line.low[0]:.3f}, {line.high[0]:.3f}]."
    _, slope, r2 = log_linear_fit(line.x, line.y)
    fit = f"{slope * np.log(10):+.3f} a factor of ten" + (f", R² {r2:.2f}" if len(line.x) > 2 else "")
    return f"{who}: {line.y[0]:.3f} at {line.x[0]:,} {what}, {line.y[-1]:.3f} at {line.x[-1]:,} ({fit})."


def draw(ax, lines: Sequence[Line], xlabel: str, ylabel: str) -> None:
    """Lines with pale interval bars, a few points apart where they share an x."""
    for number, (color, line) in enumerate(zip(COLORS * len(lines), lines)):
        low, high = np.subtract(line.y, line.low), np.subtract(line.high, line.y)
        bars = ax.errorbar(line.x, line.y, yerr=[low, high], fmt="none", color=color, elinewidth=1.2, alpha=0.45)
        curve = ax.plot(line.x, line.y, color=color, marker="o", ms=4, lw=1.4, label=line.label)
        aside = ScaledTranslation((number - (len(lines) - 1) / 2) * 3 / 72, 0, ax.figure.dpi_scale_trans)
        for artist in (*bars.get_children(), *curve):  # moved once drawn: limits come from the data
            artist.set_transform(ax.transData + aside)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    legend(ax)


def legend(ax) -> None:
    """Above the axes, where no interval is."""
    ax.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)


def chance(ax) -> None:
    ax.axhline(0.5, color="#999999", lw=0.8, ls=":")


def log_axis(ax, ticks: Sequence[int], labels: Sequence[str]) -> None:
    """A logarithmic x axis with a tick at each point that was measured."""
    ax.set_xscale("log")
    ax.set_xticks(ticks, labels)
    ax.minorticks_off()


def shared_legend(fig, axes) -> float:
    """One legend above all axes, each label once, in as many columns as fit; returns the `top` that it leaves to the axes, for `finish`."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    inches = 0.6 + 0.06 * max(map(len, handles))  # a line, and a text of 8 points
    columns = max(1, min(3, int(fig.get_size_inches()[0] / inches)))
    fig.legend(handles.values(), handles, fontsize=8, frameon=False, loc="upper center", ncols=columns).set_in_layout(False)
    return 1 - 0.2 * -(-len(handles) // columns) / fig.get_size_inches()[1]


def finish(fig, path: Path, claim: str, found: str, panels: dict[str, Sequence[Line]], top: float = 1.0) -> str:
    """Writes path.png, with claim and finding below the axes; path.svg and path.txt, the two apart; and path.csv. Returns what
    was found, in words. top: where the axes end, below a shared legend."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.tight_layout(rect=(0, 0, 1, top))
    fig.savefig(beside(path, ".svg"))
    beside(path, ".txt").write_text(f"{claim}\nHere: {found}\n")
    width, height = fig.get_size_inches()
    columns = int(width * 17)  # of 7.5 point text
    text = [line for part in (claim, f"Here: {found}") for line in textwrap.wrap(part, columns, break_on_hyphens=False)]
    room = len(text) * 7.5 * 1.35 / 72 + 0.1  # inches
    fig.set_size_inches(width, height + room)
    fig.text(0.1 / width, 0.06 / (height + room), "\n".join(text), fontsize=7.5, va="bottom", linespacing=1.3)
    fig.tight_layout(rect=(0, room / (height + room), 1, (room + top * height) / (height + room)))
    fig.savefig(beside(path, ".png"), dpi=130)
    plt.close(fig)
    with open(beside(path, ".csv"), "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(("panel", "line", "x", "y", "low", "high"))
        for panel, lines in panels.items():
            writer.writerows((panel, line.label, *map(float, point)) for line in lines for point in zip(*line[1:]))
    return found


def beside(figure: Path, suffix: str) -> Path:
    """A figure's file of this kind. Names may hold dots, as run directories' do."""
    return figure.with_name(figure.name + suffix)


def _grouped(results, key) -> dict:
    groups = defaultdict(list)
    for r in results:
        groups[key(r)].append(r)
    return dict(sorted(groups.items()))
