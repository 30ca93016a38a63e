"""Paper Figure 3: what models know before and after RLHF, by size.

    python scripts/plot_tax.py OUT/experiments/clinic_tax.json [--only GLOB] [--stage GLOB,...] [--to FOLDER]
"""

from hhjax.analysis.plotting import plot
from hhjax.analysis.policies import load_exams, tax_figure

if __name__ == "__main__":
    plot(tax_figure, "tax", __doc__, load_exams)
