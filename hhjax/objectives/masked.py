"""Means over the entries that count."""

import jax.numpy as jnp


def masked_sum(x, mask, axis=None):
    """Sum of x where mask is true; masked entries may be anything, NaN included."""
    return jnp.sum(jnp.where(mask, x, 0.0), axis=axis)


def masked_mean(x, mask, axis=None):
    """Mean of x where mask is true; 0 where nothing is."""
    return masked_sum(x, mask, axis) / jnp.maximum(jnp.sum(mask, axis=axis), 1)


def weighted_mean(x, weight):
    """Mean of weight * x over the entries of positive weight, [B] each: weights scale, and one of zero leaves out."""
    return masked_mean(weight * x, weight > 0)
