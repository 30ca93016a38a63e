"""Elo of policies along their training, beside what their preference models would have guessed. No jax."""

import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from hhjax.analysis.figures import Line, draw, estimate_line, finish
from hhjax.analysis.runs import finished_stages
from hhjax.analysis.stats import Estimate, over_seeds

CLAIM = ("Paper (Figs. 16 and 35): comparisons from rejection sampling and online rounds raise Elo above a control with as many of "
         "the first tranche; a PM's own scores, turned into Elo, promise more than people find.")  # fmt: skip


class Rated(NamedTuple):
    """A snapshot of a PPO run as an Elo stage found it. samples: what it was trained on by then. elo, guess: above the
    anchor, by raters and by the PM it was trained on, None where the stage did not ask that; perfect: the guess of raters' own gold.
    stage: the name of the Elo stage's folder."""

    policy: str
    samples: int
    elo: Estimate
    guess: Estimate | None
    perfect: Estimate
    stage: str = ""


def load_ratings(index: Path, only: str = "*", stage: str = "*") -> list[list[Rated]]:
    """The PPO snapshots of every finished Elo stage of an experiment. Raises ValueError where there is none."""
    found = [read_ratings(folder) for _, _, folder in finished_stages(index, "elo", only, stage)]
    if not any(found):
        raise ValueError(f"no Elo stage of {index} that matches {only!r} rates snapshots of PPO")
    return found


def read_ratings(folder: Path) -> list[Rated]:
    """The rows of evals/elo.json whose policies are PPO runs, in their order."""
    found, rated = json.loads((folder / "evals" / "elo.json").read_text()), []
    for row in found["rows"]:
        if row["reward"]:
            guess = row["guesses"].get(row["reward"])
            elo = Estimate(row["elo"], row["low"], row["high"], row["played"], found["prompts"])
            gold = Estimate(**row["guesses"]["gold"])
            rated.append(Rated(row["policy"].partition("@")[0], row["samples"], elo, guess and Estimate(**guess), gold, folder.name))
    return rated


def elo_figure(seeds: Sequence[Sequence[Rated]], path: Path) -> str:
    """Figures 16 and 35: Elo by raters, as the training PM guesses it and as gold would, against samples, a line a policy.

    Points are means over seeds and bars reach from the lowest to the highest; of one seed, its 95 % interval over prompts. A snapshot
    without a finite rating and interval is left out, and said to be.
    """
    groups = defaultdict(lambda: defaultdict(list))
    left_out = {f"{r.policy} at {r.samples:,}" for each in seeds for r in each if not np.isfinite(r.elo[:3]).all()}
    for rated in (r for each in seeds for r in each if np.isfinite(r.elo[:3]).all()):
        groups[rated.policy][rated.samples].append(rated)
    if not groups:
        raise ValueError("no snapshot has a finite rating: let each win and lose by rating on more prompts")
    panels = {"raters": "Elo by raters", "guess": "as the training PM guesses it", "perfect": "as gold would guess it"}
    lines = {what: [line_of(policy, by_samples, "elo" if what == "raters" else what) for policy, by_samples in groups.items()
                    if what != "guess" or all(r.guess for several in by_samples.values() for r in several)] for what in panels}  # fmt: skip
    fig, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    for ax, (what, label) in zip(axes, panels.items()):
        draw(ax, lines[what], "PPO samples", label)
        ax.axhline(0, color="#999999", lw=0.8, ls=":")
    said = [ending(line, *({other.label: other for other in lines[what]}.get(line.label) for what in ("guess", "perfect")))
            for line in lines["raters"]]  # fmt: skip
    said += [difference(one, other, groups) for one, other in itertools.pairwise(groups)]
    said += [f"without a finite rating and left out: {', '.join(sorted(left_out))}"] if left_out else []
    of = f"means of {len(seeds)} seeds, bars their range" if len(seeds) > 1 else "one seed"
    found = f"Elo at the end, {of}: {'; '.join(said)}."
    return finish(fig, path, CLAIM, found, lines)


def line_of(policy: str, by_samples: dict[int, list[Rated]], what: str) -> Line:
    """A policy's line from the untrained model on, which is the anchor."""
    found = {0: Estimate(0.0, 0.0, 0.0, 0, 0)}
    found |= {samples: over_seeds([getattr(rated, what) for rated in by_samples[samples]]) for samples in sorted(by_samples)}
    return estimate_line(policy, found, list(found.values()))


def ending(line: Line, guess: Line | None, perfect: Line) -> str:
    """A policy's last rating and what was guessed of it, in words."""
    guessed = f", its PM guesses {guess.y[-1]:+.0f}" if guess else ""
    interval = f"[{line.low[-1]:+.0f}, {line.high[-1]:+.0f}]"
    return f"{line.label} {line.y[-1]:+.0f} {interval} (highest {max(line.y):+.0f}{guessed}, gold {perfect.y[-1]:+.0f})"


def difference(one: str, other: str, groups) -> str:
    """How far the first policy is above the second, in each Elo stage that rates both, after the most samples that both have."""
    ratings = lambda policy, samples: {r.stage: r.elo.value for r in groups[policy].get(samples, ())}  # noqa: E731
    shared = {samples: set(ratings(one, samples)) & set(ratings(other, samples)) for samples in groups[one]}
    samples = max((n for n, stages in shared.items() if stages), default=None)
    if samples is None:
        return f"{one} and {other} have no number of samples in common"
    apart = [ratings(one, samples)[stage] - ratings(other, samples)[stage] for stage in ratings(one, samples) if stage in shared[samples]]
    several = f" (seeds {', '.join(f'{x:+.0f}' for x in apart)})" if len(apart) > 1 else ""
    return f"{one} above {other} by {np.mean(apart):+.0f} at {samples:,} samples{several}"
