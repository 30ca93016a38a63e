"""What does RLHF cost a small model of what it knew, and can its activations tell harmful prompts?

Question   Accuracy and log-loss on facts, opening hours and sums before and after PPO, by size, with and without examples; and AUROC of
           out-of-distribution scores of harmful prompts.
Figures    Capability before and after by size (paper Figure 3); detection (Figure 22).
Expected   A tax that grows with the distance from the initial policy; no bonus at these sizes. The questions are those of the text.
           Few examples of what is outside beat every score without any.
Cost       3 minutes on 2 cores at three seeds beside quickstart.py and clinic_tension.py, whose stages it shares.
Command    hhjax run experiments/clinic_tax.py --jobs 2
           python scripts/plot_tax.py runs/experiments/clinic_tax.json
           python scripts/plot_detection.py runs/experiments/clinic_tax.json
"""

from quickstart import DETECT, EXAMS, LM_LARGE, LM_SMALL, MIXED, PMS, POLICIES, shared, small

from hhjax.experiment import Experiment, grid

SHARED = shared(LM_LARGE, LM_SMALL)
BASE = Experiment("clinic_tax", (*SHARED, MIXED, PMS[1], *POLICIES[:2], *EXAMS, DETECT))


def runs(fast: bool = False, seeds: int = 3):
    return grid(small(BASE) if fast else BASE, {"seed": range(seeds)})
