"""Bradley-Terry: worked values, its laws, where the score is read, weights and the language-model term."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hhjax.model.sizes import model_config
from hhjax.model.transformer import make_model
from hhjax.objectives.preference import (
    PreferenceLoss, both_rows, end_scores, pair_scores, pair_states, preference_loss, preference_metrics, preference_objective,
)  # fmt: skip
from hhjax.types import PackedPairs, Pairs, Tokens

CFG = model_config("0.1M", 100)
MODEL = make_model(CFG)
PARAMS = MODEL.init(jax.random.key(0)) | {"score": jax.random.normal(jax.random.key(9), (CFG.width,))}


def side(seed, length):
    tokens = jax.random.randint(jax.random.key(seed), (3, 10), 3, CFG.vocab)
    return Tokens(jnp.where(jnp.arange(10) < length[:, None], tokens, 0), jnp.array([2, 3, 4]), length)


def pairs(weight=(1.0, 1.0, 1.0)):
    return Pairs(side(1, jnp.array([10, 7, 6])), side(2, jnp.array([8, 9, 6])), jnp.array(weight))


def test_worked_values():
    assert float(preference_loss(0.0, 0.0)) == pytest.approx(np.log(2))
    assert float(preference_loss(1.0, 0.0)) == pytest.approx(np.log1p(np.exp(-1)))
    assert float(preference_loss(-500.0, 500.0)) == pytest.approx(1000.0)


def test_adding_a_constant_to_both_scores_changes_nothing():
    chosen, rejected = jnp.array([0.3, -1.2]), jnp.array([0.1, 2.0])
    np.testing.assert_allclose(preference_loss(chosen, rejected), preference_loss(chosen + 5, rejected + 5), rtol=1e-5)


def test_the_gradient_is_minus_the_probability_of_being_wrong():
    margin = jnp.array(0.7)
    assert float(jax.grad(preference_loss)(margin, 0.0)) == pytest.approx(-1 / (1 + np.exp(0.7)))


def test_a_fresh_model_s_loss_is_exactly_log_2():
    params = MODEL.init(jax.random.key(0))
    loss, metrics = preference_objective(MODEL)(params, pairs(), None)
    assert float(loss) == pytest.approx(np.log(2), abs=1e-6)
    assert float(metrics["accuracy"]) == 0.5  # ties count half


def test_the_score_is_read_at_the_last_token_of_each_row():
    batch = pairs().chosen
    hidden, _ = MODEL.apply(PARAMS, batch.tokens)
    by_hand = [float(MODEL.score(PARAMS, hidden[b, int(n) - 1])) for b, n in enumerate(batch.length)]
    np.testing.assert_allclose(end_scores(MODEL, PARAMS, batch), by_hand, rtol=1e-5)


def test_interleaving_keeps_each_side_with_its_score():
    batch = pairs()
    (chosen, rejected), hidden = pair_scores(MODEL, PARAMS, batch), pair_states(MODEL, PARAMS, batch)
    np.testing.assert_allclose(chosen, end_scores(MODEL, PARAMS, batch.chosen), atol=1e-5)
    np.testing.assert_allclose(rejected, end_scores(MODEL, PARAMS, batch.rejected), atol=1e-5)
    np.testing.assert_allclose((chosen, rejected), pair_scores(MODEL, PARAMS, batch, hidden), atol=1e-5)
    assert both_rows(batch).tokens.shape == (6, 10) and hidden.shape == (6, 10, CFG.width)


def test_what_stands_after_the_end_changes_nothing():
    batch = pairs()
    dirty = batch.chosen._replace(tokens=jnp.where(jnp.arange(10) < batch.chosen.length[:, None], batch.chosen.tokens, 77))
    loss = preference_objective(MODEL, PreferenceLoss(lm_coef=0.5))
    np.testing.assert_allclose(loss(PARAMS, batch, None)[0], loss(PARAMS, batch._replace(chosen=dirty), None)[0], rtol=1e-6)


def test_swapping_the_sides_negates_the_margin():
    batch = pairs()
    _, there = preference_objective(MODEL)(PARAMS, batch, None)
    _, back = preference_objective(MODEL)(PARAMS, Pairs(batch.rejected, batch.chosen, batch.weight), None)
    assert float(there["margin"]) == pytest.approx(-float(back["margin"]), abs=1e-5)
    assert float(there["accuracy"]) == pytest.approx(1 - float(back["accuracy"]), abs=1e-6)


def test_lambda_weighs_a_pair_as_if_it_stood_there_that_often():
    often = jax.tree.map(lambda x: x[jnp.array([0, 1, 1, 1, 2])], pairs())
    loss = preference_objective(MODEL, PreferenceLoss(lm_coef=0.5))
    weighted, metrics = loss(PARAMS, pairs((1.0, 3.0, 1.0)), None)
    repeated, _ = loss(PARAMS, often, None)
    assert 3 * float(weighted) == pytest.approx(5 * float(repeated), abs=1e-4)
    assert float(metrics["weight"]) == 3


def test_lambda_is_not_divided_away_where_every_pair_has_it():
    loss = preference_objective(MODEL)
    assert float(loss(PARAMS, pairs((3.0, 3.0, 3.0)), None)[0]) == pytest.approx(3 * float(loss(PARAMS, pairs(), None)[0]))


def test_a_pair_of_no_weight_is_as_if_it_were_not_there():
    loss = preference_objective(MODEL, PreferenceLoss(lm_coef=0.5))
    there, metrics = loss(PARAMS, pairs((1.0, 1.0, 0.0)), None)
    without, expected = loss(PARAMS, jax.tree.map(lambda x: x[:2], pairs()), None)
    assert float(there) == pytest.approx(float(without), abs=1e-5)
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-5)


def test_the_end_of_context_token_is_no_target_of_the_language_model_term():
    batch = pairs()
    last = (batch.chosen.length - 1)[:, None]
    other = jnp.where(jnp.arange(10) == last, 5, batch.chosen.tokens)
    loss = preference_objective(MODEL, PreferenceLoss(lm_coef=0.5))
    a, b = (loss(PARAMS, batch._replace(chosen=batch.chosen._replace(tokens=t)), None)[1] for t in (batch.chosen.tokens, other))
    assert float(a["lm_loss"]) == pytest.approx(float(b["lm_loss"]), abs=1e-6)


def test_the_language_model_term_is_the_chosen_side_s_nats_per_token():
    plain, _ = preference_objective(MODEL)(PARAMS, pairs(), None)
    with_lm, metrics = preference_objective(MODEL, PreferenceLoss(lm_coef=0.5))(PARAMS, pairs(), None)
    assert float(with_lm) == pytest.approx(float(plain) + 0.5 * float(metrics["lm_loss"]), abs=1e-5)
    rejected = pairs()._replace(rejected=side(3, jnp.array([8, 9, 6])))
    _, other = preference_objective(MODEL, PreferenceLoss(lm_coef=0.5))(PARAMS, rejected, None)
    assert float(other["lm_loss"]) == pytest.approx(float(metrics["lm_loss"]), abs=1e-6)


def test_metrics_count_every_pair_once():
    m = preference_metrics(jnp.array([1.0, 0.0, 9.0]), jnp.array([0.0, 2.0, 0.0]), jnp.array([3.0, 1.0, 0.0]))
    assert float(m["accuracy"]) == 0.5 and float(m["margin"]) == pytest.approx((1 - 2) / 2)


def packed(rows, width=40, most=3):
    """`rows` of pairs (prompt, chosen, rejected, weight), each a list of ids, as PackedPairs; and the same as Pairs."""
    shape, flat = (len(rows), width), [pair for row in rows for pair in row]
    tokens, positions, branch, pair = (np.full(shape, fill, np.int32) for fill in (0, 0, 0, -1))
    ends, weight = np.zeros((len(rows), most, 2), np.int32), np.zeros((len(rows), most), np.float32)
    for r, row in enumerate(rows):
        at = 0
        for n, (prompt, chosen, rejected, w) in enumerate(row):
            for b, part in enumerate((prompt, chosen, rejected)):
                here = np.s_[r, at : at + len(part)]
                tokens[here], branch[here], pair[here] = part, b, n
                positions[here] = (len(prompt) if b else 0) + np.arange(len(part))
                at += len(part)
                if b:
                    ends[r, n, b - 1] = at - 1
            weight[r, n] = w

    def side(index):
        ids = [p[0] + p[index] for p in flat]
        lengths = np.array([len(p[0]) for p in flat]), np.array([len(i) for i in ids])
        return Tokens(np.stack([np.pad(i, (0, width - len(i))) for i in ids]).astype(np.int32), *lengths)

    return PackedPairs(tokens, positions, pair, branch, ends, weight), Pairs(side(1), side(2), np.array([p[3] for p in flat], np.float32))


@pytest.fixture(scope="module")
def ragged():
    ids = lambda n, seed: np.random.default_rng(seed).integers(3, CFG.vocab, n).tolist()  # noqa: E731
    pair = lambda p, c, r, w, seed: (ids(p, seed), ids(c, seed + 1), ids(r, seed + 2), w)  # noqa: E731
    return packed([[pair(5, 3, 7, 1.0, 0), pair(2, 9, 1, 0.5, 10)], [pair(11, 2, 4, 2.0, 20), pair(1, 1, 3, 1.0, 30), pair(4, 6, 5, 0.0, 40)],
                   [pair(20, 10, 9, 1.0, 50)]])  # fmt: skip


@pytest.mark.parametrize("lm_coef", (0.0, 0.7))
def test_packed_pairs_give_the_loss_and_gradients_of_two_rows_a_pair(ragged, lm_coef):
    objective = preference_objective(MODEL, PreferenceLoss(lm_coef=lm_coef, lm_chunk=7))
    found = [jax.value_and_grad(objective, has_aux=True)(PARAMS, batch, None) for batch in ragged]
    (values, grads) = zip(*found)
    assert float(values[0][0]) == pytest.approx(float(values[1][0]), rel=1e-5)
    for name, x in values[1][1].items():
        assert float(values[0][1][name]) == pytest.approx(float(x), rel=1e-4, abs=1e-5), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(jnp.max(jnp.abs(b))))), *grads)


def test_packed_scores_are_those_of_rows_of_their_own(ragged):
    batch, plain = ragged
    chosen, rejected = pair_scores(MODEL, PARAMS, batch)
    real = np.array([[True, True, False], [True, True, True], [True, False, False]])
    np.testing.assert_allclose(np.stack([chosen[real], rejected[real]]), np.stack(pair_scores(MODEL, PARAMS, plain)), atol=2e-5)


def test_packing_needs_its_mask_and_its_positions(ragged):
    batch, plain = ragged
    right = pair_scores(MODEL, PARAMS, plain)[1]
    flat = lambda x: x[batch.weight > 0]  # noqa: E731
    weighted = np.asarray(right)[np.asarray(plain.weight) > 0]
    for wrong in (batch._replace(pair=np.zeros_like(batch.pair)), batch._replace(branch=np.zeros_like(batch.branch)),
                  batch._replace(positions=np.broadcast_to(np.arange(40, dtype=np.int32), batch.positions.shape))):  # fmt: skip
        assert np.max(np.abs(flat(np.asarray(pair_scores(MODEL, PARAMS, wrong)[1])) - weighted)) > 1e-3
