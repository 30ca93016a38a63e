"""Scores of comparisons: every row, in order, whatever its length and the batches it is scored in."""

import jax
import numpy as np
import pytest

from hhjax.data.comparisons import Comparison
from hhjax.data.records import DataError
from hhjax.data.stream import encode_prompt, encode_reply
from hhjax.data.tokenizer import load_tokenizer
from hhjax.evals.preference import score_comparisons
from hhjax.model.sizes import model_config
from hhjax.model.transformer import make_model
from hhjax.sharding import make_mesh

SEQ_LEN = 64


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def scorer(tokenizer):
    """A random preference model, and score(rows, batch_size) on a mesh of eight devices."""
    mesh = make_mesh()
    model = make_model(model_config("0.1M", tokenizer.vocab_size), mesh)
    params = model.init(jax.random.key(0))
    params["score"] = jax.random.normal(jax.random.key(1), params["score"].shape)
    return model, params, lambda rows, batch: score_comparisons(model, params, tokenizer, rows, SEQ_LEN, batch, mesh)


@pytest.fixture(scope="module")
def rows():
    """Short pairs with a long one among them at both ends and in the middle: 100 and 300 tokens of reply and more."""
    words = "the cat sat on a mat and then it ran far away".split()
    made = []
    for i in range(21):
        reply = " ".join(words[(i + j) % len(words)] for j in range({0: 300, 7: 100, 20: 100}.get(i, 2 + i % 5)))
        chosen, rejected = (f"{reply} dogs", "birds") if i % 2 else ("birds", f"{reply} dogs")
        made.append(Comparison(f"\n\nHuman: {words[i % 9]} {i}\n\nAssistant:", chosen, rejected))
    return made


def direct(scorer, tokenizer, rows) -> np.ndarray:
    """Both scores of every row by one wide forward, without a mesh."""
    model, params = make_model(scorer[0].config), scorer[1]
    ids = [
        np.concatenate([encode_prompt(tokenizer, row.prompt), encode_reply(tokenizer, reply), [tokenizer.eoc_id]])
        for row in rows
        for reply in (row.chosen, row.rejected)
    ]
    assert max(map(len, ids)) > 4 * SEQ_LEN  # so that seq_len must double more than twice
    tokens = np.stack([np.pad(row, (0, 1024 - len(row))) for row in ids])
    last = np.array([len(row) - 1 for row in ids])
    score = jax.jit(lambda p: model.score(p, model.apply(p, tokens)[0][np.arange(len(ids)), last]))
    return np.asarray(score(params)).reshape(-1, 2)


def test_every_row_is_scored_at_its_place_as_a_direct_forward_does(scorer, tokenizer, rows):
    scores, some = scorer[2](rows, 8), [0, 1, 2, 7, 19, 20]
    assert scores.shape == (21, 2) and np.all(np.isfinite(scores))
    np.testing.assert_allclose(scores[some], direct(scorer, tokenizer, [rows[i] for i in some]), atol=2e-5)
    assert len(np.unique(scores.round(4))) > 20  # or order would not show


def test_batches_and_order_have_no_effect(scorer, rows):
    score = scorer[2]
    scores = score(rows, 8)
    np.testing.assert_allclose(score(rows, 24), scores, atol=2e-5)
    np.testing.assert_allclose(score(rows[::-1], 8), scores[::-1], atol=2e-5)
    assert score([], 8).shape == (0, 2)


def test_rows_that_no_width_helps_are_an_error(scorer):
    with pytest.raises(DataError, match="must end in"):
        scorer[2]([Comparison("\n\nHuman: a", "b", "c")], 8)


def test_long_rows_take_no_more_memory_than_the_others(scorer, rows, tokenizer):
    """A few pairs of several times seq_len once filled whole batches with copies of themselves: 17 GB on real comparisons."""
    model, params, _ = scorer
    seen = []
    watched = model._replace(apply=lambda params, tokens, *args, **kw: seen.append(tokens.shape) or model.apply(params, tokens, *args, **kw))
    score_comparisons(watched, params, tokenizer, rows, SEQ_LEN, 512, make_mesh())
    squares = [b * t * t for b, t in seen]
    assert max(t for _, t in seen) > 4 * SEQ_LEN and max(squares) <= 1024 * SEQ_LEN**2
