"""Curves of PPO runs: reward against samples and against sqrt(KL), their linear fit, and where train and test PM part."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from hhjax.analysis.figures import COLORS, Line, finish, shared_legend
from hhjax.analysis.runs import matches
from hhjax.io.metrics import read_rows

WINDOW = 11  # iterations that a point of a smoothed curve is a mean of


class Curve(NamedTuple):
    """One PPO run, an entry an iteration. scores: PM -> [N] mean score above the initial policy's; the first PM is the one
    that was trained on. spread: PM -> standard deviation of its scores of the initial policy's replies. label: what tells the
    run from others but for the seed. gold: what simulated annotators think, above the initial policy's; None without any."""

    dir: Path
    run: str
    label: str
    seed: int
    samples: np.ndarray
    sqrt_kl: np.ndarray
    scores: dict[str, np.ndarray]
    spread: dict[str, float]
    gold: np.ndarray | None = None


class Best(NamedTuple):
    """One BestOfN stage: n, sqrt(KL), and PM -> mean score above one sample's."""

    run: str
    ns: list[int]
    sqrt_kl: np.ndarray
    scores: dict[str, np.ndarray]


class Fit(NamedTuple):
    """score = intercept + slope * sqrt(KL), over the points up to `most`."""

    slope: float
    intercept: float
    r2: float
    most: float


def load_curves(index: Path, only: str = "*", stage: str = "*") -> tuple[list[Curve], list[Best]]:
    """PPO runs and rejection sampling of an experiment, of the runs and stages whose names match the globs.

    Raises ValueError where no PPO run has rows yet.
    """
    if not Path(index).is_file():
        raise ValueError(f"{index} is no experiment's index; give OUT/experiments/<experiment>.json")
    found, out = json.loads(Path(index).read_text()), Path(index).parent.parent
    curves, best = [], []
    for run, stages in found["runs"].items():
        called = {folder: name for name, folder in stages.items()}
        chosen = {name: folder for name, folder in stages.items() if fnmatch(run, only) and matches(name, stage)}
        policies = [name for name, folder in chosen.items() if folder.startswith("ppo/")]
        for name, folder in chosen.items():
            if folder.startswith("ppo/") and (rows := [r for r in read_rows(out / folder / "metrics.jsonl") if "score" in r]):
                curve = read_curve(out / folder, run, found["experiment"], rows, called)
                curves.append(curve._replace(run=f"{run}, {name}", label=f"{curve.label}, {name}") if len(policies) > 1 else curve)
            if folder.startswith("best_of_n/") and (out / folder / "evals" / "best_of_n.json").is_file():
                best.append(read_best(out / folder, run, called))
    if not curves:
        raise ValueError(f"no PPO run of {index} that matches {only!r}, {stage!r} has rows yet; run the experiment first")
    return curves, best


def read_curve(folder: Path, run: str, experiment: str, rows: list[dict], called: Mapping[str, str] = MappingProxyType({})) -> Curve:
    about = json.loads((folder / "config.json").read_text())
    config, names = about["config"], pm_names(about, called)
    column = lambda name: np.array([row[name] for row in rows], float)  # noqa: E731
    axes = ",".join(part for part in run.split(",") if "=" in part and not part.startswith("seed="))
    first = next(row for row in read_rows(folder / "metrics.jsonl") if "eval/score" in row)
    # The 10th and 90th percentiles of a normal distribution are 2.563 standard deviations apart.
    spread = {pm: (first[f"eval/{name}_p90"] - first[f"eval/{name}_p10"]) / 2.563 for name, pm in names.items()}
    gold = column("watch/gold") - first["eval/watch/gold"] if "watch/gold" in rows[0] else None
    return Curve(
        dir=folder, run=run, label=": ".join(filter(None, (experiment, axes))), seed=about["seed"], gold=gold,
        samples=config["batch_size"] * column("step"), sqrt_kl=column("sqrt_kl"),
        scores={pm: column(name) for name, pm in names.items()}, spread=spread,
    )  # fmt: skip


def pm_names(about: dict, called: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Metric -> name of its PM, the training PM first: its stage's in `called`, else the last part of its reference where that tells
    all apart. called: KIND/FOLDER -> the name in the run that is drawn, since a folder may have been made under another experiment's."""
    config, parents = about["config"], about.get("parents", {})
    refs = {"score": config["reward"]} | {f"test/{ref}": ref for ref in config["tests"]}
    place = lambda ref: "/".join(Path(parents.get(ref, ref)).parts[-2:])  # noqa: E731
    short = {name: called.get(place(ref), Path(ref).name) for name, ref in refs.items()}
    return short if len(set(short.values())) == len(refs) else {name: f"{name}: {ref}" for name, ref in refs.items()}


def read_best(folder: Path, run: str, called: Mapping[str, str] = MappingProxyType({})) -> Best:
    config, found = (json.loads((folder / n).read_text()) for n in ("config.json", "evals/best_of_n.json"))
    rows, names = found["rows"], pm_names(config, called)
    scores = {pm: np.array([row["scores"][{"score": "reward"}.get(name, name.removeprefix("test/"))]["mean"] for row in rows])
              for name, pm in names.items()}  # fmt: skip
    if "watch/gold" in rows[0]["scores"]:
        scores["gold"] = np.array([row["scores"]["watch/gold"]["mean"] for row in rows])
    return Best(run, [row["n"] for row in rows], np.sqrt([row["kl"] for row in rows]), scores)


def linear_fit(x, y, most: float = np.inf) -> Fit:
    """Least squares over the points with x <= most. R² is nan where y does not vary, and the slope too where x does not: a policy that
    has not moved. All is nan of fewer than three points."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    kept = x <= most
    if kept.sum() < 3:
        return Fit(*[float("nan")] * 4)
    x, y = x[kept], y[kept]
    slope, intercept = np.polyfit(x, y, 1) if np.ptp(x) > 0 else (np.nan, y.mean())
    spread = np.sum((y - y.mean()) ** 2)
    r2 = 1 - np.sum((y - intercept - slope * x) ** 2) / spread if spread else np.nan
    return Fit(float(slope), float(intercept), float(r2), float(x.max()))


def smoothed(x, window: int = WINDOW) -> np.ndarray:
    """Means over `window` neighbouring entries, fewer at the ends."""
    x = np.asarray(x, float)
    sums = np.concatenate([[0.0], np.cumsum(x)])
    at = np.arange(len(x))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(x))
    return (sums[high] - sums[low]) / (high - low)


class Peak(NamedTuple):
    """The highest point of a smoothed curve. turned: whether the curve ends lower by more than four standard errors
    of a difference of windows: the highest of many windows of noise alone is two above the rest."""

    x: float
    y: float
    end: float
    turned: bool


def find_peak(x, y, window: int = WINDOW) -> Peak:
    """Where means over `window` iterations are highest; x, y: [N], in the order of the iterations."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    means = smoothed(y, window)
    inside = slice(window // 2, len(y) - window // 2) if len(y) > window else slice(None)  # whole windows only
    at, last = int(np.argmax(means[inside])) + (inside.start or 0), (inside.stop or len(y)) - 1
    error = np.std(y - means) * (2 / min(window, len(y))) ** 0.5
    return Peak(float(smoothed(x, window)[at]), float(means[at]), float(means[last]), bool(means[at] - means[last] > 4 * error))


def gao_fit(x, y, most: float = np.inf) -> tuple[float, float, float]:
    """score = d (alpha - beta ln d) with d = sqrt(KL), the form of Gao et al. 2022 for the gold score under RL: (alpha, beta, R²), by least squares
    over points with 0 < d <= most. Raises ValueError on fewer than three."""
    d, y = np.asarray(x, float), np.asarray(y, float)
    kept = (d > 0) & (d <= most)
    if kept.sum() < 3:
        raise ValueError(f"{kept.sum()} points with 0 < sqrt(KL) <= {most} give no curve; choose a larger limit")
    d, y = d[kept], y[kept]
    columns = np.stack([d, -d * np.log(d)], 1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, y, rcond=None)
    spread = np.sum((y - y.mean()) ** 2)
    return float(alpha), float(beta), float(1 - np.sum((y - columns @ [alpha, beta]) ** 2) / spread) if spread else float("nan")


def parting(train, test, window: int = WINDOW, least: float = 0.25) -> int | None:
    """The iteration (from 0) from which on the training PM stands further up than the test PM, to the end.

    train, test: [N] mean scores, each over the standard deviation of its PM's scores of the initial policy's replies, since
    two PMs have two scales. Further: by `least`, in means of whole windows, above their difference in the first window.
    An effect and not a test of significance: at 64 samples an iteration the noise of a window is about 0.05. None: never.
    """
    gap = np.asarray(train, float) - np.asarray(test, float)
    whole = len(gap) // window
    means = gap[: whole * window].reshape(whole, window).mean(1)
    apart = means - means[:1] > least
    if not whole or not apart[-1]:
        return None
    return int((len(apart) - np.argmin(apart[::-1])) * window)


def reward_figure(curves: Sequence[Curve], best: Sequence[Best], path: Path, most: float = np.inf) -> str:
    """Figures 4, 13 and 33: scores on the training PM (solid) and the test PMs (dashed) against samples and sqrt(KL).

    A run that several experiments share is drawn once; the experiment's name is told where there are several. Curves are smoothed for
    the eye; fits, up to sqrt(KL) = most, are of the raw points of all seeds of a label.
    """
    groups = defaultdict(list)
    for curve in {curve.dir.resolve(): curve for curve in reversed(curves)}.values():
        groups[curve.label].insert(0, curve)
    several = len({label.partition(": ")[0] for label in groups if ": " in label}) > 1
    if not several:
        groups = {label.partition(": ")[2] or label: group for label, group in groups.items()}
    fig, axes = plt.subplots(1, 2, figsize=(10.5, 4.4), sharey=True)
    found, panels = [], {"samples": [], "sqrt_kl": []}
    for color, (label, group) in zip(COLORS * len(groups), groups.items()):
        for number, curve in enumerate(group):
            run = f"{label.partition(': ')[0]}: {curve.run}" if several else curve.run
            for style, (pm, score) in zip(("-", *["--", ":", "-."] * len(curve.scores)), curve.scores.items()):
                role = "train" if style == "-" else "test"
                name = f"{label}: {role} {pm}" if number == 0 else None
                for ax, x, panel in ((axes[0], curve.samples, "samples"), (axes[1], smoothed(curve.sqrt_kl), "sqrt_kl")):
                    ax.plot(x, smoothed(score), style, color=color, lw=1.3, alpha=0.8, label=name if panel == "samples" else None)
                    raw = curve.samples if panel == "samples" else curve.sqrt_kl
                    panels[panel].append(Line(f"{run}: {role} {pm}", raw, score, score, score))
            if curve.gold is not None:
                for ax, x, panel in ((axes[0], curve.samples, "samples"), (axes[1], smoothed(curve.sqrt_kl), "sqrt_kl")):
                    name = f"{label}: gold" if number == 0 and panel == "samples" else None
                    ax.plot(x, smoothed(curve.gold), color=color, lw=2.6, alpha=0.35, label=name)
                    raw = curve.samples if panel == "samples" else curve.sqrt_kl
                    panels[panel].append(Line(f"{run}: gold", raw, curve.gold, curve.gold, curve.gold))
        found.append(fits_in_words(label, group, axes[1], color, most))
    for number, stage in enumerate(best):
        for marker, (pm, score) in zip("os^Dv<>*" * len(stage.scores), stage.scores.items()):
            axes[1].plot(stage.sqrt_kl, score, marker, color="black", mfc="none", ms=5, ls="none",
                         label=f"best of n, {pm}" if number == 0 else None)  # fmt: skip
            panels["sqrt_kl"].append(Line(f"{stage.run}: best of n, {pm}", stage.sqrt_kl, score, score, score))
        found.append(f"Best of {stage.ns[-1]} gains {', '.join(f'{s[-1]:+.2f} on {pm}' for pm, s in stage.scores.items())} "
                     f"at sqrt(KL) {stage.sqrt_kl[-1]:.2f}.")  # fmt: skip
    axes[0].set(xlabel="samples", ylabel=f"PM score above the initial policy's\n(means of {WINDOW} iterations)")
    axes[1].set(xlabel=r"$\sqrt{D_{KL}(\pi \| \pi_0)}$, $\sqrt{nats}$ (thin lines: fits on train)")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    claim = "Paper (Figs. 4, 13): reward grows about linearly in sqrt(KL); train and test PMs agree at first, then part."
    claim += " (Fig. 36): the best of 1, 4, 16, 64 replies has a helpful Elo of 0, 150, 235, 260." if best else ""
    return finish(fig, path, claim, " ".join(found), panels, shared_legend(fig, axes))


def fits_in_words(label: str, group: Sequence[Curve], ax, color: str, most: float) -> str:
    """The fit on the training PM and each test PM over all seeds of a label, drawn, and where train and test part."""
    x = np.concatenate([c.sqrt_kl for c in group])
    parts = []
    for number, pm in enumerate(group[0].scores):
        fit = linear_fit(x, np.concatenate([c.scores[pm] for c in group]), most)
        if number == 0:
            ends = np.array([0, fit.most])
            ax.plot(ends, fit.intercept + fit.slope * ends, color=color, lw=0.8, alpha=0.5)
        line = "no line" if np.isnan(fit.slope) else f"{fit.intercept:+.2f} {fit.slope:+.2f} sqrt(KL), R² {fit.r2:.2f}"
        parts.append(f"{'test' if number else 'train'} {pm}: {line}")
    if group[0].gold is not None and np.sum((x > 0) & (x <= most)) >= 3:
        alpha, beta, r2 = gao_fit(x, np.concatenate([c.gold for c in group]), most)
        parts.append(f"gold d({alpha:.2f} {-beta:+.2f} ln d) with d = sqrt(KL), R² {r2:.2f}")
    for c in group:
        if c.gold is not None:
            peak = find_peak(c.sqrt_kl, c.gold)
            parts.append(f"gold {peak.y:+.2f} at sqrt(KL) {peak.x:.2f}, {peak.end:+.2f} at the end"
                         + ("" if peak.turned else ", no clear turn"))  # fmt: skip
    train, *tests = group[0].scores
    parts += [partings_in_words("test" if len(tests) == 1 else test, [parting_kl(c, train, test) for c in group]) for test in tests]
    seeds = f" ({len(group)} seeds)" if len(group) > 1 else ""
    return f"{label}{seeds}, sqrt(KL) up to {min(most, x.max()):.1f}: {'; '.join(parts)}."


def parting_kl(curve: Curve, train: str, test: str) -> float | None:
    """The sqrt(KL) at which two PMs part, each in the standard deviations of its scores of the initial policy's replies; None: never."""
    at = parting(*(curve.scores[pm] / curve.spread[pm] for pm in (train, test)))
    return None if at is None else float(smoothed(curve.sqrt_kl)[at])


def partings_in_words(test: str, found: Sequence[float | None]) -> str:
    """Where the training PM and a test PM part, a number a seed."""
    if all(at is None for at in found):
        return f"train and {test} do not part"
    return f"train and {test} part at sqrt(KL) {', '.join('never' if at is None else f'{at:.2f}' for at in found)}"
