"""What a training run carries from step to step, and the optimisers that move it."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hhjax.sharding import replicated
from hhjax.types import Array, Key, Params


class TrainState(NamedTuple):
    """Arrays only. step: i32 scalar, updates done; key: the run's root key, from which a step draws fold_in(key, step)."""

    step: Array
    params: Params
    opt_state: optax.OptState
    key: Key


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with global-norm clipping.

    The paper gives rates only relative to pretraining (PM 0.01x, PPO 0.01x: sections 3.1, 4.1) and neither Adam's
    constants nor clipping; these are common values. schedule: "constant" (the paper's PM rule), "linear" or
    "cosine" to zero over the run, after a linear warmup.
    """

    lr: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0


def learning_rate(cfg: OptimConfig, total_steps: int) -> optax.Schedule:
    """The rate at each step. Raises ValueError on an unknown schedule."""
    decay_steps = max(total_steps - cfg.warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(cfg.lr),
        "linear": lambda: optax.linear_schedule(cfg.lr, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(cfg.lr, decay_steps),
    }
    if cfg.schedule not in after:
        raise ValueError(f"schedule {cfg.schedule!r}; choose one of {', '.join(after)}")
    if not cfg.warmup_steps:
        return after[cfg.schedule]()
    # The first update already moves: rate lr / warmup at step 0, lr at step warmup - 1.
    warmup = optax.linear_schedule(cfg.lr / cfg.warmup_steps, cfg.lr, max(cfg.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after[cfg.schedule]()], [cfg.warmup_steps])


def make_optimizer(cfg: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; weight decay spares norms, biases and the score head."""
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    adam = optax.adamw(
        learning_rate(cfg, total_steps), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=decayed
    )
    return optax.chain(clip, adam)


def decayed(params: Params):
    """Tree of bools: which parameters weight decay touches (matrices, told by their names)."""
    spared = ("scale", "bias", "score")
    return jax.tree_util.tree_map_with_path(lambda path, _: not str(path[-1].key).endswith(spared), params)


def init_state(params: Params, optimizer: optax.GradientTransformation, key: Key) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)


def state_shardings(optimizer, params_shapes, params_shardings, mesh) -> TrainState:
    """Shardings for a whole TrainState: moments live where their parameter does, the rest on every device."""
    whole = replicated(mesh)
    opt_shapes = jax.eval_shape(optimizer.init, params_shapes)
    opt_shardings = optax.tree_utils.tree_map_params(
        optimizer, lambda _, s: s, opt_shapes, params_shardings, transform_non_params=lambda _: whole
    )
    return TrainState(whole, params_shardings, opt_shardings, whole)
