"""Paper Figures 16 and 35: Elo of policies against PPO samples, by raters and as their preference models guess it.

    python scripts/plot_elo.py OUT/experiments/clinic_online.json [--only GLOB] [--stage GLOB,...] [--to FOLDER]
"""

from hhjax.analysis.elo import elo_figure, load_ratings
from hhjax.analysis.plotting import plot

if __name__ == "__main__":
    plot(elo_figure, "elo", __doc__, load_ratings)
