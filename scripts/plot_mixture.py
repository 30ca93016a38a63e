"""Paper Figures 19 and 26: accuracy on helpful and on harmless comparisons against the training mixture.

    python scripts/plot_mixture.py OUT/experiments/pm_mix.json [--only GLOB] [--stage GLOB,...] [--to FOLDER]
"""

from hhjax.analysis.figures import mixture_figure
from hhjax.analysis.plotting import plot

if __name__ == "__main__":
    plot(mixture_figure, "mixture", __doc__)
