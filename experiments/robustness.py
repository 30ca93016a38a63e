"""How far can a policy be trained on one half of the comparisons before the other half's preference models disagree?

Question   Where do train-PM and test-PM scores part, by size of policy, of training PM and of test PM (section 4.2)?
Figures    Reward against samples and against sqrt(KL) on train and test PMs (paper Figures 4, 13, 33).
Expected   The paper: they agree up to about 150,000 samples at 52B; larger PMs are more robust. PMs of a few hundred
           pairs part much earlier, and of PMs of 0.1M and 0.4M the larger is the more robust (results/rlhf_hh.md).
Cost       Both scans, on 2 cores of 145 GFLOP/s: about 15 minutes a seed for three policies, besides two language models once and
           four PMs a seed.
Command    hhjax sweep experiments/robustness.py --jobs 1
           python scripts/plot_reward_vs_sqrt_kl.py runs/experiments/robustness.json
"""

from dataclasses import replace

from pm_hh import FAST, TEXT
from rlhf_hh import FAST_RL, HALVES, RL

from hhjax.experiment import Experiment, Run, edit

TOK, LM = TEXT


def runs(fast: bool = False, sizes: str = "0.1M,0.4M", scans: str = "a,b", seeds: int = 1):
    """sizes: of policies and PMs. scans: a, the largest training PM for every policy; b, one of the policy's own size."""
    names = sizes.split(",")
    tag = {size: size.replace(".", "_") for size in names}
    lms = [replace(LM, name=f"lm_{tag[s]}", model=s) for s in names]
    pms = [replace(pm, name=f"{pm.name}_{tag[s]}", init=f"lm_{tag[s]}") for s in names for pm in HALVES]
    tests = tuple(pm.name for pm in pms if pm.data.half == "B")
    pairs = {"a": [(p, names[-1]) for p in names], "b": [(p, p) for p in names]}
    chosen = dict.fromkeys(pair for scan in scans.split(",") for pair in pairs[scan])
    found = []
    for policy, reward in chosen:
        ppo = replace(RL, policy=f"lm_{tag[policy]}", reward=f"pm_{tag[reward]}", tests=tests)
        base = Experiment("robustness", (TOK, *lms, *pms, ppo))
        for path, value in small(base).items() if fast else ():
            base = edit(base, path, value)
        axes = (("policy", policy), ("reward", reward))
        found += [Run(edit(base, "seed", s), (*axes, ("seed", str(s)))) for s in range(seeds)]
    return found


def small(base: Experiment) -> dict:
    """--fast, for stages of any number."""
    by_kind = {"lm": {"steps": FAST["lm.steps"]}, "pm": {"seq_len": 128}}
    paths = {f"{s.name}.{name}": value for s in base.stages for name, value in by_kind.get(s.kind, {}).items()}
    return {p: v for p, v in (FAST | FAST_RL).items() if p.split(".")[0] in ("tok", "ppo")} | paths
