"""Do helpfulness and harmlessness get in each other's way in one preference model?

Question   Trained on 0 to 100 % harmless comparisons, the number of pairs fixed, how accurate is a PM on either kind?
Figures    Paper Figures 19 and 26.
Expected   Trained on one kind alone: far below chance on the other (about 0.35 to 0.38 in the paper); mixtures good at
           both, large models more so than small ones.
Cost       About 25 minutes on 2 cores at one seed: six preference models on 1,800 pairs; the language model is pm_hh's.
Command    hhjax sweep experiments/pm_mix.py --jobs 1
           python scripts/plot_mixture.py runs/experiments/pm_mix.json
"""

from pm_hh import BASE, FAST, FAST_PM

from hhjax.experiment import Experiment, edit, grid


def runs(fast: bool = False, steps: int = 6, pairs: int = 1800, seeds: int = 1):
    """steps: how many mixtures from 0 to 100 % harmless. pairs: in every mixture, at most what one kind has."""
    base = edit(Experiment("pm_mix", BASE.stages), "pm.data.limit", pairs)
    small = FAST | {f"pm.{path}": value for path, value in FAST_PM.items()}
    for path, value in small.items() if fast else ():
        base = edit(base, path, value)
    shares = [k / (steps - 1) for k in range(steps)]
    mixtures = {f"{100 * share:.0f}%": (1 - share, share) for share in shares}
    return grid(base, {"pm.data.shares": mixtures, "seed": range(seeds)})
