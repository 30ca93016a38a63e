"""How far can a policy be trained on a preference model before the annotators stop agreeing, by number of comparisons?

Question   At which sqrt(KL) does gold turn down, for preference models of 250, 1,000 and about 5,900 comparisons, and does a
           test PM notice?
Figures    Reward on train PM, test PM and gold against sqrt(KL) (paper Figures 4 and 13, with a gold that the paper had not).
Expected   Gold turns down earlier with fewer comparisons; with many the test PM goes on rising with the training PM.
Cost       6 minutes on 2 cores at three seeds beside quickstart.py and clinic_tension.py, whose stages it shares.
Command    hhjax run experiments/clinic_overoptimisation.py --jobs 2
           python scripts/plot_reward_vs_sqrt_kl.py runs/experiments/clinic_overoptimisation.json --most 2
"""

from quickstart import FEW, LM_LARGE, MIXED, PMS, RL, pm, shared, small

from hhjax.experiment import Experiment, Run, edit

SHARED = shared(LM_LARGE)
REWARDS = {"250": pm("pm", 250, **FEW), "1000": pm("pm", 1000), "all": MIXED}


def runs(fast: bool = False, seeds: int = 3, pairs: str = "250,1000,all"):
    """pairs: some of 250, 1000, all, with commas between."""
    found = []
    for number in pairs.split(","):
        base = Experiment("clinic_overoptimisation", (*SHARED, REWARDS[number], PMS[1], RL))
        base = small(base) if fast else base
        found += [Run(edit(base, "seed", seed), (("pairs", number), ("seed", str(seed)))) for seed in range(seeds)]
    return found
