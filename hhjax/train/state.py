"""What a training run carries from step to step, and the optimisers that move it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hhjax.fields import ConfigError
from hhjax.sharding import replicated
from hhjax.types import Array, Key, Params


class TrainState(NamedTuple):
    """Arrays only. step: i32 scalar, updates done; key: the run's root key, from which a step draws fold_in(key, step)."""

    step: Array
    params: Params
    opt_state: optax.OptState
    key: Key


class PolicyState(NamedTuple):
    """The TrainState of PPO as it is saved: `params` is the policy alone, so that children read it like any model's."""

    step: Array
    params: Params
    value: Params
    opt_state: optax.OptState
    key: Key


def split_policy(state: TrainState) -> PolicyState:
    """value is {} where the policy's own trunk has the value head."""
    params = state.params
    return PolicyState(state.step, params["policy"], params.get("value", {}), state.opt_state, state.key)


def join_policy(saved: PolicyState) -> TrainState:
    params = {"policy": saved.params} | ({"value": saved.value} if saved.value else {})
    return TrainState(saved.step, params, saved.opt_state, saved.key)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with global-norm clipping.

    The paper gives rates only relative to pretraining (PM 0.01x, PPO 0.01x: sections 3.1, 4.1) and neither Adam's
    constants nor clipping; these are common values. schedule: "constant" (the paper's PM rule), "linear" or
    "cosine" to zero over the run, after a linear warmup. score_lr: the score head's rate over `lr`; a head that
    starts at zero and learns at the trunk's rate moves a narrow model's scores too little in one epoch of few pairs.
    Raises ConfigError on a value that no optimiser can have.
    """

    lr: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    score_lr: float = 1.0

    def __post_init__(self):
        for name in ("lr", "warmup_steps", "weight_decay", "clip_norm", "score_lr"):
            if not getattr(self, name) >= 0:  # nan too
                raise ConfigError(f"optim.{name}={getattr(self, name)}; it must be at least 0")
        if not self.eps > 0:
            raise ConfigError(f"optim.eps={self.eps}; it must be positive")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)}; it must be at least 0 and below 1")


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
    if cfg.score_lr == 1:
        return optax.chain(clip, adam)
    faster = lambda updates, _: updates | {"score": cfg.score_lr * updates["score"]}  # noqa: E731
    return optax.chain(clip, adam, optax.stateless(faster))


class PartsOptimizer(NamedTuple):
    """An optax transformation of a dict of parameter trees, each part with an optimiser of its own."""

    init: Callable
    update: Callable
    parts: dict[str, optax.GradientTransformation]


def make_parts_optimizer(configs: dict[str, OptimConfig], total_steps: int) -> PartsOptimizer:
    """Each part clipped and moved by its own config. (optax.partition does the same, but its masked states have no
    shardings that follow from the parameters'.)"""
    parts = {name: make_optimizer(cfg, total_steps) for name, cfg in configs.items()}

    def update(grads, state, params):
        moved = {name: part.update(grads[name], state[name], params[name]) for name, part in parts.items()}
        return {name: updates for name, (updates, _) in moved.items()}, {name: new for name, (_, new) in moved.items()}

    return PartsOptimizer(lambda params: {name: part.init(params[name]) for name, part in parts.items()}, update, parts)


def decayed(params: Params):
    """Tree of bools: which parameters weight decay touches (matrices, told by their names)."""
    spared = ("scale", "bias", "score")
    return jax.tree_util.tree_map_with_path(lambda path, _: not str(path[-1].key).endswith(spared), params)


def init_state(params: Params, optimizer: optax.GradientTransformation, key: Key) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)


def state_shardings(optimizer, params_shapes, params_shardings, mesh) -> TrainState:
    """Shardings for a whole TrainState: moments live where their parameter does, the rest on every device."""
    whole = replicated(mesh)

    def moments(optimizer, shapes, shardings):
        if isinstance(optimizer, PartsOptimizer):
            return {name: moments(part, shapes[name], shardings[name]) for name, part in optimizer.parts.items()}
        return optax.tree_utils.tree_map_params(
            optimizer, lambda _, s: s, jax.eval_shape(optimizer.init, shapes), shardings, transform_non_params=lambda _: whole
        )

    return TrainState(whole, params_shardings, moments(optimizer, params_shapes, params_shardings), whole)
