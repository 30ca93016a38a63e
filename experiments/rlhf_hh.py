"""Does PPO raise the score of the preference model it is trained on, and of one that it never saw?

Question   How does the reward grow with the distance from the initial policy, on the training PM and on a test PM?
Figures    Reward against sqrt(KL), train and test PM (paper Figures 4, 13, 33).
Expected   The paper: about linear in sqrt(KL) at first; train and test agree for a while, then the training PM rises
           above. PMs of 930 helpful pairs each, as here, are weak, so they should part early.
Cost       About 7 minutes a seed on 2 cores once tokenizer and language model are there, which are those of pm_hh.
Command    hhjax run experiments/rlhf_hh.py --seeds 3
           python scripts/plot_reward_vs_sqrt_kl.py runs/experiments/rlhf_hh.json
"""

from dataclasses import replace

from pm_hh import FAST, HH, MIXED, TEXT

from hhjax.experiment import Experiment, edit, grid
from hhjax.model.generate import Sampling
from hhjax.stages import PPO
from hhjax.train.state import OptimConfig

HELPFUL = replace(HH, sources=("helpful-base",))
# Two halves of the opening prompts: a PM to train on, and one to check it with (section 4.2).
HALVES = tuple(replace(MIXED, name=name, data=replace(HELPFUL, half=half)) for name, half in (("pm", "A"), ("pm_test", "B")))
RL = PPO("ppo", policy="lm", reward="pm", tests=("pm_test",), data=HELPFUL, prompt_len=128, batch_size=64, steps=300,
         sampling=Sampling(max_new_tokens=32),  # section 4.2
         # One update an iteration: at 2e-4 and four updates sqrt(KL) was 10 after 40 iterations (docs/diagnosis.md).
         optim=OptimConfig(lr=5e-5, warmup_steps=10), value_optim=OptimConfig(lr=2e-4, warmup_steps=10),
         eval_every=100, keep=10)  # fmt: skip
BASE = Experiment("rlhf_hh", (*TEXT, *HALVES, RL))
FAST_RL = FAST | {f"{pm}.seq_len": 128 for pm in ("pm", "pm_test")} | {
    "ppo.steps": 4, "ppo.batch_size": 16, "ppo.prompt_len": 48, "ppo.eval_prompts": 16}  # fmt: skip


def runs(fast: bool = False, seeds: int = 1):
    base = BASE
    for path, value in FAST_RL.items() if fast else ():
        base = edit(base, path, value)
    return grid(base, {"seed": range(seeds)})
