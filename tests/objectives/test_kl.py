"""KL estimators against the KL itself, and the controller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hhjax.objectives.kl import KLConfig, adapt_beta, kl_k1, kl_k2, kl_k3

P, Q = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.2, 0.5, 0.3])
EXACT = float(jnp.sum(P * jnp.log(P / Q)))


def test_k1_and_k3_are_unbiased():
    """Their expectation over tokens of the policy is the KL, exactly."""
    for estimate in (kl_k1, kl_k3):
        assert float(jnp.sum(P * estimate(jnp.log(P), jnp.log(Q)))) == pytest.approx(EXACT, rel=1e-6)


def test_k3_is_never_negative_and_k2_nearly_the_kl():
    assert (kl_k3(jnp.log(P), jnp.log(Q)) >= 0).all()
    near = jnp.array([0.49, 0.31, 0.2])
    exact = float(jnp.sum(P * jnp.log(P / near)))
    assert float(jnp.sum(P * kl_k2(jnp.log(P), jnp.log(near)))) == pytest.approx(exact, rel=0.05)


def test_gradients_of_the_estimators_as_losses():
    """In expectation, with the tokens held fixed, k2's gradient is the KL's and k1's is zero."""
    theta = jnp.log(P)
    logp = jax.nn.log_softmax
    kl = jax.grad(lambda t: jnp.sum(jnp.exp(logp(t)) * (logp(t) - jnp.log(Q))))(theta)
    k2 = jax.grad(lambda t: jnp.sum(P * kl_k2(logp(t), jnp.log(Q))))(theta)
    k1 = jax.grad(lambda t: jnp.sum(P * kl_k1(logp(t), jnp.log(Q))))(theta)
    np.testing.assert_allclose(k2, kl, atol=1e-6)
    np.testing.assert_allclose(k1, 0, atol=1e-6)


def test_the_adaptive_coefficient():
    cfg = KLConfig(beta=0.1, target=6.0, horizon=10_000)  # Ziegler et al.'s numbers
    assert adapt_beta(0.1, cfg, 6.0, 64) == 0.1
    assert adapt_beta(0.1, cfg, 6.6, 1000) == pytest.approx(0.1 * 1.01)
    assert adapt_beta(0.1, cfg, 600.0, 1000) == pytest.approx(0.1 * 1.02)  # the error is clipped at 0.2
    assert adapt_beta(0.1, cfg, 0.0, 1000) == pytest.approx(0.1 * 0.98)
    assert adapt_beta(0.1, KLConfig(0.1), 600.0, 1000) == 0.1


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="beta is at least 0"):
        KLConfig(-1.0)
