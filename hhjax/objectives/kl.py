"""Estimators of KL(policy || reference) from sampled tokens, and the coefficient that weighs it.

Tokens sampled from the policy make k1 and k3 unbiased for the KL itself; as a loss k2 has the gradient of the KL,
k1 a gradient of mean zero. Schulman 2020, joschu.net/blog/kl-approx.html.
"""

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class KLConfig:
    """The KL penalty in the reward.

    beta: nats of PM score a nat of KL costs. target: KL in nats per response that an adaptive controller steers
    to (None: beta stays); horizon: responses over which it does (Ziegler et al. 2019, section 2.2).
    """

    beta: float = 0.001  # Bai et al. 2022, section 4.1
    target: float | None = None
    horizon: int = 10_000

    def __post_init__(self):
        if self.beta < 0 or self.horizon < 1 or (self.target is not None and self.target <= 0):
            raise ValueError(f"{self}: beta is at least 0, horizon at least 1, target positive or None")


def kl_k1(logp, ref_logp):
    """logp - ref_logp, in nats per token: unbiased, may be negative. [B, T] f32 each; the caller masks padding."""
    return logp - ref_logp


def kl_k2(logp, ref_logp):
    """(logp - ref_logp)^2 / 2: biased, low variance; its gradient is an unbiased one of the KL. Shapes as kl_k1."""
    return jnp.square(logp - ref_logp) / 2


def kl_k3(logp, ref_logp):
    """exp(d) - 1 - d with d = ref_logp - logp: unbiased, low variance, never negative. Shapes as kl_k1."""
    d = ref_logp - logp
    return jnp.expm1(d) - d


def adapt_beta(beta: float, cfg: KLConfig, kl_nats: float, responses: int) -> float:
    """The coefficient after a batch of `responses` whose mean KL was kl_nats per response; beta without a target.

    beta * (1 + clip(kl / target - 1, -0.2, 0.2) * responses / horizon): Ziegler et al. 2019.
    """
    if cfg.target is None:
        return beta
    error = min(max(kl_nats / cfg.target - 1, -0.2), 0.2)
    return beta * (1 + error * responses / cfg.horizon)
