"""Rollouts: what a PM is shown, that the ratio begins at 1, and that a toy reward is learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hhjax.data.packing import ReplyPacker
from hhjax.model.generate import Sampling, generate
from hhjax.model.transformer import ModelConfig, make_model
from hhjax.objectives.advantage import gae, shaped_rewards
from hhjax.objectives.ppo import PPOLoss, ppo_objective
from hhjax.sharding import MeshConfig, batch_sharding, batch_ways, batches_sharding, make_mesh, param_shardings
from hhjax.train.rollout import Judges, RolloutConfig, closed_rows, make_actor, make_exact_kl, make_score
from hhjax.train.state import OptimConfig, init_state, join_policy, make_parts_optimizer, split_policy, state_shardings
from hhjax.train.step import make_ppo_update, make_train_step
from hhjax.types import Samples, Tokens, Vocabulary

VOCAB, R = Vocabulary(0, 1, 2, 30), 8
CONFIG = ModelConfig(2, 32, 2, 2, 16, 64, vocab=32)
OFFSETS = {"reward": 0.25, "value": 0.0, "tests": {"other": -1.0}}


def make_all(mesh=None, batch=8):
    model = make_model(CONFIG, mesh)
    trees = [model.init(jax.random.key(i)) for i in range(4)]
    policy, reward, value, other = (p | {"embed": 8 * p["embed"], "score": jax.random.normal(jax.random.key(9), (32,))} for p in trees)
    rng = np.random.default_rng(0)
    length = jnp.array(rng.integers(1, 7, batch), jnp.int32)
    tokens = jnp.where(jnp.arange(6)[None] < length[:, None], jnp.array(rng.integers(3, 30, (batch, 6))), 0)
    frozen = {"reference": jax.tree.map(lambda x: 1.1 * x, policy), "reward": reward, "tests": {"other": other}}
    return model, {"policy": policy, "value": value}, frozen, Tokens(tokens.astype(jnp.int32), length, length)


def make_parts(model, cfg=RolloutConfig(), recompute=False, ways=1):
    actor = make_actor(model, model, VOCAB, R, ways=ways)
    return actor, make_score(actor, Judges(model, model, {"other": model}), VOCAB, R, cfg, recompute, ways=ways)


def packed(samples, ways=1, batches=None):
    return ReplyPacker(6, R, VOCAB, ways, halve=True).pack(*jax.device_get((samples.rows, samples.stopped)), batches)


@pytest.fixture(scope="module")
def scored():
    model, params, frozen, prompts = make_all()
    samples, _ = generate(model, params["policy"], prompts, jnp.arange(8), jax.random.key(0), VOCAB, Sampling(R))
    actor, score = make_parts(model)
    return model, params, frozen, samples, actor, *score(params, frozen, samples, samples.rows, OFFSETS, 0.1)


def test_a_pm_reads_replies_that_end_in_eot_and_eoc():
    """The stop is there once, whether it was sampled or not; nothing follows <eoc>."""
    rows = Tokens(jnp.array([[5, 6, 7, 1, 0], [5, 6, 7, 8, 9]]), jnp.array([2, 2]), jnp.array([4, 5]))
    closed = closed_rows(Samples(rows, None, None, jnp.array([True, False])), VOCAB)
    np.testing.assert_array_equal(closed.tokens, [[5, 6, 7, 1, 2, 0, 0], [5, 6, 7, 8, 9, 1, 2]])
    np.testing.assert_array_equal(closed.length, [5, 7])


def test_scores_are_the_pms_minus_the_offset(scored):
    model, _, frozen, samples, _, _, report = scored
    for i in range(8):
        n, reply = int(samples.rows.length[i]), samples.rows.tokens[i]
        end = [2] if samples.stopped[i] else [1, 2]
        row = jnp.array([*reply[:n].tolist(), *end])[None]
        for pm, name, offset in ((frozen["reward"], "score", 0.25), (frozen["tests"]["other"], "test/other", -1.0)):
            assert float(model.score(pm, model.apply(pm, row)[0][0, -1])) - offset == pytest.approx(float(report[name][i]), abs=1e-4)


def test_the_first_ratio_is_one(scored):
    """The rollout holds the sampler's log-probs; the training forward gives the same."""
    _, params, _, _, actor, rollout, _ = scored
    _, metrics = ppo_objective(actor)(params, rollout, None)
    assert float(metrics["log_ratio_max"]) < 1e-4 and float(metrics["clip_fraction"]) == 0
    assert float(jnp.abs(rollout.logp).max()) > 1


def test_recomputed_logps_are_the_samplers(scored):
    model, params, frozen, samples, _, rollout, _ = scored
    again, report = make_parts(model, recompute=True)[1](params, frozen, samples, samples.rows, OFFSETS, 0.1)
    np.testing.assert_allclose(again.logp, rollout.logp, atol=1e-5)
    assert 0 < float(report["sampler_drift_max"]) < 1e-4
    wrong = samples._replace(logp=samples.logp - 0.5)  # a sampler that is another model than the trainer is seen
    _, seen = make_parts(model, recompute=True)[1](params, frozen, wrong, wrong.rows, OFFSETS, 0.1)
    assert float(seen["sampler_drift_max"]) == pytest.approx(0.5, abs=1e-3)


def test_advantages_are_whitened_and_rewards_are_not(scored):
    _, _, _, _, _, rollout, report = scored
    kept = np.asarray(rollout.advantages)[np.asarray(rollout.mask)]
    assert abs(kept.mean()) < 1e-5 and kept.std() == pytest.approx(1, abs=1e-3)
    k1 = jnp.where(rollout.mask, rollout.logp - rollout.ref_logp, 0)
    np.testing.assert_allclose(report["k1"], k1.sum(1), rtol=1e-5)
    _, returns = gae(shaped_rewards(report["score"], k1, rollout.mask, 0.1), rollout.values, rollout.mask, 1.0, 0.95)
    np.testing.assert_allclose(rollout.returns, returns, atol=1e-5)


def test_a_reply_without_a_stop_scores_what_the_rule_says(scored):
    model, params, frozen, samples, *_, before, report = scored
    assert 0 < int(samples.stopped.sum()) < 8
    fixed, seen = make_parts(model, RolloutConfig(no_stop_score=-1.0, lam=1.0))[1](params, frozen, samples, samples.rows, OFFSETS, 0.0)
    last = samples.rows.length - samples.rows.prompt_len - 1
    paid = jnp.take_along_axis(fixed.returns, last[:, None], 1)[:, 0]
    np.testing.assert_allclose(paid, jnp.where(samples.stopped, seen["score"], -1.0), atol=1e-5)
    np.testing.assert_allclose(seen["score"], report["score"], atol=1e-5)  # what is logged is the PM's word


def test_a_value_network_on_the_pms_own_scale_gives_the_same_advantages(scored):
    """One that predicts scores as they are, 0.25 above the centred ones, or one that predicts these: the shift is told."""
    model, params, frozen, samples, actor, rollout, report = scored
    higher = lambda params, rows: (*actor(params, rows)[:1], actor(params, rows)[1] + 0.25, actor(params, rows)[2])  # noqa: E731
    score = make_score(higher, Judges(model, model, {"other": model}), VOCAB, R, RolloutConfig(), False)
    moved, seen = score(params, frozen, samples, samples.rows, OFFSETS | {"value": 0.25}, 0.1)
    np.testing.assert_allclose(moved.advantages, rollout.advantages, atol=1e-4)
    np.testing.assert_allclose(moved.returns, jnp.where(rollout.mask, rollout.returns + 0.25, 0), atol=1e-5)
    np.testing.assert_allclose(seen["value_mean"], report["value_mean"], atol=1e-5)


def test_exact_kl_is_what_k1_estimates(scored):
    """Averaged over many samples of one prompt the two agree within four standard errors."""
    model, params, frozen, *_ = scored
    prompt = Tokens(jnp.full((2000, 2), 7), jnp.full(2000, 2), jnp.full(2000, 2))
    samples, _ = generate(model, params["policy"], prompt, jnp.arange(2000), jax.random.key(3), VOCAB, Sampling(R))
    _, report = make_parts(model)[1](params, frozen, samples, samples.rows, OFFSETS, 0.0)
    exact = make_exact_kl(model, model, VOCAB, R)(params["policy"], frozen["reference"], samples.rows)
    assert float(exact.std()) < float(report["k1"].std())
    error = float(report["k1"].std()) / 2000**0.5
    assert float(exact.mean()) == pytest.approx(float(report["k1"].mean()), abs=4 * error)
    assert float(report["k3"].mean()) == pytest.approx(float(exact.mean()), rel=0.3)


# The update -----------------------------------------------------------------------------------------------------------


def make_updates(actor, micro=1, lr=1e-2, loss=PPOLoss()):
    optimizer = make_parts_optimizer({"policy": OptimConfig(lr), "value": OptimConfig(lr)}, 100)
    step = make_train_step(ppo_objective(actor, loss), optimizer, micro, ("policy", "value"))
    return optimizer, step, jax.jit(make_ppo_update(step))


def test_one_minibatch_and_one_epoch_is_one_step(scored):
    _, params, _, _, actor, rollout, _ = scored
    optimizer, step, update = make_updates(actor)
    state = init_state(params, optimizer, jax.random.key(0))
    for a, b in zip(jax.tree.leaves(update(state, rollout)[0].params), jax.tree.leaves(jax.jit(step)(state, rollout)[0].params)):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_minibatch_holds_its_samples(scored):
    _, params, _, _, _, rollout, _ = scored
    seen = []

    def step(state, batch):
        jax.debug.callback(lambda x: seen.append(x.tolist()), batch.returns[:, 0], ordered=True)
        return state._replace(step=state.step + 1), {"loss": 0.0, "log_ratio_max": jnp.sum(batch.returns[:, 0])}

    optimizer, *_ = make_updates(None)
    state = init_state(params, optimizer, jax.random.key(0))
    numbered = rollout._replace(returns=jnp.arange(64.0).reshape(8, 8))
    order = np.array([[3, 0, 5, 1], [2, 7, 6, 4], [1, 1, 0, 2]])
    _, metrics = jax.block_until_ready(make_ppo_update(step)(state, numbered, order))
    assert seen == (8.0 * order).tolist()
    assert float(metrics["first_log_ratio_max"]) == sum(seen[0]) and float(metrics["log_ratio_max"]) == max(map(sum, seen))


@pytest.mark.parametrize("order", [None, np.arange(8).reshape(2, 4)], ids=["whole", "minibatches"])
def test_a_loss_need_not_tell_a_ratio(scored, order):
    _, params, _, _, actor, rollout, _ = scored

    def loss(params, rollout, key):
        logp, values, _ = actor(params, rollout.rows)
        return -jnp.mean(logp * rollout.advantages) + jnp.mean(jnp.square(values - rollout.returns)), {"weight": 1.0}

    optimizer, *_ = make_updates(actor)
    update = make_ppo_update(make_train_step(loss, optimizer, 1, ("policy", "value")))
    state, metrics = update(init_state(params, optimizer, jax.random.key(0)), rollout, order)
    assert int(state.step) == (1 if order is None else 2)
    assert not any("log_ratio" in name for name in metrics) and np.isfinite(metrics["loss"])
    nameless = make_train_step(lambda *given: (loss(*given)[0], {}), optimizer, 2, ("policy", "value"))
    with pytest.raises(ValueError, match="the loss tells only its value; give `weight`"):
        nameless(init_state(params, optimizer, jax.random.key(0)), rollout)


def test_micro_batches_give_the_same_update(scored):
    _, params, _, _, actor, rollout, _ = scored
    moved = rollout._replace(logp=rollout.logp - 0.1 * jnp.arange(8)[:, None])
    results = []
    for micro in (1, 4):
        optimizer, _, update = make_updates(actor, micro=micro, lr=1e-3)
        state, metrics = update(init_state(params, optimizer, jax.random.key(0)), moved)
        results.append((metrics, state.opt_state))
    (one, moments), (four, moments4) = results
    assert one.keys() == four.keys()
    for name in one:
        np.testing.assert_allclose(one[name], four[name], rtol=2e-4, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), moments, moments4)


def test_packed_replies_are_read_as_rows_of_their_own(scored):
    """Rollout, report and gradient: the prompts' lengths differ, some replies stopped and some did not."""
    model, params, frozen, samples, actor, rollout, report = scored
    rows = packed(samples)
    assert rows.tokens.shape[0] < 8 and rows.pair.max() > 1
    found, seen = make_parts(model)[1](params, frozen, samples, rows, OFFSETS, 0.1)
    for a, b in zip(jax.tree.leaves((found._replace(rows=None), seen)), jax.tree.leaves((rollout._replace(rows=None), report)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    grad = jax.grad(lambda p, r: ppo_objective(actor)(p, r, None)[0])
    for a, b in zip(jax.tree.leaves(grad(params, found)), jax.tree.leaves(grad(params, rollout)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 + 1e-3 * float(jnp.abs(b).max()))


def test_a_saved_policy_state_is_the_state_again(scored):
    _, params, _, _, actor, _, _ = scored
    state = init_state(params, make_updates(actor)[0], jax.random.key(0))
    back = join_policy(split_policy(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert split_policy(state).params is params["policy"]


@pytest.mark.parametrize("mesh", [MeshConfig(8), MeshConfig(2, 4), MeshConfig(2, 2, 2)])
def test_eight_devices_equal_one(scored, mesh):
    """Score and update on a mesh, of packed rows, give the one-device rollout, metrics and parameters of a row a reply; the parameters are
    really split. The order of the samples in an epoch is another for every shard's rows."""
    _, params, frozen, samples, actor, rollout, report = scored
    mesh = make_mesh(mesh)
    model = make_model(CONFIG, mesh)
    ways = batch_ways(mesh)
    sharded_actor, score = make_parts(model, ways=ways)
    optimizer, _, update = make_updates(sharded_actor, lr=1e-3)
    places = {name: param_shardings(model.axes(), tree, mesh) for name, tree in params.items()}
    shardings = state_shardings(optimizer, jax.eval_shape(lambda: params), places, mesh)
    rows = batch_sharding(mesh)
    found, seen = jax.jit(score, in_shardings=(places, None, rows, rows, None, None), out_shardings=(rows, None))(
        params, frozen, samples, packed(samples, ways), OFFSETS, 0.1)  # fmt: skip
    for a, b in zip(jax.tree.leaves((found._replace(rows=None), seen)), jax.tree.leaves((rollout._replace(rows=None), report)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    start = jax.device_put(init_state(params, optimizer, jax.random.key(0)), shardings)
    order = np.array([[3, 0, 5, 1, 2, 7, 6, 4], [7, 6, 5, 4, 3, 2, 1, 0]])
    state, metrics = jax.jit(update, in_shardings=(shardings, rows, None, batches_sharding(mesh)), out_shardings=(shardings, None))(
        start, found, order, packed(samples, ways, order))  # fmt: skip
    optimizer, _, update = make_updates(actor, lr=1e-3)
    one_state, one = update(init_state(params, optimizer, jax.random.key(0)), rollout, order)
    for name in one:
        np.testing.assert_allclose(metrics[name], one[name], rtol=2e-3, atol=2e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(one_state.params)):
        np.testing.assert_allclose(a, b, atol=3e-4)
    if mesh.shape["fsdp"] > 1:
        up = state.params["policy"]["blocks"]["up"]
        assert up.addressable_shards[0].data.size == up.size // (mesh.shape["fsdp"] * mesh.shape["tensor"])


@pytest.mark.parametrize("seed", range(5))
def test_a_toy_reward_is_learnt(seed):
    """Reward: the share of one token in the reply. From 1 in 30 to 0.9 within 150 iterations of 32 samples."""
    model, params, frozen, prompts = make_all(batch=32)
    params = {"policy": model.init(jax.random.key(seed)), "value": model.init(jax.random.key(seed + 100))}
    actor = make_actor(model, model, VOCAB, R)
    _, _, update = made = make_updates(actor, lr=3e-3)
    rng = np.random.default_rng(seed)
    state = init_state(params, made[0], jax.random.key(seed))
    _, score = make_parts(model)

    @jax.jit
    def rollout(params, key):
        samples, _ = generate(model, params["policy"], prompts, jnp.arange(32), key, VOCAB, Sampling(R))
        found, _ = score(params, frozen | {"reference": params["policy"]}, samples, samples.rows, OFFSETS, 0.0)
        reply = jnp.take_along_axis(samples.rows.tokens, samples.rows.prompt_len[:, None] + jnp.arange(R)[None], 1)
        share = jnp.sum((reply == 7) & found.mask, -1) / jnp.sum(found.mask, -1)
        advantages, returns = gae(shaped_rewards(share, 0 * found.logp, found.mask, 0.0), found.values, found.mask, 1.0, 0.95)
        centred = jnp.where(found.mask, advantages - jnp.mean(advantages, where=found.mask), 0)
        return found._replace(advantages=centred / (jnp.std(advantages, where=found.mask) + 1e-4), returns=returns), share.mean()

    shares = []
    for i in range(150):
        found, share = rollout(state.params, jax.random.fold_in(jax.random.key(seed), i))
        shares.append(float(share))
        if np.mean(shares[-5:]) > 0.9:
            break
        state, _ = update(state, found, np.stack([rng.permutation(32) for _ in range(2)]).reshape(4, 16))
    assert shares[0] < 0.2 and np.mean(shares[-5:]) > 0.9
