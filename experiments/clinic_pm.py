"""Preference models in the clinic, beside the best accuracy that the raters' noise allows.

Question   How does accuracy grow with comparisons and size, how does it trade between kinds, and is it calibrated?
Figures    Accuracy by data and size with the Bayes accuracy (paper Figure 7); by mixture (19, 26); calibration (9).
Expected   Far below chance on the other kind; even mixtures good at both. Size matters little at 0.1M and 0.4M, and on both
           kinds together the best are seven to nine points below Bayes (results/clinic.md).
Cost       10 minutes on 2 cores of 145 GFLOP/s at three seeds beside quickstart.py, whose world and language models it shares.
Command    hhjax run experiments/clinic_pm.py --jobs 2
           python scripts/plot_accuracy.py runs/experiments/clinic_pm_data.json
           python scripts/plot_mixture.py runs/experiments/clinic_pm_mixture.json
           python scripts/plot_calibration.py runs/experiments/clinic_pm_mixture.json --stage eval_pm
"""

from quickstart import LM_LARGE, LM_SMALL, PMS, evaluations, shared, small

from hhjax.experiment import Experiment, grid

SHARED = shared(LM_LARGE, LM_SMALL)
GROUPS = {"data": ("pm_small_250", "pm_small_1000", "pm_small", "pm_250", "pm_1000", "pm"),
          "mixture": ("pm_helpful", "pm_25", "pm", "pm_75", "pm_harmless")}  # fmt: skip


def runs(fast: bool = False, seeds: int = 3):
    found = []
    for group, names in GROUPS.items():
        pms = [pm for pm in PMS if pm.name in names]
        base = Experiment(f"clinic_pm_{group}", (*SHARED, *pms, *evaluations(pms)))
        found += grid(small(base) if fast else base, {"seed": range(seeds)})
    return found
