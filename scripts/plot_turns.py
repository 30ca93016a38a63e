"""Paper Figure 8: test pairs and accuracy by turn of the dialogue.

    python scripts/plot_turns.py OUT/experiments/pm_hh.json [--only GLOB] [--stage GLOB,...] [--to FOLDER]
"""

from hhjax.analysis.figures import turn_figure
from hhjax.analysis.plotting import plot

if __name__ == "__main__":
    plot(turn_figure, "turns", __doc__)
