"""Preference modelling: Bradley-Terry on comparisons, with an optional language-model term."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hhjax.model.replies import hidden_states, picked
from hhjax.objectives.lm import chunked_nll, next_tokens
from hhjax.objectives.masked import masked_mean, weighted_mean
from hhjax.types import LossFn, Model, PackedPairs, PackedReplies, Pairs, Tokens


@dataclass(frozen=True)
class PreferenceLoss:
    """lm_coef: weight of the auxiliary language-model loss on the chosen dialogue (0: off).

    Askell et al. 2021 add such a term in preference pretraining; Bai et al. 2022 do not state one.
    lm_chunk: as LMLoss.chunk.
    """

    lm_coef: float = 0.0
    lm_chunk: int = 128


def preference_loss(chosen, rejected):
    """log(1 + exp(rejected - chosen)) in nats: -log P(chosen wins) under Bradley-Terry.

    chosen, rejected: [B] f32 scores. Returns [B]. Only the difference matters; log 2 at equal scores.
    Bai et al. 2022 section 2.4; Askell et al. 2021.
    """
    return jax.nn.softplus(rejected - chosen)


def preference_metrics(chosen, rejected, weight):
    """Accuracy (a tie counts half), mean margin and mean scores over the pairs that have a weight, each counted once."""
    margin, real = chosen - rejected, weight > 0
    return {
        "accuracy": masked_mean((margin > 0) + 0.5 * (margin == 0), real),
        "margin": masked_mean(margin, real),
        "chosen_score": masked_mean(chosen, real),
        "rejected_score": masked_mean(rejected, real),
        "weight": jnp.sum(real).astype(jnp.float32),
    }


def both_rows(pairs: Pairs) -> Tokens:
    """Chosen and rejected rows of a pair side by side as one batch of 2B rows, so that neither crosses a shard."""
    side_by_side = lambda c, r: jnp.stack([c, r], 1).reshape(-1, *c.shape[1:])  # noqa: E731
    return jax.tree.map(side_by_side, pairs.chosen, pairs.rejected)


def end_scores(model: Model, params, rows: Tokens | PackedReplies, ways: int = 1):
    """The scalar head read at the end-of-context token, each row's last or each packed reply's. Returns [B] f32. ways: shards of
    packed rows."""
    if isinstance(rows, PackedReplies):
        return model.score(params, picked(hidden_states(model, params, rows, rows.ends), rows.end, ways))
    return model.score(params, hidden_states(model, params, rows, rows.length[:, None] - 1)[:, 0])


def pair_scores(model: Model, params, pairs: Pairs | PackedPairs, hidden=None):
    """Chosen and rejected scores: of Pairs [B] each, of PackedPairs [R, N], those of the same pairs in rows of their own. A loss that works
    element by element and by `weight` takes both.

    hidden: `pair_states`, where the loss needs them too. Without, the last layer need not be computed but at the ends.
    """
    packed = isinstance(pairs, PackedPairs)
    rows = pairs if packed else both_rows(pairs)
    ends = pairs.ends.reshape(len(rows.tokens), -1) if packed else rows.length[:, None] - 1
    at_ends = hidden_states(model, params, rows, ends) if hidden is None else jnp.take_along_axis(hidden, ends[..., None], axis=1)
    scores = model.score(params, at_ends).reshape(*pairs.weight.shape, 2)
    return scores[..., 0], scores[..., 1]


def pair_states(model: Model, params, pairs: Pairs | PackedPairs):
    """The last hidden states of comparisons' rows: of Pairs [2B, T, D], as `both_rows` has them, of PackedPairs [R, T, D]."""
    return hidden_states(model, params, pairs if isinstance(pairs, PackedPairs) else both_rows(pairs))


def chosen_nats(model: Model, params, batch: Pairs | PackedPairs, hidden, chunk: int):
    """The weighted mean over pairs of the mean nats per token of the chosen dialogue, prompt and reply, but for <eoc>, which a language
    model never says. hidden: as `pair_states` returns it."""
    if isinstance(batch, Pairs):
        rows = batch.chosen
        whole = rows._replace(prompt_len=jnp.zeros_like(rows.length), length=rows.length - 1)
        targets, mask = next_tokens(whole)
        nll, _ = chunked_nll(model, params, hidden.reshape(-1, 2, *hidden.shape[1:])[:, 0], targets, mask, chunk)
        return weighted_mean(nll / jnp.maximum(jnp.sum(mask, -1), 1), batch.weight)
    ahead = lambda x, end: jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=end)  # noqa: E731
    t = jnp.arange(batch.tokens.shape[1])
    is_end = jnp.any(batch.ends[..., 0, None] == t, axis=1)  # [R, T]
    mask = (batch.pair >= 0) & (ahead(batch.pair, -1) == batch.pair) & (ahead(batch.branch, 2) < 2) & ~ahead(is_end, True)
    which = (batch.pair[:, None] == jnp.arange(batch.weight.shape[1])[:, None]) & mask[:, None]  # [R, N, T]
    share = batch.weight / jnp.maximum(jnp.sum(which, -1), 1)  # of one token of each pair
    weights = jnp.sum(jnp.where(which, share[..., None], 0.0), 1)
    nll, _ = chunked_nll(model, params, hidden, ahead(batch.tokens, 0), weights, chunk)
    return jnp.sum(nll) / jnp.maximum(jnp.sum(batch.weight > 0), 1)


def preference_objective(model: Model, cfg: PreferenceLoss = PreferenceLoss()) -> LossFn:
    """The mean preference loss over `Pairs` or `PackedPairs`, plus `lm_coef` x the chosen dialogues' mean nats per token.

    Each pair's loss is multiplied by its weight, lambda for harmless ones: L_help + lambda L_harm of Bai et al. 2022,
    section 5.1.2. The language-model term is a mean over pairs of each row's mean, with the same weights, so that
    micro-batches combine exactly.
    """

    def loss(params, batch: Pairs | PackedPairs, key):
        del key
        hidden = pair_states(model, params, batch) if cfg.lm_coef else None
        chosen, rejected = pair_scores(model, params, batch, hidden)
        nats = preference_loss(chosen, rejected)
        total = weighted_mean(nats, batch.weight)
        metrics = preference_metrics(chosen, rejected, batch.weight)
        metrics["pm_loss"] = masked_mean(nats, batch.weight > 0)
        if cfg.lm_coef:
            lm = chosen_nats(model, params, batch, hidden, cfg.lm_chunk)
            total, metrics = total + cfg.lm_coef * lm, metrics | {"lm_loss": lm}
        return total, metrics

    return loss
