"""Cross-entropy: log V at random weights, padding and prompts out of the loss, chunks without effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hhjax.model.sizes import model_config
from hhjax.model.transformer import make_model
from hhjax.objectives.lm import LMLoss, lm_loss, lm_objective, next_tokens, token_nll
from hhjax.types import Tokens

CFG = model_config("0.1M", 100)
MODEL = make_model(CFG)
PARAMS = MODEL.init(jax.random.key(0))


def rows(length=(12, 9, 4), prompt=(0, 3, 2), seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (3, 12), 0, CFG.vocab)
    return Tokens(tokens, jnp.array(prompt), jnp.array(length))


def test_uniform_logits_cost_log_v():
    loss, metrics = lm_loss(jnp.zeros((2, 3, 50)), jnp.zeros((2, 3), int), jnp.ones((2, 3), bool))
    assert loss == pytest.approx(np.log(50))
    assert metrics["weight"] == 6


def test_a_fresh_model_starts_near_log_v():
    loss, _ = lm_objective(MODEL)(PARAMS, rows(), None)
    assert float(loss) == pytest.approx(np.log(CFG.vocab), abs=0.15)


def test_the_loss_equals_a_plain_loop_over_the_loss_part():
    batch = rows()
    logits = np.asarray(MODEL.logits(PARAMS, MODEL.apply(PARAMS, batch.tokens)[0]), np.float64)
    terms = []
    for b in range(3):
        for t in range(int(batch.prompt_len[b]), int(batch.length[b])):
            if t > 0:  # the first token of a row has nothing before it
                row = logits[b, t - 1]
                terms.append(np.log(np.exp(row).sum()) - row[batch.tokens[b, t]])
    loss, metrics = lm_objective(MODEL)(PARAMS, batch, None)
    assert float(loss) == pytest.approx(np.mean(terms), abs=1e-5)
    assert int(metrics["weight"]) == len(terms)


def test_targets_are_shifted_by_one_and_stop_at_the_row_s_end():
    targets, mask = next_tokens(Tokens(jnp.array([[5, 6, 7, 0]]), jnp.array([2]), jnp.array([3])))
    assert targets.tolist() == [[6, 7, 0, 0]]
    assert mask.tolist() == [[False, True, False, False]]


def test_padding_changes_neither_loss_nor_gradient():
    short = rows()
    long = short._replace(tokens=jnp.pad(short.tokens, ((0, 0), (0, 8)), constant_values=7))
    grad = jax.value_and_grad(lambda p, b: lm_objective(MODEL)(p, b, None)[0])
    (a, da), (b, db) = grad(PARAMS, short), grad(PARAMS, long)
    assert float(a) == pytest.approx(float(b), abs=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), da, db)


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_chunks_change_neither_loss_nor_gradient(chunk):
    grad = lambda c: jax.value_and_grad(lambda p: lm_objective(MODEL, LMLoss(c))(p, rows(), None)[0])(PARAMS)  # noqa: E731
    (a, da), (b, db) = grad(0), grad(chunk)
    assert float(a) == pytest.approx(float(b), abs=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), da, db)


def test_nll_is_finite_at_extreme_logits():
    nll, correct = token_nll(jnp.array([[1e4, -1e4], [1e4, -1e4]]), jnp.array([1, 0]))
    assert nll.tolist() == [2e4, 0] and correct.tolist() == [False, True]


def test_token_accuracy_is_the_share_of_likeliest_targets():
    logits = jax.random.normal(jax.random.key(3), (4, 5, 20))
    targets, mask = jnp.argmax(logits, -1).at[:2].set(19), jnp.ones((4, 5), bool)
    _, metrics = lm_loss(logits, targets, mask)
    assert float(metrics["token_accuracy"]) == pytest.approx(float(jnp.mean(jnp.argmax(logits, -1) == targets)))
