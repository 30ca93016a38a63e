"""Elo of policies along their training, beside what their preference models would have guessed. No jax."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt

from hhjax.analysis.figures import Line, draw, estimate_line, finish
from hhjax.analysis.runs import find_stages
from hhjax.analysis.stats import Estimate, over_seeds

CLAIM = ("Paper (Figs. 16 and 35): comparisons from rejection sampling and online rounds raise Elo above a control with as many of "
         "the first tranche; a PM's own scores, turned into Elo, promise more than people find.")  # fmt: skip


class Rated(NamedTuple):
    """A snapshot of a PPO run as an Elo stage found it. samples: what it was trained on by then. elo, guess: above the
    anchor, by raters and by the PM it was trained on, None where the stage did not ask that."""

    policy: str
    samples: int
    elo: Estimate
    guess: Estimate | None


def load_ratings(index: Path, only: str = "*", stage: str = "*") -> list[list[Rated]]:
    """The PPO snapshots of every finished Elo stage of an experiment. Raises ValueError where there is none."""
    found = [read_ratings(folder) for _, _, folder in find_stages(index, "elo", only, stage) if (folder / "evals" / "elo.json").is_file()]
    if not any(found):
        raise ValueError(f"no Elo stage of {index} that matches {only!r} is finished; run the experiment first")
    return found


def read_ratings(folder: Path) -> list[Rated]:
    """The rows of evals/elo.json whose policies are PPO runs, in their order."""
    found, rated = json.loads((folder / "evals" / "elo.json").read_text()), []
    for row in found["rows"]:
        if row["reward"]:
            guess = row["guesses"].get(row["reward"])
            elo = Estimate(row["elo"], row["low"], row["high"], row["played"], found["prompts"])
            rated.append(Rated(row["policy"].partition("@")[0], row["samples"], elo, guess and Estimate(**guess)))
    return rated


def elo_figure(seeds: Sequence[Sequence[Rated]], path: Path) -> str:
    """Figures 16 and 35: Elo by raters (left) and as the training PM guesses it (right) against samples, a line a policy.

    Points are means over seeds and bars reach from the lowest to the highest; of one seed, its 95 % interval over prompts.
    """
    groups = defaultdict(lambda: defaultdict(list))
    for rated in (r for each in seeds for r in each):
        groups[rated.policy][rated.samples].append(rated)
    lines = {"raters": [line_of(policy, by_samples, "elo") for policy, by_samples in groups.items()],
             "guesses": [line_of(policy, by_samples, "guess") for policy, by_samples in groups.items()
                         if all(r.guess for several in by_samples.values() for r in several)]}  # fmt: skip
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for ax, (drawn, label) in zip(axes, ((lines["raters"], "Elo by raters"), (lines["guesses"], "Elo as the training PM guesses it"))):
        draw(ax, drawn, "PPO samples", label)
        ax.axhline(0, color="#999999", lw=0.8, ls=":")
    guesses = {line.label: line for line in lines["guesses"]}
    ends = [f"{line.label} {line.y[-1]:+.0f} [{line.low[-1]:+.0f}, {line.high[-1]:+.0f}] (highest {max(line.y):+.0f})"
            + (f", guessed {guesses[line.label].y[-1]:+.0f}" if line.label in guesses else "") for line in lines["raters"]]  # fmt: skip
    count = len(seeds)
    found = f"Elo at the end, {f'mean of {count} seeds and their range' if count > 1 else 'one seed'}: {'; '.join(ends)}."
    return finish(fig, path, CLAIM, found, lines)


def line_of(policy: str, by_samples: dict[int, list[Rated]], what: str) -> Line:
    """A policy's line from the untrained model on, which is the anchor."""
    found = {0: Estimate(0.0, 0.0, 0.0, 0, 0)}
    found |= {samples: over_seeds([getattr(rated, what) for rated in by_samples[samples]]) for samples in sorted(by_samples)}
    return estimate_line(policy, found, list(found.values()))
