"""Paper Figure 9: accuracy against the difference of scores, beside 1/(1+exp(-difference)).

    python scripts/plot_calibration.py OUT/experiments/pm_hh.json [--only GLOB] [--stage GLOB,...] [--to FOLDER]
"""

from hhjax.analysis.figures import calibration_figure
from hhjax.analysis.plotting import plot

if __name__ == "__main__":
    plot(calibration_figure, "calibration", __doc__)
