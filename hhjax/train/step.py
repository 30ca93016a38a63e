"""THE STEP: a loss and an optimiser make a pure function from (state, batch) to (state, metrics)."""

import jax
import jax.numpy as jnp
import optax

from hhjax.sharding import batch_sharding, replicated
from hhjax.train.state import TrainState
from hhjax.types import Batch, LossFn


def make_train_step(loss: LossFn, optimizer: optax.GradientTransformation, micro_batches: int = 1, parts=()):
    """One update: params <- params - optimizer(grad of loss).

    parts: top-level names of the parameters whose gradient norms are logged apart, beside the whole.

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
        norms = {f"grad_norm_{part}": optax.tree.norm(grads[part]) for part in parts}
        metrics = metrics | {"loss": value, "grad_norm": optax.tree.norm(grads)} | norms
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step


def make_ppo_update(train_step):
    """All minibatches of one rollout, over all epochs: (state, Rollout, order, rows) -> (state, metrics), to be jitted whole.

    order: [K, b] int32, the samples of each minibatch, or None: one update on all of them as they are. rows: what the models read of
    each minibatch, a tree of [K, ...], or None: the rows of the rollout, by the same order. Metrics are means over the minibatches,
    those in _max maxima; first_log_ratio_max, where the loss tells log_ratio_max, is the first minibatch's, 0 but for rounding.
    """

    def first(metrics, at=...):
        return {"first_log_ratio_max": metrics["log_ratio_max"][at]} if "log_ratio_max" in metrics else {}

    def update(state: TrainState, rollout, order=None, rows=None):
        if order is None:
            own = rollout.rows if rows is None else jax.tree.map(lambda x: x[0], rows)
            state, metrics = train_step(state, rollout._replace(rows=own))
            return state, metrics | first(metrics)

        def one(state, part):
            index, own = part
            kept = rollout if own is None else rollout._replace(rows=None)
            mine = jax.tree.map(lambda x: x[index], kept)
            return train_step(state, mine if own is None else mine._replace(rows=own))

        state, metrics = jax.lax.scan(one, state, (order, rows))
        return state, {n: combine(n)(x) for n, x in metrics.items()} | first(metrics, 0)

    return update


def combine(name: str):
    """How a metric of several parts becomes one: by its mean, or by its maximum where the name says so."""
    return jnp.max if name.endswith("_max") else jnp.mean


def accumulate(grad_fn, params, batch: Batch, key, parts: int):
    """Weighted mean of loss, metrics (maximum of those in _max) and gradients over `parts` slices, one at a time."""

    def cut(x):
        if x.shape[0] % parts:
            raise ValueError(f"batch of {x.shape[0]} rows does not divide into {parts} micro-batches")
        # Row r goes to part r % parts, so that every device keeps its share of each part.
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    def one(sums, part):
        index, rows = part
        (value, metrics), grads = grad_fn(params, rows, jax.random.fold_in(key, index))
        weight, tops = metrics.pop("weight"), pop_maxima(metrics)
        add = jax.tree.map(lambda s, x: s + weight * x, sums[2:], (value, metrics, grads))
        return (sums[0] + weight, jax.tree.map(jnp.maximum, sums[1], tops), *add), None

    slices = (jnp.arange(parts), jax.tree.map(cut, batch))
    shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], slices[1]), key)
    (value, metrics), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    if "weight" not in metrics:
        raise ValueError(f"micro-batches are combined by their weight, and the loss tells only {', '.join(metrics) or 'its value'}; give `weight`, "
                         f"the number of tokens or pairs that it is the mean of")  # fmt: skip
    total, tops = metrics.pop("weight"), jax.tree.map(lambda x: x - jnp.inf, pop_maxima(metrics))
    (total, tops, value, metrics, grads), _ = jax.lax.scan(one, (total, tops, value, metrics, grads), slices)
    value, metrics, grads = jax.tree.map(lambda s: s / jnp.maximum(total, 1e-9), (value, metrics, grads))
    return value, metrics | tops | {"weight": total}, grads


def pop_maxima(metrics: dict) -> dict:
    """Takes the metrics in _max out of the dict."""
    return {name: metrics.pop(name) for name in [n for n in metrics if n.endswith("_max")]}


def shard_step(step, state_shardings: TrainState, mesh):
    """`step` compiled for a mesh: the state donated and kept in place, batches split over data and fsdp."""
    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )
