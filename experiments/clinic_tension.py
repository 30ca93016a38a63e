"""What becomes of a policy that is paid for helpfulness alone, for harmlessness alone, or for both?

Question   How often does each policy do what was asked, comply with harm, route, evade, or answer something else; and does a larger
           share of helpful prompts keep the policy of both from being over-cautious?
Figures    Behaviours before and after (paper Figure 1, section 4.4); reward against sqrt(KL).
Expected   Paper section 4.4: harmlessness is over-optimised before helpfulness, so that the policy of both grows evasive; more
           helpful prompts help. The policy of helpfulness alone is easier to red-team.
Cost       10 minutes on 2 cores at three seeds beside quickstart.py, whose world and language model it shares.
Command    hhjax run experiments/clinic_tension.py --jobs 2
           python scripts/plot_behaviour.py runs/experiments/clinic_tension.json
           python scripts/plot_reward_vs_sqrt_kl.py runs/experiments/clinic_tension.json --most 2
"""

from dataclasses import replace

from quickstart import BOTH, LM_LARGE, PMS, RL, shared, small

from hhjax.experiment import Experiment, Run, edit

SHARED = shared(LM_LARGE)
PM_OF = {pm.name: pm for pm in PMS}
POLICIES = {  # label: (the PM that pays, the prompts); both_80 with four helpful prompts to a harmful one
    "helpful": ("pm_helpful", BOTH),
    "both": ("pm", BOTH),
    "both_80": ("pm", replace(BOTH, shares=(4, 1))),
    "harmless": ("pm_harmless", BOTH),
}


def runs(fast: bool = False, seeds: int = 3):
    found = []
    for label, (reward, prompts) in POLICIES.items():
        # The PMs of one kind have read all comparisons of it, so that no PM of the other half is new to them.
        tests = ("pm_test",) if reward == "pm" else ()
        base = Experiment("clinic_tension", (*SHARED, PM_OF[reward], PM_OF["pm_test"], replace(RL, reward=reward, tests=tests, data=prompts)))
        base = small(base) if fast else base
        found += [Run(edit(base, "seed", seed), (("policy", label), ("seed", str(seed)))) for seed in range(seeds)]
    return found
