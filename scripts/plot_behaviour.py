"""What policies do before and after (paper Figure 1, section 4.4), in the clinic, whose gold names behaviours.

    python scripts/plot_behaviour.py OUT/experiments/clinic_tension.json [--only GLOB] [--to FOLDER]
"""

from hhjax.analysis.plotting import plot
from hhjax.analysis.policies import behaviour_figure, load_shares
from hhjax.clinic.gold import BEHAVIOURS

if __name__ == "__main__":
    plot(lambda shares, path: behaviour_figure(shares, BEHAVIOURS, path), "behaviour", __doc__, load_shares)
