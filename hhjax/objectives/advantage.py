"""From scores to advantages: shaped rewards, generalised advantage estimation, whitening. All [B, R], masked."""

import jax
import jax.numpy as jnp

from hhjax.objectives.masked import masked_mean


def shaped_rewards(score, kl, mask, beta):
    """-beta * kl at every token, plus the PM's score at the last real one.

    score: [B] f32; kl: [B, R] nats; mask: [B, R] bool, each row's true entries first and without a gap.
    Returns [B, R] f32, 0 where masked. Bai et al. 2022 section 4.1: r = r_PM - lambda_KL * D_KL.
    """
    ends = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    return jnp.where(mask, ends * score[:, None] - beta * kl, 0.0)


def gae(rewards, values, mask, gamma: float, lam: float):
    """Advantages and returns (advantage + value) by generalised advantage estimation; Schulman et al. 2016, eq. 16.

    delta_t = r_t + gamma * V_{t+1} - V_t; A_t = delta_t + gamma * lam * A_{t+1}. What follows the last real token is worth 0.
    values: [B, R], of the state before each token. Returns two [B, R] f32, 0 where masked.
    """
    values = jnp.where(mask, values, 0.0)
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    delta = jnp.where(mask, rewards + gamma * following - values, 0.0)

    def back(advantage, t):
        advantage = t[0] + gamma * lam * advantage * t[1]
        return advantage, advantage

    time_first = (delta.T, mask.T.astype(delta.dtype))
    _, advantages = jax.lax.scan(back, jnp.zeros_like(delta[:, 0]), time_first, reverse=True)
    advantages = jnp.where(mask, advantages.T, 0.0)
    return advantages, advantages + values


def whiten(x, mask):
    """x with mean 0 and variance 1 over the masked entries; 0 elsewhere. The variance is the biased one (ddof 0)."""
    centred = x - masked_mean(x, mask)
    return jnp.where(mask, centred * jax.lax.rsqrt(masked_mean(jnp.square(centred), mask) + 1e-8), 0.0)


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over the masked entries: 1 is perfect, 0 a constant's, below 0 worse."""
    var = lambda x: masked_mean(jnp.square(x - masked_mean(x, mask)), mask)  # noqa: E731
    return 1 - var(returns - values) / jnp.maximum(var(returns), 1e-8)
