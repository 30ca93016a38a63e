"""THE STEP: a loss and an optimiser make a pure function from (state, batch) to (state, metrics)."""

import jax
import jax.numpy as jnp
import optax

from hhjax.sharding import batch_sharding, replicated
from hhjax.train.state import TrainState
from hhjax.types import Batch, LossFn


def make_train_step(loss: LossFn, optimizer: optax.GradientTransformation, micro_batches: int = 1):
    """One update: params <- params - optimizer(grad of loss).

    With micro_batches > 1 the batch is cut along its leading axis and the gradients are
    combined by each part's `weight`, which gives the gradient of the whole batch's mean
    (the mean of masked means is another number). Raises ValueError where rows do not divide.
    """
    grad_fn = jax.value_and_grad(loss, has_aux=True)

    def train_step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(state.key, state.step)
        if micro_batches == 1:
            (value, metrics), grads = grad_fn(state.params, batch, key)
        else:
            value, metrics, grads = accumulate(grad_fn, state.params, batch, key, micro_batches)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step


def accumulate(grad_fn, params, batch: Batch, key, parts: int):
    """Weighted mean of loss, metrics and gradients over `parts` slices of the batch, one at a time."""

    def cut(x):
        if x.shape[0] % parts:
            raise ValueError(f"batch of {x.shape[0]} rows does not divide into {parts} micro-batches")
        # Row r goes to part r % parts, so that every device keeps its share of each part.
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    def one(sums, part):
        index, rows = part
        (value, metrics), grads = grad_fn(params, rows, jax.random.fold_in(key, index))
        weight = metrics.pop("weight")
        add = jax.tree.map(lambda s, x: s + weight * x, sums[1:], (value, metrics, grads))
        return (sums[0] + weight, *add), None

    slices = (jnp.arange(parts), jax.tree.map(cut, batch))
    shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], slices[1]), key)
    (value, metrics), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total = metrics.pop("weight")
    (total, value, metrics, grads), _ = jax.lax.scan(one, (total, value, metrics, grads), slices)
    value, metrics, grads = jax.tree.map(lambda s: s / jnp.maximum(total, 1e-9), (value, metrics, grads))
    return value, metrics | {"weight": total}, grads


def shard_step(step, state_shardings: TrainState, mesh):
    """`step` compiled for a mesh: the state donated and kept in place, batches split over data and fsdp."""
    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )
