"""Shaped rewards, advantages and whitening against plain loops and laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hhjax.objectives.advantage import explained_variance, gae, shaped_rewards, whiten

LENGTHS = np.array([5, 1, 3, 4])
MASK = np.arange(5)[None] < LENGTHS[:, None]


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=MASK.shape).astype(np.float32) for _ in range(2)]


def gae_by_loop(rewards, values, gamma, lam):
    out = np.zeros_like(rewards)
    for b, n in enumerate(LENGTHS):
        running = 0.0
        for t in reversed(range(n)):
            following = values[b, t + 1] if t + 1 < n else 0.0
            running = rewards[b, t] + gamma * following - values[b, t] + gamma * lam * running
            out[b, t] = running
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_loop(gamma, lam):
    rewards, values = arrays()
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    np.testing.assert_allclose(advantages, gae_by_loop(rewards, values, gamma, lam), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, advantages + values * MASK, rtol=1e-6)


def test_lambda_one_is_reward_to_go_minus_value():
    rewards, values = arrays()
    advantages, returns = gae(rewards * MASK, values, MASK, 1.0, 1.0)
    to_go = np.cumsum((rewards * MASK)[:, ::-1], 1)[:, ::-1]
    np.testing.assert_allclose(returns, to_go * MASK, atol=1e-5)
    np.testing.assert_allclose(advantages, (to_go - values) * MASK, atol=1e-5)


def test_what_is_masked_changes_nothing():
    rewards, values = arrays()
    garbage = jnp.where(MASK, 0, jnp.nan)
    for a, b in zip(gae(rewards, values, MASK, 1.0, 0.9), gae(rewards + garbage, values + garbage, MASK, 1.0, 0.9)):
        np.testing.assert_array_equal(a, b)


def test_a_constant_in_reward_and_value_changes_no_advantage():
    """With gamma 1 the mean that is subtracted from PM scores does not matter where values start from the PM too."""
    _, values = arrays()
    score, kl = jnp.array([0.9, -2.7, 0.0, 1.0]), jnp.zeros(MASK.shape)
    plain, _ = gae(shaped_rewards(score, kl, MASK, 0.0), values, MASK, 1.0, 0.95)
    moved, _ = gae(shaped_rewards(score + 3, kl, MASK, 0.0), values + 3, MASK, 1.0, 0.95)
    np.testing.assert_allclose(plain, moved, atol=1e-5)


def test_rewards_are_floats_on_the_last_token():
    """A score of 0.9 arrives as 0.9, and -2.7 as -2.7."""
    rewards = shaped_rewards(jnp.array([0.9, -2.7, 0.25, 0.0]), jnp.full(MASK.shape, 10.0), MASK, 0.01)
    expected = np.where(MASK, -0.1, 0.0)
    expected[np.arange(4), LENGTHS - 1] += [0.9, -2.7, 0.25, 0.0]
    np.testing.assert_allclose(rewards, expected, atol=1e-6)
    assert rewards.dtype == jnp.float32


def test_whitening():
    x, _ = arrays()
    white = np.asarray(whiten(3 * x + 7, MASK))
    kept = white[MASK]
    assert abs(kept.mean()) < 1e-5 and kept.std() == pytest.approx(1, abs=1e-4)  # numpy's std is ddof 0 too
    assert (white[~MASK] == 0).all()
    assert jnp.isfinite(whiten(jnp.ones(MASK.shape), MASK)).all()


def test_explained_variance():
    returns, noise = arrays()
    assert float(explained_variance(returns, returns, MASK)) == pytest.approx(1)
    assert float(explained_variance(jnp.full(MASK.shape, 5.0), returns, MASK)) == pytest.approx(0, abs=1e-5)
    assert float(explained_variance(-returns, returns, MASK)) == pytest.approx(-3, rel=1e-4)


def test_everything_compiles_under_jit():
    rewards, values = arrays()
    compiled = jax.jit(gae, static_argnums=(3, 4))(rewards, values, MASK, 1.0, 0.95)
    np.testing.assert_allclose(compiled[0], gae(rewards, values, MASK, 1.0, 0.95)[0], atol=1e-6)
