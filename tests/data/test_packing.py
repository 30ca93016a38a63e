"""Packed comparisons: bins hold what fits, rows hold every pair once, batches are balanced and depend on (seed, step, host) alone."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hhjax.data.packing import MOST, PackedSource, ReplyPacker, first_fit, pair_sizes
from hhjax.data.stream import Host, PairSource
from hhjax.model.sizes import model_config
from hhjax.model.transformer import make_model
from hhjax.objectives.preference import preference_objective
from hhjax.train.state import OptimConfig, init_state, make_optimizer
from hhjax.train.step import make_train_step
from hhjax.types import Tokens, Vocabulary


@pytest.fixture(scope="module")
def source(tok, pairs):
    return PackedSource(pairs, tok, seq_len=160, batch_size=8, multiple=2)


def unpacked(batch) -> dict:
    """(prompt, chosen, rejected) ids -> weight of every pair of a batch."""
    found = {}
    for r in range(len(batch.tokens)):
        for n in range(batch.pair[r].max() + 1):
            at = [(batch.pair[r] == n) & (batch.branch[r] == b) for b in range(3)]
            ids = tuple(tuple(batch.tokens[r][mask].tolist()) for mask in at)
            prompt, *replies = (batch.positions[r][mask] for mask in at)
            np.testing.assert_array_equal(prompt, np.arange(len(prompt)))
            for side, reply in enumerate(replies):
                np.testing.assert_array_equal(reply, len(prompt) + np.arange(len(reply)))
                assert batch.ends[r, n, side] == np.flatnonzero(at[1 + side])[-1]
            found[ids] = float(batch.weight[r, n])
    return found


def in_two_rows(batch) -> dict:
    """The same of Pairs."""
    found = {}
    for i in range(len(batch.weight)):
        sides = [(t.tokens[i].tolist(), t.prompt_len[i], t.length[i]) for t in (batch.chosen, batch.rejected)]
        found[tuple(sides[0][0][: sides[0][1]]), *(tuple(ids[p:n]) for ids, p, n in sides)] = float(batch.weight[i])
    return found


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 5))
def test_bins_hold_everything_once_and_no_more_than_fits(lengths, most):
    bins = first_fit([(n, 1) for n in lengths], (50, most))
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(0 < len(members) <= most and sum(lengths[i] for i in members) <= 50 for members in bins)
    assert len(bins) >= sum(lengths) / 50 and sum(sum(lengths[i] for i in m) <= 25 and len(m) < most for m in bins) <= 1


def make_replies(rng, count, copies=1):
    """Samples as numpy rows: prompts of 1 to 12 tokens, replies of 1 to 8, and which of them stopped."""
    prompts = [rng.integers(3, 90, rng.integers(1, 13)) for _ in range(count // copies)]
    replies = [rng.integers(3, 90, rng.integers(1, 9)) for _ in range(count)]
    rows = [np.concatenate([prompts[i // copies], reply]) for i, reply in enumerate(replies)]
    tokens = np.array([np.pad(row, (0, 20 - len(row))) for row in rows], np.int32)
    stopped = rng.random(count) < 0.5
    for i in np.flatnonzero(stopped):
        tokens[i, len(rows[i]) - 1] = 1
    lengths = (np.array([len(x) for x in of], np.int32) for of in ([prompts[i // copies] for i in range(count)], rows))
    return Tokens(tokens, *lengths), stopped


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_packed_replies_say_where_everything_is(seed, ways, copies, halve):
    """Every reply, its predecessors and its end lie where the packer says, behind their own prompt, in their own shard."""
    rng = np.random.default_rng(seed)
    rows, stopped = make_replies(rng, 24, copies)
    batches = None if copies > 1 else np.stack([rng.permutation(24) for _ in range(2)])
    packed = ReplyPacker(12, 8, Vocabulary(0, 1, 2, 99), ways, copies, halve=halve).pack(rows, stopped, batches)
    order = np.arange(24)[None] if batches is None else batches
    if batches is None:
        packed = jax.tree.map(lambda x: x[None], packed)
    for k, members in enumerate(order):
        own = packed.tokens.shape[1] // ways
        for place, sample in enumerate(members):
            shard = np.s_[k, place * ways // 24 * own : (place * ways // 24 + 1) * own]
            tokens, positions, pair, branch = (x[shard].reshape(-1) for x in packed[:4])
            p, n = rows.prompt_len[sample], rows.length[sample] - rows.prompt_len[sample]
            prompt, reply = np.split(rows.tokens[sample, : p + n], [p])
            np.testing.assert_array_equal(packed.reply[k, place], np.pad(reply, (0, 8 - n)))
            assert packed.reply_len[k, place] == n
            flat = lambda at: np.arange(own)[:, None] * packed.tokens.shape[2] + at  # noqa: E731
            whole = np.arange(packed.tokens.shape[2])  # what None stands for
            read, ends = (flat(x).reshape(-1) for x in (whole if packed.read is None else packed.read[shard], packed.ends[shard]))
            before, end = read[packed.before[k, place][:n]], ends[packed.end[k, place]]
            assert tokens[before].tolist() == [prompt[-1], *reply[:-1]] and tokens[end] == 2 and tokens[end - 1] == 1
            assert positions[before].tolist() == list(range(p - 1, p + n - 1)) and branch[before[0]] == 0 and (branch[before[1:]] > 0).all()
            row = end // packed.tokens.shape[2]
            mine = (np.arange(len(tokens)) // packed.tokens.shape[2] == row) & (pair == pair[end])
            assert tokens[mine & (branch == 0)].tolist() == prompt.tolist()
            assert tokens[mine & (branch == branch[end])].tolist() == [*reply, *([2] if stopped[sample] else [1, 2])]


def test_replies_to_one_prompt_share_it():
    rows, stopped = make_replies(np.random.default_rng(0), 12, copies=3)
    shared, apart = (ReplyPacker(12, 8, Vocabulary(0, 1, 2, 99), 1, copies).pack(rows, stopped) for copies in (3, 1))
    spent = lambda packed: int((packed.pair >= 0).sum())  # noqa: E731
    assert spent(apart) - spent(shared) == sum(2 * int(n) for n in rows.prompt_len[::3])


def test_hosts_bring_what_one_would():
    rows, stopped = make_replies(np.random.default_rng(0), 24)
    batches = np.stack([np.random.default_rng(i).permutation(24) for i in range(2)])
    packer = ReplyPacker(12, 8, Vocabulary(0, 1, 2, 99), 4, halve=True)
    shares = [packer._replace(host=Host(i, 2)).pack(rows, stopped, batches) for i in range(2)]
    assert shares[0].read is not None
    jax.tree.map(lambda whole, *parts: np.testing.assert_array_equal(np.concatenate(parts, 1), whole), packer.pack(rows, stopped, batches), *shares)


@pytest.mark.parametrize("halve", [False, True])
def test_few_numbers_of_rows_are_compiled(halve):
    rng, packer = np.random.default_rng(0), ReplyPacker(12, 8, Vocabulary(0, 1, 2, 99), halve=halve)
    drawn = [packer.pack(*make_replies(rng, 64)) for _ in range(40)]
    assert len({str(jax.tree.map(np.shape, packed)) for packed in drawn}) <= 4
    assert all(packed.tokens.shape[0] % 2 == 0 and packed.tokens.shape[1] == 48 for packed in drawn)
    assert any(packed.read is not None for packed in drawn) == halve


def test_half_of_a_row_is_read_where_that_takes_no_more_rows():
    """Short replies behind long prompts and long ones behind short prompts share rows; long replies alone need what they need."""
    packer = ReplyPacker(40, 40, Vocabulary(0, 1, 2, 99), halve=True)

    def pack(prompts, replies):
        prompt, reply = (np.array(12 * sizes, np.int32) for sizes in (prompts, replies))
        return packer.pack(Tokens(np.full((24, 80), 7, np.int32), prompt, prompt + reply), np.ones(24, bool))

    mixed, long = pack([40, 1], [1, 40]), pack([1, 1], [40, 40])
    assert mixed.tokens.shape == (6, 168) and mixed.read.shape == (6, 84) and mixed.ends.shape == (6, 16)
    assert long.tokens.shape == (6, 168) and long.read is None  # four of them a row, read in 160 places


def test_more_replies_than_sixteen_share_a_row_and_a_prompt():
    rows = Tokens(np.full((40, 50), 7, np.int32), np.full(40, 10, np.int32), np.full(40, 11, np.int32))
    packed = ReplyPacker(40, 10, Vocabulary(0, 1, 2, 99), copies=40).pack(rows, np.ones(40, bool))
    assert packed.tokens.shape == (2, 104) and (packed.branch == 0).sum() - (packed.pair < 0).sum() == 10 and packed.ends.shape == (2, 48)


def test_a_packed_batch_holds_the_pairs_of_a_plain_one(tok, pairs, source):
    plain, rows = PairSource(pairs, tok, 160, 8), np.array([3, 11, 0, 25, 7, 19, 30, 2])
    packed = source.take(rows)
    assert unpacked(packed) == in_two_rows(plain.take(rows)) and len(unpacked(packed)) == 8
    assert (source.truncated, source.too_long, source.size) == (plain.truncated, plain.too_long, plain.size)
    assert np.sum(packed.weight > 0) == 8 and packed.weight.shape[1] == min(8, MOST)
    assert np.all((packed.tokens == tok.pad_id) == (packed.pair < 0))


def test_every_pair_once_an_epoch_and_another_order_in_the_next(source):
    epochs = [np.concatenate([source.rows_of(5, step) for step in range(e * source.steps_per_epoch, (e + 1) * source.steps_per_epoch)])
              for e in range(2)]  # fmt: skip
    for rows in epochs:
        assert len(set(rows.tolist())) == len(rows) == source.steps_per_epoch * 8
    assert epochs[0].tolist() != epochs[1].tolist() and source.rows_of(5, 0).tolist() == epochs[0][:8].tolist()


def test_batches_are_balanced(tok, pairs):
    packed, plain = (kind(pairs * 8, tok, seq_len=160, batch_size=16) for kind in (PackedSource, PairSource))
    totals = lambda s: [packed.tokens_of[s.rows_of(0, step)].sum() for step in range(s.steps_per_epoch)]  # noqa: E731
    assert np.std(totals(packed)) < 0.35 * np.std(totals(plain))


def test_hosts_bring_their_pairs_in_equally_many_rows(source):
    whole = source.batch(1, 2)
    parts = [source.batch(1, 2, Host(i, 2)) for i in range(2)]
    assert parts[0].tokens.shape == parts[1].tokens.shape
    assert unpacked(parts[0]) | unpacked(parts[1]) == unpacked(whole) and len(unpacked(parts[0])) == 4


def test_rows_divide_by_what_they_must(tok, pairs):
    source = PackedSource(pairs, tok, seq_len=160, batch_size=8, multiple=6)
    batch, half = source.batch(0, 0), source.batch(0, 0, Host(1, 2))
    needed = len(first_fit(pair_sizes(source.tokens_of[source.rows_of(0, 0)]), (source.width, MOST)))
    assert needed < 6 == len(batch.tokens) and len(half.tokens) % 3 == 0 and source.width % 64 == 0
    assert np.all(batch.pair[needed:] == -1) and not np.any(np.all(batch.pair[:needed] == -1, axis=1))


def test_a_training_run_is_the_same_in_both_layouts(tok, pairs):
    """Eight updates on the same pairs in the same order, packed and in two rows a pair."""
    packed, plain = (kind(pairs, tok, seq_len=160, batch_size=8) for kind in (PackedSource, PairSource))
    model = make_model(model_config("0.1M", tok.vocab_size))
    optimizer = make_optimizer(OptimConfig(lr=1e-3), 8)
    step = jax.jit(make_train_step(preference_objective(model), optimizer))

    def losses(source):
        state, found = init_state(model.init(jax.random.key(0)), optimizer, jax.random.key(1)), []
        for rows in (packed.rows_of(3, i) for i in range(8)):
            state, metrics = step(state, source.take(rows))
            found.append((float(metrics["loss"]), float(metrics["accuracy"]), float(metrics["grad_norm"])))
        return np.array(found)

    ours = losses(packed)
    np.testing.assert_allclose(ours, losses(plain), rtol=2e-3)
    assert ours[0, 0] == pytest.approx(np.log(2), abs=1e-6) and len(set(ours[:, 0])) == 8
