"""Paper Figure 7: test accuracy against the number of comparisons and against model size.

    python scripts/plot_accuracy.py OUT/experiments/pm_sizes.json [--only GLOB] [--stage GLOB,...] [--to FOLDER]
"""

from hhjax.analysis.figures import accuracy_figure
from hhjax.analysis.plotting import plot

if __name__ == "__main__":
    plot(accuracy_figure, "accuracy", __doc__)
