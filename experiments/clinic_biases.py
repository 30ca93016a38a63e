"""What do the failings of raters do to the policy that is trained on their comparisons?

Question   Raters who like length, confident phrases, or caution: what do policies become by the lights of unbiased gold?
Figures    Behaviours by rater (section 4.4); reward on the biased PM, on an unbiased test PM and gold against sqrt(KL).
Expected   Each policy does more of what its raters over-reward, and its gold ends lower than under raters without failings; over-rewarded
           caution gives the evasive assistant.
Cost       10 minutes on 2 fast cores at three seeds beside quickstart.py and clinic_tension.py, whose stages it shares; 24 on slow
           and busy ones.
Command    hhjax run experiments/clinic_biases.py --jobs 2
           python scripts/plot_behaviour.py runs/experiments/clinic_biases.json
           python scripts/plot_reward_vs_sqrt_kl.py runs/experiments/clinic_biases.json --most 2
"""

from dataclasses import replace

from quickstart import BOTH, LM_LARGE, MIXED, PMS, RL, WORLD, shared, small

from hhjax.clinic.gold import Raters
from hhjax.experiment import Experiment, Run, edit

SHARED = shared(LM_LARGE)
RATERS = {"none": Raters(), "length": Raters(length=1.0), "tone": Raters(tone=1.5), "refusal": Raters(refusal=1.5)}


def runs(fast: bool = False, seeds: int = 3, biases: str = "none,length,tone,refusal"):
    """biases: some of RATERS, with commas between."""
    found = []
    for bias in biases.split(","):
        biased = tuple(replace(stage, name=f"{stage.name}_rated", raters=RATERS[bias], seed=0) for stage in WORLD[1:3])
        pm = replace(MIXED, data=replace(BOTH, sources=tuple(stage.name for stage in biased), half="A"))
        base = Experiment("clinic_biases", (*SHARED, *biased, pm, PMS[1], RL))
        base = small(base) if fast else base
        found += [Run(edit(base, "seed", seed), (("raters", bias), ("seed", str(seed)))) for seed in range(seeds)]
    return found
