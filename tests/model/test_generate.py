"""Sampling: what it draws, from which distribution, and that it is the distribution that training sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hhjax.model.generate import (Sampling, before_reply_tokens, filtered, generate, joined, policy_logits, reply_logps,
                                  reply_tokens)  # fmt: skip
from hhjax.model.transformer import ModelConfig, make_model
from hhjax.sharding import MeshConfig, batch_sharding, make_mesh, param_shardings
from hhjax.types import Tokens, Vocabulary

VOCAB = Vocabulary(pad=0, eot=1, eoc=2, size=60)  # the model has four rows more
R = 12


@pytest.fixture(scope="module")
def model():
    return make_model(ModelConfig(2, 32, 4, 2, 8, 64, vocab=64))


@pytest.fixture(scope="module")
def params(model):
    """Larger embeddings than at the start of training, so that the distributions are far from uniform."""
    params = model.init(jax.random.key(0))
    return params | {"embed": 20 * params["embed"]}


def make_prompts(rows=6, width=9, seed=0) -> Tokens:
    rng = np.random.default_rng(seed)
    length = rng.integers(1, width + 1, rows).astype(np.int32)
    length[0] = width
    tokens = np.where(np.arange(width)[None] < length[:, None], rng.integers(3, 60, (rows, width)), 0).astype(np.int32)
    return Tokens(jnp.array(tokens), jnp.array(length), jnp.array(length))


def draw(model, params, prompts, cfg=Sampling(R), seed=1, ids=None):
    ids = jnp.arange(len(prompts.length)) if ids is None else ids
    return jax.jit(lambda p, x, i: generate(model, p, x, i, jax.random.key(seed), VOCAB, cfg))(params, prompts, ids)


def test_the_logps_are_those_of_a_full_forward(model, params):
    samples = draw(model, params, make_prompts())
    tokens, mask = reply_tokens(samples.rows, R)
    hidden = before_reply_tokens(model.apply(params, samples.rows.tokens)[0], samples.rows, R)
    logp, entropy = reply_logps(model, params, hidden, tokens, VOCAB)
    np.testing.assert_allclose(np.where(mask, samples.logp, 0), np.where(mask, logp, 0), atol=1e-5)
    np.testing.assert_allclose(np.where(mask, samples.entropy, 0), np.where(mask, entropy, 0), atol=1e-5)
    assert float(jnp.abs(jnp.where(mask, 0, samples.logp)).max()) == 0  # and none past the end


def test_logps_by_chunks_are_the_same(model, params):
    samples = draw(model, params, make_prompts())
    tokens, _ = reply_tokens(samples.rows, R)
    hidden = before_reply_tokens(model.apply(params, samples.rows.tokens)[0], samples.rows, R)
    f = lambda p, chunk: reply_logps(model, p, hidden, tokens, VOCAB, 0.7, chunk)  # noqa: E731
    for whole, cut in zip(f(params, R), f(params, 5), strict=True):
        np.testing.assert_allclose(whole, cut, atol=1e-6)
    grads = [jax.grad(lambda p: f(p, chunk)[0].sum())(params) for chunk in (R, 5)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *grads)


def test_rows_are_prompt_reply_and_padding(model, params):
    prompts = make_prompts()
    samples = jax.device_get(draw(model, params, prompts))
    rows = samples.rows
    assert rows.tokens.shape == (6, 9 + R)
    np.testing.assert_array_equal(rows.prompt_len, prompts.length)
    for i in range(6):
        p, n = rows.prompt_len[i], rows.length[i]
        np.testing.assert_array_equal(rows.tokens[i, :p], prompts.tokens[i, :p])
        reply = rows.tokens[i, p:n]
        assert 1 <= len(reply) <= R and not set(reply) & {VOCAB.pad, VOCAB.eoc, 60, 61, 62, 63}
        assert (rows.tokens[i, n:] == VOCAB.pad).all()
        assert samples.stopped[i] == (reply[-1] == VOCAB.eot) and VOCAB.eot not in reply[:-1]
        assert samples.stopped[i] or len(reply) == R


def test_some_rows_stop_and_some_do_not(model, params):
    """What the other tests rest on: both endings occur."""
    stopped = draw(model, params, make_prompts(64), Sampling(R)).stopped
    assert 0 < int(stopped.sum()) < 64


def test_a_reply_does_not_depend_on_the_rows_beside_it(model, params):
    prompts = make_prompts()
    whole = draw(model, params, prompts)
    for part in (slice(0, 2), slice(2, 6)):
        alone = draw(model, params, jax.tree.map(lambda x: x[part], prompts), ids=jnp.arange(6)[part])
        np.testing.assert_array_equal(alone.rows.tokens, whole.rows.tokens[part])
    other = draw(model, params, prompts, seed=2)
    assert (other.rows.tokens != whole.rows.tokens).any()


def test_the_draws_follow_the_distribution(model, params):
    """20,000 first tokens after one prompt: every frequency within five standard errors of its probability."""
    n, prompt = 20_000, jax.tree.map(lambda x: x[:1], make_prompts())
    many = jax.tree.map(lambda x: jnp.repeat(x, n, 0), prompt)
    samples = draw(model, params, many, Sampling(1, temperature=1.5))
    hidden = model.apply(params, prompt.tokens)[0][0, prompt.length[0] - 1]
    p = np.asarray(jax.nn.softmax(policy_logits(model, params, hidden, VOCAB, 1.5)))
    first, _ = reply_tokens(samples.rows, 1)
    seen = np.bincount(np.asarray(first[:, 0]), minlength=64) / n
    assert (np.abs(seen - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1e-9).all()
    np.testing.assert_allclose(np.exp(samples.logp[:, 0]), p[first[:, 0]], rtol=1e-4)
    np.testing.assert_allclose(samples.entropy[0, 0], -(p[p > 0] * np.log(p[p > 0])).sum(), rtol=1e-4)


def test_temperature_zero_is_greedy(model, params):
    samples = jax.device_get(draw(model, params, make_prompts(), Sampling(R, temperature=0)))
    hidden = before_reply_tokens(model.apply(params, samples.rows.tokens)[0], samples.rows, R)
    best = jnp.argmax(policy_logits(model, params, hidden, VOCAB), -1)
    tokens, mask = reply_tokens(samples.rows, R)
    assert (np.where(mask, tokens, 0) == np.where(mask, best, 0)).all()


@pytest.mark.parametrize(("cfg", "kept"), [(Sampling(top_k=2), {0, 1}), (Sampling(top_p=0.55), {0, 1}),
                                           (Sampling(top_p=0.45), {0}), (Sampling(top_p=0.8, top_k=3), {0, 1}),
                                           (Sampling(), {0, 1, 2, 3})])  # fmt: skip
def test_top_k_and_top_p(cfg, kept):
    """Probabilities 0.5, 0.3, 0.15, 0.05: top_p keeps the smallest set that reaches it."""
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    assert {int(i) for i in np.flatnonzero(filtered(logits, cfg)[0] > -1e20)} == kept


def test_it_ends_early_when_all_rows_are_done(model, params):
    """A model that can only say <eot> takes one step: the loop does not go on to the limit."""
    def steps(vocab):
        count = 0

        def counted(*args):
            nonlocal count
            count += 1
            return model.apply(*args)

        with jax.disable_jit():
            generate(model._replace(apply=counted), params, make_prompts(2), jnp.arange(2), jax.random.key(0), vocab, Sampling(6))
        return count

    assert steps(Vocabulary(0, 1, 2, size=2)) == 1  # the prompt's forward alone
    assert steps(Vocabulary(0, 63, 2, size=63)) == 6  # <eot> never


def test_joined_leaves_no_gap():
    prompts = Tokens(jnp.array([[5, 6, 7], [5, 0, 0]]), jnp.array([3, 1]), jnp.array([3, 1]))
    rows = joined(prompts, jnp.array([[8, 1], [9, 9]]), VOCAB)
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 7, 8, 1], [5, 9, 9, 0, 0]])
    np.testing.assert_array_equal(rows.length, [5, 3])


@pytest.mark.parametrize("mesh", [MeshConfig(8), MeshConfig(2, 2, 2)])
def test_a_mesh_draws_the_same(model, params, mesh):
    """Up to near-ties: the log-probabilities agree, and with these seeds no tie was near enough to matter."""
    mesh = make_mesh(mesh)
    sharded = make_model(model.config, mesh)
    places = param_shardings(sharded.axes(), params, mesh)
    prompts = make_prompts(8)
    rows = batch_sharding(mesh)
    sample = jax.jit(lambda p, x, i: generate(sharded, p, x, i, jax.random.key(1), VOCAB, Sampling(R)),
                     in_shardings=(places, rows, rows))  # fmt: skip
    found, one = sample(params, prompts, jnp.arange(8)), draw(model, params, prompts)
    np.testing.assert_array_equal(found.rows.tokens, one.rows.tokens)
    np.testing.assert_allclose(found.logp, one.logp, atol=1e-5)


def test_sampling_is_checked():
    with pytest.raises(ValueError, match="top_p"):
        Sampling(top_p=0.0)
