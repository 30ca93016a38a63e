"""Is picking the best of n replies by a preference model as good as PPO at the same distance?

Question   Score of the best of n = 1, 4, 16, 64 by the training PM and by a test PM, beside PPO's curve.
Figures    Rejection sampling points on the plane of reward and sqrt(KL) (paper section 4.5, appendix B.6).
Expected   The paper: gains to n = 16, little after; PPO about as good as n = 64. KL of the best of n is at most
           log n - (n - 1) / n nats. The Comparisons stage writes the pairs that an online round would train on.
Cost       About 10 minutes on 2 cores beside rlhf_hh, whose stages it shares.
Command    hhjax run experiments/best_of_n.py
           python scripts/plot_reward_vs_sqrt_kl.py runs/experiments/best_of_n.json
"""

from rlhf_hh import BASE, FAST_RL, HELPFUL, RL

from hhjax.experiment import Experiment, edit, grid
from hhjax.stages import BestOfN, Comparisons

SAME = {"data": HELPFUL, "prompt_len": RL.prompt_len, "sampling": RL.sampling}
BEST = BestOfN("best", policy="lm", reward="pm", tests=("pm_test",), **SAME)
# An online round (section 4.5): snapshots of PPO side by side, judged here by the test PM in the place of people.
FRESH = Comparisons("fresh", policies=("ppo@200", "ppo"), labeler="pm_test", **SAME)
ALL = Experiment("best_of_n", (*BASE.stages, BEST, FRESH))


def runs(fast: bool = False, seeds: int = 1):
    base = ALL
    small = FAST_RL | {"best.ns": (1, 4), "best.prompts": 16, "fresh.prompts": 64, "fresh.policies": ("lm", "ppo")}
    for path, value in small.items() if fast else ():
        base = edit(base, path, value)
    return grid(base, {"seed": range(seeds)})
