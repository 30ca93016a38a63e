"""Proximal policy optimisation: the clipped losses of policy and value over a frozen rollout. Schulman et al. 2017."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from hhjax.objectives.kl import kl_k3
from hhjax.objectives.masked import masked_mean
from hhjax.types import Actor, LossFn, Rollout


@dataclass(frozen=True)
class PPOLoss:
    """clip: the ratio may gain nothing outside 1 +- clip. value_clip: how far a value may move from the rollout's
    (0: no clipping). The paper gives clip and the missing entropy bonus; the rest are common choices."""

    clip: float = 0.2  # Bai et al. 2022, section 4.1
    value_clip: float = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.0  # Bai et al. 2022, section 4.1: none


def clipped_policy_loss(logp, rollout: Rollout, cfg: PPOLoss):
    """-min(ratio * A, clip(ratio) * A) of every token, [B, R]; ratio = exp(logp - rollout.logp)."""
    ratio = jnp.exp(logp - rollout.logp)
    clipped = jnp.clip(ratio, 1 - cfg.clip, 1 + cfg.clip)
    return -jnp.minimum(ratio * rollout.advantages, clipped * rollout.advantages)


def clipped_value_loss(values, rollout: Rollout, clip: float):
    """max of the squared errors of the value and of the value held within `clip` of the rollout's, halved. [B, R]."""
    error = jnp.square(values - rollout.returns)
    if clip:
        held = rollout.values + jnp.clip(values - rollout.values, -clip, clip)
        error = jnp.maximum(error, jnp.square(held - rollout.returns))
    return 0.5 * error


def ppo_loss(logp, values, entropy, rollout: Rollout, cfg: PPOLoss, policy_loss: Callable = clipped_policy_loss):
    """Mean over the rollout's response tokens of policy loss + value_coef * value loss - entropy_coef * entropy.

    logp, values, entropy: [B, R] f32 under the parameters that are updated. Nothing of the rollout is computed anew.
    Returns the scalar and its metrics; names that end in _max are maxima over the tokens.
    """
    mask = rollout.mask
    log_ratio = jnp.where(mask, logp - rollout.logp, 0.0)
    policy = masked_mean(policy_loss(logp, rollout, cfg), mask)
    value = masked_mean(clipped_value_loss(values, rollout, cfg.value_clip), mask)
    total = policy + cfg.value_coef * value
    if cfg.entropy_coef:  # a coefficient of 0 would still cost a backward pass
        total = total - cfg.entropy_coef * masked_mean(entropy, mask)
    metrics = {
        "policy_loss": policy,
        "value_loss": value,
        "clip_fraction": masked_mean(jnp.abs(jnp.expm1(log_ratio)) > cfg.clip, mask),
        "ratio_max": jnp.exp(jnp.max(log_ratio)),
        "log_ratio_max": jnp.max(jnp.abs(log_ratio)),
        "step_kl": masked_mean(kl_k3(rollout.logp, logp), mask),
        "weight": jnp.sum(mask).astype(jnp.float32),
    }
    return total, metrics


def ppo_objective(actor: Actor, cfg: PPOLoss = PPOLoss(), policy_loss: Callable = clipped_policy_loss) -> LossFn:
    """`ppo_loss` as a function of the parameters of policy and value network, over a Rollout.

    To change the policy's loss only, give another policy_loss(logp, rollout, cfg) -> [B, R].
    """

    def loss(params, rollout: Rollout, key):
        del key
        return ppo_loss(*actor(params, rollout.rows), rollout, cfg, policy_loss)

    return loss
