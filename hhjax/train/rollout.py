"""Rollouts: samples scored by preference models, the reference and the value network, as the frozen batch of an update."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hhjax.model.replies import before_reply_tokens, by_chunks, policy_logits, reply_logps, reply_tokens
from hhjax.objectives.advantage import explained_variance, gae, shaped_rewards, whiten
from hhjax.objectives.kl import kl_k1, kl_k3
from hhjax.objectives.masked import masked_mean, masked_sum
from hhjax.objectives.preference import end_scores
from hhjax.types import Actor, Model, PackedReplies, Rollout, Samples, Tokens, Vocabulary


@dataclass(frozen=True)
class RolloutConfig:
    """gamma, lam: of generalised advantage estimation. whiten: advantages to mean 0 and variance 1 over the rollout.
    no_stop_score: what a reply that never stopped scores instead of what the PM says (None: the PM's word).
    recompute: log-probabilities of the samples by a full forward instead of the sampler's: None where the two may differ by more than
    rounding, which is in any dtype but f32."""

    gamma: float = 1.0  # Bai et al. 2022, section 4.1
    lam: float = 0.95
    whiten: bool = True
    no_stop_score: float | None = None
    recompute: bool | None = None


class Judges(NamedTuple):
    """The frozen models of a rollout. reference, reward: Model; tests: name -> Model. Their parameters come with each call."""

    reference: Model
    reward: Model
    tests: Mapping[str, Model]


def make_actor(policy: Model, value: Model | None, vocab: Vocabulary, width: int, temperature: float = 1.0, ways: int = 1) -> Actor:
    """(params, rows) -> logp, values and entropy of the reply tokens, [B, width] each; the caller masks.

    params: {"policy", "value"}, or {"policy"} alone where value is None: then the score head of the policy's trunk is read.
    ways: the shards of the batch, see PackedReplies.
    """

    def actor(params, rows: Tokens | PackedReplies):
        tokens, _ = reply_tokens(rows, width)
        hidden = before_reply_tokens(policy, params["policy"], rows, width, ways)
        logp, entropy = reply_logps(policy, params["policy"], hidden, tokens, vocab, temperature)
        if value is None:
            return logp, policy.score(params["policy"], hidden), entropy
        seen = before_reply_tokens(value, params["value"], rows, width, ways)
        return logp, value.score(params["value"], seen), entropy

    return actor


def make_score(actor: Actor, judges: Judges, vocab: Vocabulary, width: int, cfg: RolloutConfig, recompute: bool,
               temperature: float = 1.0, ways: int = 1):
    """score(params, frozen, samples, rows, offsets, beta) -> (Rollout, report), to be jitted.

    rows: what models read of the samples, `samples.rows` or PackedReplies of them; ways: the shards of these.
    frozen: {"reference", "reward", "tests": {name: ...}} parameters. offsets: {"reward", "tests"} scores to subtract, and "value", what a
    centred score is on the value network's scale: 0 where it started from a head of zeros, else about what it predicts at its start.
    report: per sample, [B] each: score, test scores, k1 and k3 KL in nats, length, stopped, means over the reply of values and returns;
    and scalars of the whole batch.
    """

    def score(params, frozen, samples: Samples, rows: Tokens | PackedReplies, offsets, beta):
        tokens, mask = reply_tokens(rows, width)
        logp, values, entropy = actor(params, rows)
        drift = {}
        if recompute:
            drift = {"sampler_drift_max": jnp.max(jnp.where(mask, jnp.abs(samples.logp - logp), 0.0))}
        else:  # the sampler's are the same to rounding, and the policy's forward falls away
            logp, entropy = samples.logp, samples.entropy
        hidden = before_reply_tokens(judges.reference, frozen["reference"], rows, width, ways)
        ref_logp, _ = reply_logps(judges.reference, frozen["reference"], hidden, tokens, vocab, temperature)
        closed = rows if isinstance(rows, PackedReplies) else closed_rows(samples, vocab)
        judge = lambda model, params, offset: end_scores(model, params, closed, ways=ways) - offset  # noqa: E731
        said = judge(judges.reward, frozen["reward"], offsets["reward"])
        tests = {n: judge(m, frozen["tests"][n], offsets["tests"][n]) for n, m in judges.tests.items()}
        paid = said if cfg.no_stop_score is None else jnp.where(samples.stopped, said, cfg.no_stop_score)
        logp, ref_logp, values, entropy = (jnp.where(mask, x, 0.0) for x in (logp, ref_logp, values, entropy))
        k1 = kl_k1(logp, ref_logp)
        rewards = shaped_rewards(paid + offsets["value"], k1, mask, beta)
        advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam)
        report = {
            "score": said,
            **{f"test/{name}": x for name, x in tests.items()},
            "k1": masked_sum(k1, mask, -1),
            "k3": masked_sum(kl_k3(logp, ref_logp), mask, -1),
            "length": jnp.sum(mask, -1),
            "stopped": samples.stopped,
            "entropy": masked_mean(entropy, mask),
            "explained_variance": explained_variance(values, returns, mask),
            "value_mean": masked_mean(values, mask, -1) - offsets["value"],
            "return_mean": masked_mean(returns, mask, -1) - offsets["value"],
        } | drift
        if cfg.whiten:
            advantages = whiten(advantages, mask)
        return Rollout(rows, mask, logp, ref_logp, values, advantages, returns), report

    return score


def closed_rows(samples: Samples, vocab: Vocabulary) -> Tokens:
    """The rows as a PM reads them, [B, T + 2]: each reply ends in <eot> <eoc>, as the replies that it was trained on.

    A reply cut off at the length limit is closed too: the PM judges what is there, and no_stop_score what is missing.
    """
    rows = samples.rows
    tokens = jnp.pad(rows.tokens, ((0, 0), (0, 2)), constant_values=vocab.pad)
    at = jnp.arange(tokens.shape[1])[None]
    eot_at = jnp.where(samples.stopped, rows.length - 1, rows.length)[:, None]
    tokens = jnp.where(at == eot_at, vocab.eot, jnp.where(at == eot_at + 1, vocab.eoc, tokens))
    return Tokens(tokens, rows.prompt_len, eot_at[:, 0] + 2)


def make_exact_kl(policy: Model, reference: Model, vocab: Vocabulary, width: int, temperature: float = 1.0):
    """exact_kl(policy_params, reference_params, rows) -> [B]: sum over the reply's tokens of the KL between the two models'
    next-token distributions, in nats: what k1 estimates with noise."""

    def exact_kl(policy_params, reference_params, rows: Tokens):
        sides = ((policy, policy_params), (reference, reference_params))
        hidden = tuple(before_reply_tokens(model, p, rows, width) for model, p in sides)

        def one(hidden):
            logp, ref_logp = (jax.nn.log_softmax(policy_logits(model, p, h, vocab, temperature)[..., : vocab.size])
                              for (model, p), h in zip(sides, hidden))  # fmt: skip
            return jnp.sum(jnp.exp(logp) * (logp - ref_logp), -1)

        return masked_sum(by_chunks(one, hidden), reply_tokens(rows, width)[1], -1)

    return exact_kl
