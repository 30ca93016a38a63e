"""The clipped losses: worked values, and the law that the first step is the plain policy gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hhjax.objectives.ppo import PPOLoss, clipped_policy_loss, clipped_value_loss, ppo_loss, ppo_objective
from hhjax.types import Rollout, Tokens

MASK = np.arange(4)[None] < np.array([[4], [2], [3]])


def make_rollout(seed=0) -> Rollout:
    rng = np.random.default_rng(seed)
    logp, ref, values, advantages, returns = (rng.normal(size=MASK.shape).astype(np.float32) for _ in range(5))
    rows = Tokens(np.zeros((3, 8), np.int32), np.full(3, 4, np.int32), 4 + MASK.sum(1).astype(np.int32))
    return Rollout(rows, MASK, -np.abs(logp), -np.abs(ref), values, advantages, returns)


def loss_of(logp, values, rollout, cfg=PPOLoss(), entropy=None):
    entropy = jnp.ones(MASK.shape) if entropy is None else entropy
    return ppo_loss(logp, values, entropy, rollout, cfg)


def test_clipping_by_hand():
    """Ratio 1.5 with advantage 2 is paid as 1.2; with advantage -2 in full. Ratio 0.5 the other way round."""
    rollout = make_rollout()._replace(logp=jnp.zeros((1, 4)), advantages=jnp.array([[2.0, -2.0, 2.0, -2.0]]))
    logp = jnp.log(jnp.array([[1.5, 1.5, 0.5, 0.5]]))
    np.testing.assert_allclose(clipped_policy_loss(logp, rollout, PPOLoss()), [[-2.4, 3.0, -1.0, 1.6]], rtol=1e-6)


def test_value_clipping_by_hand():
    """From 0 towards a return of 1: a step to 0.5 counts as one to 0.2; a step beyond the other side counts in full."""
    rollout = make_rollout()._replace(values=jnp.zeros((1, 2)), returns=jnp.ones((1, 2)))
    values = jnp.array([[0.5, -0.5]])
    np.testing.assert_allclose(clipped_value_loss(values, rollout, 0.2), [[0.32, 1.125]], rtol=1e-6)
    np.testing.assert_allclose(clipped_value_loss(values, rollout, 0.0), [[0.125, 1.125]], rtol=1e-6)


def test_the_whole_loss_against_a_loop():
    rollout, rng = make_rollout(), np.random.default_rng(7)
    logp, values, entropy = (rng.normal(size=MASK.shape).astype(np.float32) for _ in range(3))
    cfg = PPOLoss(clip=0.3, value_clip=0.1, value_coef=0.7, entropy_coef=0.01)
    policy, value, spread, clipped, n = 0.0, 0.0, 0.0, 0, 0
    for i, j in zip(*np.nonzero(MASK)):
        ratio, a = np.exp(logp[i, j] - rollout.logp[i, j]), rollout.advantages[i, j]
        policy -= min(ratio * a, np.clip(ratio, 0.7, 1.3) * a)
        old, goal = rollout.values[i, j], rollout.returns[i, j]
        held = old + np.clip(values[i, j] - old, -0.1, 0.1)
        value += 0.5 * max((values[i, j] - goal) ** 2, (held - goal) ** 2)
        spread, clipped, n = spread + entropy[i, j], clipped + (abs(ratio - 1) > 0.3), n + 1
    total, metrics = loss_of(logp, values, rollout, cfg, entropy)
    assert float(total) == pytest.approx((policy + 0.7 * value - 0.01 * spread) / n, rel=1e-5)
    assert float(metrics["clip_fraction"]) == pytest.approx(clipped / n)
    assert float(metrics["weight"]) == n == 9
    assert float(metrics["ratio_max"]) == pytest.approx(np.exp(np.max((logp - rollout.logp)[MASK])), rel=1e-5)


def test_padding_changes_neither_loss_nor_gradient():
    rollout, rng = make_rollout(), np.random.default_rng(3)
    logp, values = (jnp.array(rng.normal(size=MASK.shape), jnp.float32) for _ in range(2))
    f = jax.value_and_grad(lambda x, v, r: loss_of(x, v, r)[0], argnums=(0, 1))
    plain = f(logp, values, rollout)
    spoilt = jax.tree.map(lambda x: jnp.where(MASK, x, 5.0), rollout._replace(rows=None, mask=None))
    other = f(jnp.where(MASK, logp, -9.0), jnp.where(MASK, values, 9.0), spoilt._replace(rows=rollout.rows, mask=MASK))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, other)
    assert all((np.asarray(g)[~MASK] == 0).all() for g in plain[1])


def test_the_first_gradient_is_the_policy_gradient():
    """At ratio 1: -mean(A * grad log pi), whatever the clip."""
    rollout = make_rollout()
    logits = jnp.array(np.random.default_rng(1).normal(size=(*MASK.shape, 5)), jnp.float32)
    actions = np.random.default_rng(2).integers(0, 5, MASK.shape)

    def logp(logits):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), actions[..., None], -1)[..., 0]

    frozen = rollout._replace(logp=logp(logits))
    actor = lambda params, rows: (logp(params), rollout.values, jnp.zeros(MASK.shape))  # noqa: E731
    ppo = jax.grad(lambda p: ppo_objective(actor, PPOLoss())(p, frozen, None)[0])(logits)
    plain = jax.grad(lambda p: -jnp.sum(jnp.where(MASK, rollout.advantages * logp(p), 0)) / MASK.sum())(logits)
    np.testing.assert_allclose(ppo, plain, atol=1e-6)


def test_another_policy_loss_takes_the_place_of_the_clipped_one():
    rollout = make_rollout()
    actor = lambda params, rows: (params, rollout.values, jnp.zeros(MASK.shape))  # noqa: E731
    doubled = lambda logp, rollout, cfg: 2 * clipped_policy_loss(logp, rollout, cfg)  # noqa: E731
    cfg = PPOLoss(value_coef=0.0)
    logp = jnp.array(rollout.logp) + 0.05
    once, twice = (ppo_objective(actor, cfg, *x)(logp, rollout, None)[0] for x in ((), (doubled,)))
    assert float(twice) == pytest.approx(2 * float(once), rel=1e-6)
