"""Sampling: what it draws, from which distribution, and that it is the distribution that training sees."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hhjax.model.generate import Sampling, draw_token, filtered, generate, invert, slots_of
from hhjax.model.replies import before_reply_tokens, joined, policy_logits, reply_logps, reply_tokens
from hhjax.model.transformer import ModelConfig, make_model
from hhjax.sharding import MeshConfig, batch_sharding, batch_ways, make_mesh, param_shardings
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


@pytest.fixture(scope="module")
def brief(model):
    """Its replies have from one token to all of R: <eot> is likelier."""
    return model._replace(logits=lambda params, hidden: model.logits(params, hidden) + 7.0 * (jnp.arange(64) == VOCAB.eot))


def make_prompts(rows=6, width=9, seed=0) -> Tokens:
    rng = np.random.default_rng(seed)
    length = rng.integers(1, width + 1, rows).astype(np.int32)
    length[0] = width
    tokens = np.where(np.arange(width)[None] < length[:, None], rng.integers(3, 60, (rows, width)), 0).astype(np.int32)
    return Tokens(jnp.array(tokens), jnp.array(length), jnp.array(length))


def draw(model, params, prompts, cfg=Sampling(R), seed=1, ids=None):
    ids = jnp.arange(len(prompts.length)) if ids is None else ids
    return jax.jit(lambda p, x, i: generate(model, p, x, i, jax.random.key(seed), VOCAB, cfg)[0])(params, prompts, ids)


def test_the_logps_are_those_of_a_full_forward(model, params):
    samples = draw(model, params, make_prompts())
    tokens, mask = reply_tokens(samples.rows, R)
    hidden = before_reply_tokens(model, params, samples.rows, R)
    logp, entropy = reply_logps(model, params, hidden, tokens, VOCAB)
    np.testing.assert_allclose(np.where(mask, samples.logp, 0), np.where(mask, logp, 0), atol=1e-5)
    np.testing.assert_allclose(np.where(mask, samples.entropy, 0), np.where(mask, entropy, 0), atol=1e-5)
    assert float(jnp.abs(jnp.where(mask, 0, samples.logp)).max()) == 0  # and none past the end


def test_logps_by_chunks_are_the_same(model, params):
    samples = draw(model, params, make_prompts())
    tokens, _ = reply_tokens(samples.rows, R)
    hidden = before_reply_tokens(model, params, samples.rows, R)
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
    hidden = before_reply_tokens(model, params, samples.rows, R)
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
    """A model that can only say <eot> takes no decode step: the loop does not go on to the limit."""
    steps = lambda vocab: int(generate(model, params, make_prompts(2), jnp.arange(2), jax.random.key(0), vocab, Sampling(6))[1])  # noqa: E731
    assert steps(Vocabulary(0, 1, 2, size=2)) == 0
    assert steps(Vocabulary(0, 63, 2, size=63)) == 5  # <eot> never


def test_joined_leaves_no_gap():
    prompts = Tokens(jnp.array([[5, 6, 7], [5, 0, 0]]), jnp.array([3, 1]), jnp.array([3, 1]))
    rows = joined(prompts, jnp.array([[8, 1], [9, 9]]), VOCAB)
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 7, 8, 1], [5, 9, 9, 0, 0]])
    np.testing.assert_array_equal(rows.length, [5, 3])


@pytest.mark.parametrize("slots", [0, 16])
@pytest.mark.parametrize("mesh", [MeshConfig(8), MeshConfig(2, 2, 2)])
def test_a_mesh_draws_the_same(model, brief, params, mesh, slots):
    """Up to near-ties: the log-probabilities agree, and with these seeds no tie was near enough to matter. Each shard has a queue."""
    mesh = make_mesh(mesh)
    sharded = make_model(model.config, mesh)
    places = param_shardings(sharded.axes(), params, mesh)
    sharded = sharded._replace(logits=brief.logits)
    prompts, cfg, rows = make_prompts(32), Sampling(R, slots=slots), batch_sharding(mesh)
    sample = jax.jit(lambda p, x, i: generate(sharded, p, x, i, jax.random.key(1), VOCAB, cfg, batch_ways(mesh))[0],
                     in_shardings=(places, rows, rows), out_shardings=rows)  # fmt: skip
    compiled = sample.lower(params, prompts, jnp.arange(32)).compile()
    found, one = compiled(jax.device_put(params, places), *jax.device_put((prompts, jnp.arange(32)), rows)), draw(brief, params, prompts)
    np.testing.assert_array_equal(found.rows.tokens, one.rows.tokens)
    np.testing.assert_allclose(found.logp, one.logp, atol=1e-5)
    cache = (R + 9) * model.config.kv_heads * model.config.head_dim  # of a row; what crosses devices in the loop is smaller
    moved = [np.prod([int(n) for n in dims.split(",") if n] or [1]) for dims in
             re.findall(r"= \w+\[([\d,]*)\]\S* all-(?:gather|to-all)\(", compiled.as_text())]  # fmt: skip
    assert mesh.shape["tensor"] > 1 or not [n for n in moved if n >= cache]


@pytest.mark.parametrize(("rows", "slots"), [(32, 8), (12, 1), (30, 15)])
def test_waiting_rows_take_the_places_of_those_that_ended(brief, params, rows, slots):
    """The replies are those of all rows at once, in fewer row-steps."""
    prompts = make_prompts(rows)
    sample = lambda cfg: jax.jit(lambda: generate(brief, params, prompts, jnp.arange(rows), jax.random.key(1), VOCAB, cfg))()  # noqa: E731
    (whole, whole_steps), (few, steps) = sample(Sampling(R)), sample(Sampling(R, slots=slots))
    np.testing.assert_array_equal(few.rows.tokens, whole.rows.tokens)
    np.testing.assert_array_equal(few.stopped, whole.stopped)
    np.testing.assert_allclose(few.logp, whole.logp, atol=1e-5)
    np.testing.assert_allclose(few.entropy, whole.entropy, atol=1e-5)
    lengths = np.asarray(whole.rows.length - whole.rows.prompt_len)
    assert lengths.min() == 1 and lengths.max() > R // 2
    assert (lengths - 1).sum() <= int(steps) * slots < int(whole_steps) * rows  # a first token costs no decode step


@pytest.mark.parametrize("slots", [0, 12, 6, 2])
def test_rows_of_one_prompt_read_it_together(brief, params, slots):
    prompts = make_prompts(4)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, 6, 0), prompts)
    ids = 100 + jnp.arange(24)
    shared, apart = (draw(brief, params, x, Sampling(R, slots=slots), ids=ids) for x in (prompts, repeated))
    np.testing.assert_array_equal(shared.rows.tokens, apart.rows.tokens)
    np.testing.assert_allclose(shared.logp, apart.logp, atol=1e-5)


@pytest.mark.parametrize(("rows", "slots", "ways", "said"), [(12, 5, 1, "5 slots over 1 shards"), (16, 4, 8, "multiple of the shards"),
                                                              (14, 0, 1, "14 rows of 4 prompts"), (16, 2, 1, None), (16, 64, 4, None)])  # fmt: skip
def test_what_does_not_divide_is_an_error(model, params, rows, slots, ways, said):
    if said is None:
        assert slots_of(Sampling(slots=slots), rows, ways) == min(slots, rows)
        return
    with pytest.raises(ValueError, match=said):
        generate(model, params, make_prompts(4), jnp.arange(rows), jax.random.key(1), VOCAB, Sampling(R, slots=slots), ways)


def test_draw_token_inverts_the_distribution():
    """Over several blocks: frequencies within five standard errors, and never a token of no probability, at the ends of blocks either."""
    n, rng = 20_000, np.random.default_rng(0)
    logits = rng.normal(size=300).astype(np.float32)
    logits[[0, 1, 2, 5, 126, 127, 128, 255, 256, 297, 298, 299]] = -1e30  # whole blocks of three among them
    p = np.exp(logits) / np.exp(logits).sum()
    tokens = jax.jit(draw_token)(jax.random.split(jax.random.key(0), n), jnp.tile(logits, (n, 1)))
    seen = np.bincount(np.asarray(tokens), minlength=300) / n
    assert (np.abs(seen - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1e-9).all()


def test_parts_without_size_are_never_found():
    """In long rows too, of which a compiler's running sum may fall by a rounding; and the largest share is still inside the last part."""
    rng = np.random.default_rng(0)
    for width in (7, 393, 1187):
        sizes = np.where(rng.random((400, width)) < 0.03, rng.random((400, width)), 0).astype(np.float32)
        sizes[:, width // 2] += 0.1
        edges = np.cumsum(sizes, -1)[np.arange(400), rng.integers(0, width, 400)] / sizes.sum(-1)  # where one part ends
        for share in (0 * edges, np.minimum(edges, 1 - 2.0**-23), np.full(400, 1 - 2.0**-23)):
            part, inside = jax.jit(invert)(sizes, share.astype(np.float32))
            assert (sizes[np.arange(400), part] > 0).all() and (inside >= 0).all() and (inside < 1).all()


def test_sampling_is_checked():
    with pytest.raises(ValueError, match="top_p"):
        Sampling(top_p=0.0)
