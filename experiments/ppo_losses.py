"""Two changed losses: the KL penalty in the loss instead of in the reward, and PPO without its clip.

Question   At two epochs of two minibatches, does either change the reward at a given distance from the initial policy?
Figures    Reward against sqrt(KL), a line a loss.
Expected   One frontier for all three: at small steps the clip seldom binds, and a beta of 0.001 is hardly felt anywhere.
           (The two betas are not one strength: in the reward it is divided by the advantages' spread when those are whitened.)
Cost       About 40 minutes on 2 cores beside pm_hh: two PMs, three policies.
Command    hhjax sweep experiments/ppo_losses.py --jobs 1
           python scripts/plot_reward_vs_sqrt_kl.py runs/experiments/ppo_losses_*.json

It also shows how to change PPO: a policy loss per token, and the stage that uses it.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from rlhf_hh import BASE, FAST_RL

from hhjax.experiment import Experiment, edit, grid
from hhjax.objectives.kl import kl_k2
from hhjax.objectives.ppo import PPOLoss, clipped_policy_loss, ppo_objective


@dataclass(frozen=True)
class KLLoss(PPOLoss):
    beta: float = 0.001


def kl_in_loss(actor, cfg):
    def policy_loss(logp, rollout, cfg):  # k2: the estimator whose gradient is the KL's
        return clipped_policy_loss(logp, rollout, cfg) + cfg.beta * kl_k2(logp, rollout.ref_logp)

    return ppo_objective(actor, cfg, policy_loss)


def unclipped(actor, cfg):
    def policy_loss(logp, rollout, cfg):
        return -jnp.exp(logp - rollout.logp) * rollout.advantages

    return ppo_objective(actor, cfg, policy_loss)


def runs(fast: bool = False, seeds: int = 1):
    base = edit(edit(BASE, "ppo.epochs", 2), "ppo.minibatches", 2)  # with one update an iteration no ratio leaves 1
    for path, value in FAST_RL.items() if fast else ():
        base = edit(base, path, value)
    in_loss = edit(edit(base, "ppo.kl.beta", 0.0), "ppo.loss", KLLoss())
    variants = {"ppo": base, "kl_in_loss": edit(in_loss, "ppo.objective", kl_in_loss),
                "unclipped": edit(base, "ppo.objective", unclipped)}  # fmt: skip
    named = [Experiment(f"ppo_losses_{name}", each.stages) for name, each in variants.items()]
    return [run for each in named for run in grid(each, {"seed": range(seeds)})]
