"""What policies do before and after (paper Figure 1, section 4.4): behaviours that the clinic's gold names, or habits of wording.

    python scripts/plot_behaviour.py OUT/experiments/clinic_tension.json [--only GLOB] [--stage GLOB,...] [--to FOLDER]
"""

from hhjax.analysis.plotting import plot
from hhjax.analysis.policies import behaviour_figure, load_shares
from hhjax.clinic.gold import BEHAVIOURS
from hhjax.data.sources import COMPARISONS
from hhjax.evals.replies import HABITS

KINDS = BEHAVIOURS | dict.fromkeys(COMPARISONS, HABITS)  # those that were watched are drawn

if __name__ == "__main__":
    plot(lambda shares, path: behaviour_figure(shares, KINDS, path), "behaviour", __doc__, load_shares)
