"""How does a preference model's accuracy grow with its size and with the number of comparisons?

Question   Is test accuracy on helpful comparisons linear in the logarithm of parameters and of comparisons?
Figure     Paper Figure 7 (and 31, 32): accuracy against comparisons, a line a size; and against size, a line a number.
Expected   The paper: 0.72 + 0.007 ln(P / 1e11) + 0.015 ln(D / 8e4) for helpful comparisons (Eq. A.1). Over a factor of
           8 in data that is +0.03, and over a factor of 10 in parameters +0.016.
Cost       About 12 minutes on 2 cores at one seed: two language models, eight preference models.
Command    hhjax sweep experiments/pm_sizes.py --jobs 1
           python scripts/plot_accuracy.py runs/experiments/pm_sizes.json
"""

from pm_hh import BASE, FAST, FAST_PM

from hhjax.experiment import Experiment, edit, grid


def runs(fast: bool = False, sizes: str = "0.1M,0.4M", pairs: str = "230,460,920,1830", seeds: int = 1,
         kinds: str = "helpful-base"):
    """sizes, pairs, kinds: values with commas between; the smaller sets of pairs are part of the larger. (With so few pairs a
    model of both kinds stays at chance whatever its size: results/pm_hh.md.)"""
    base, amounts = Experiment("pm_sizes", BASE.stages), [int(n) for n in pairs.split(",")]
    for stage in ("pm", "eval"):
        base = edit(base, f"{stage}.data.sources", tuple(kinds.split(",")))
    small = FAST | {f"pm.{path}": value for path, value in FAST_PM.items()}
    for path, value in small.items() if fast else ():
        base = edit(base, path, value)
    if fast:
        amounts = [160, 320]
    return grid(base, {"lm.model": sizes.split(","), "pm.data.limit": amounts, "seed": range(seeds)})
