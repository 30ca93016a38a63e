"""Do larger policies gain more from the same preference model?

Question   Reward against sqrt(KL) for policies of several sizes under one PM: are the curves parallel?
Figures    Reward against samples and against sqrt(KL), a colour a policy size (paper Figures 4 and 13).
Expected   The paper: larger policies start higher and end higher; in sqrt(KL) the lines are about parallel (section 4.3).
Cost       About 40 minutes on 2 cores at one seed: two language models, two PMs, two policies.
Command    hhjax sweep experiments/rlhf_sizes.py --jobs 1
           python scripts/plot_reward_vs_sqrt_kl.py runs/experiments/rlhf_sizes.json
"""

from dataclasses import replace

from pm_hh import TEXT
from rlhf_hh import FAST_RL, HALVES, RL

from hhjax.experiment import Experiment, edit, grid

POLICY_LM = replace(TEXT[1], name="policy_lm")
BASE = Experiment("rlhf_sizes", (*TEXT, POLICY_LM, *HALVES, replace(RL, policy="policy_lm")))


def runs(fast: bool = False, sizes: str = "0.1M,0.4M", seeds: int = 1):
    """sizes: of the policy, with commas between."""
    base = BASE
    for path, value in (FAST_RL | {"policy_lm.steps": 20}).items() if fast else ():
        base = edit(base, path, value)
    return grid(base, {"policy_lm.model": sizes.split(","), "seed": range(seeds)})
