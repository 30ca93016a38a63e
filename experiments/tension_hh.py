"""On people's comparisons: what becomes of a policy that is paid for helpfulness alone, for harmlessness alone, or for both?

Question   What do held-out preference models of either kind think of each policy, and how often does it refuse or evade, and ask
           back, when asked what people ask and what they attack with?
Figures    Reward against sqrt(KL) on test PMs of both kinds; behaviours before and after (paper Figures 1, 14, section 4.4).
Expected   Paper section 4.4: harmlessness is over-optimised before helpfulness, so that the policy of both grows evasive. Each
           policy of one kind should lose on the other kind's test PM, since those PMs are far below chance on it (results/pm_hh.md).
Cost       On 2 cores that three other jobs shared, one seed: 11, 16 and 10 minutes a policy and a minute a PM, beside rlhf_hh.py, whose
           tokenizer, language model and helpful PMs it shares.
Command    hhjax run experiments/tension_hh.py
           python scripts/plot_behaviour.py runs/experiments/tension_hh.json
           python scripts/plot_reward_vs_sqrt_kl.py runs/experiments/tension_hh.json
"""

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pm_hh import FAST, HH, KINDS, MIXED, TEXT
from rlhf_hh import RL

from hhjax.data.comparisons import load_comparisons, opening
from hhjax.evals.replies import habits
from hhjax.experiment import Experiment, Run, edit


def watch(prompts: Sequence[str], replies: Sequence[str]) -> dict[str, np.ndarray]:
    """What PPO logs of its replies: habits by the tranche that the prompt is of, nan for the other, and words."""
    tranches = np.array([tranche_of().get(opening(prompt), "") for prompt in prompts])
    shares = {f"{tranche}_{name}": np.where(tranches == tranche, x, np.nan)
              for tranche in HH.sources for name, x in habits(replies).items()}  # fmt: skip
    return shares | {"words": np.array([len(reply.split()) for reply in replies], float)}


@functools.cache
def tranche_of() -> dict[str, str]:
    """Opening -> tranche: a prompt's text does not say of which it is."""
    rows = [row for tranche in HH.sources for split in ("train", "test")
            for row in load_comparisons(replace(HH, sources=(tranche,)), split)[0]]  # fmt: skip
    return {opening(row.prompt): row.source for row in rows}


# Train PMs of one half of the opening prompts, test PMs of the other (section 4.2).
PAID = {kind: replace(MIXED, name=f"pm_{kind}", data=replace(HH, sources=KINDS[name], half="A"))
        for kind, name in (("helpful", "helpful"), ("both", "mixed"), ("harmless", "harmless"))}  # fmt: skip
TESTS = tuple(replace(MIXED, name=f"{kind}_test", data=replace(HH, sources=KINDS[kind], half="B")) for kind in ("helpful", "harmless"))
# A third of rlhf_hh's iterations: past sqrt(KL) 9 its policies never stop and repeat themselves.
POLICY = replace(RL, data=HH, tests=("helpful_test", "harmless_test"), steps=100, eval_prompts=256, eval_every=0, watch=watch)
FAST_RL = {"steps": 4, "batch_size": 16, "prompt_len": 48, "eval_prompts": 32}


def runs(fast: bool = False, policies: str = "helpful,both,harmless", seeds: int = 1):
    """policies: some of PAID, with commas between."""
    found = []
    for kind in policies.split(","):
        base = Experiment("tension_hh", (*TEXT, PAID[kind], *TESTS, replace(POLICY, reward=f"pm_{kind}")))
        base = small(base) if fast else base
        found += [Run(edit(base, "seed", seed), (("policy", kind), ("seed", str(seed)))) for seed in range(seeds)]
    return found


def small(base: Experiment) -> Experiment:
    """--fast: few steps, so that every path is walked in minutes."""
    by_kind = {"tokenizer": {"vocab": FAST["tok.vocab"]}, "lm": {"steps": FAST["lm.steps"]}, "pm": {"seq_len": 128}, "ppo": FAST_RL}
    for stage in base.stages:
        for path, value in by_kind.get(stage.kind, {}).items():
            base = edit(base, f"{stage.name}.{path}", value)
    return base
