"""Rows are encoded as the layout says; batches depend on (seed, step, host) alone."""

import numpy as np
import pytest

from hhjax.data.comparisons import Comparison
from hhjax.data.records import DataError
from hhjax.data.sources import Document
from hhjax.data.stream import Host, LMSource, PairSource, encode_document, encode_prompt, encode_reply
from hhjax.data.transcripts import Turn

PROMPT = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def leaves(tree):
    return [tree] if isinstance(tree, np.ndarray) else [leaf for part in tree for leaf in leaves(part)]


@pytest.fixture(scope="module")
def source(tok, pairs):
    return PairSource(pairs, tok, seq_len=160, batch_size=8, widths=(32, 64, 96))


@pytest.fixture(scope="module")
def text(tok):
    documents = [Document(f"The river {n} runs past the mill.") for n in range(200)]
    return LMSource(documents, tok, seq_len=16, batch_size=8)


def test_a_prompt_is_its_turns_and_past_replies_end_in_eot(tok):
    parts = [tok.encode("\n\nHuman:"), tok.encode(" a"), tok.encode("\n\nAssistant:"), tok.encode(" b"), [tok.eot_id],
             tok.encode("\n\nHuman:"), tok.encode(" c"), tok.encode("\n\nAssistant:")]
    assert encode_prompt(tok, PROMPT).tolist() == sum(parts, [])
    with pytest.raises(DataError, match="must end in"):
        encode_prompt(tok, PROMPT + " done")


def test_a_reply_reads_like_a_past_turn(tok):
    reply = encode_reply(tok, "b")
    assert reply.tolist() == [*tok.encode(" b"), tok.eot_id]
    assert encode_reply(tok, "b", stop=False).tolist() == reply.tolist()[:-1]
    past = encode_prompt(tok, PROMPT).tolist()
    start = encode_prompt(tok, "\n\nHuman: a\n\nAssistant:").tolist()
    assert past[: len(start) + len(reply)] == start + reply.tolist()


def test_a_reply_of_several_turns_is_encoded_turn_by_turn(tok):
    assert encode_reply(tok, "b\n\nHuman: c\n\nAssistant: d").tolist() == sum(
        (tok.encode(" b"), [tok.eot_id], tok.encode("\n\nHuman:"), tok.encode(" c"), tok.encode("\n\nAssistant:"),
         tok.encode(" d"), [tok.eot_id]), [])


def test_documents_end_in_one_eot(tok):
    turns = (Turn("Human", "a"), Turn("Assistant", "b"))
    for document, ends in ((Document("text"), 1), (Document("", turns), 1), (Document("", turns[:1]), 1)):
        ids = encode_document(tok, document).tolist()
        assert ids[-1] == tok.eot_id and ids.count(tok.eot_id) == ends


def test_rows_are_prompt_reply_eot_eoc_and_padding(source, tok, pairs):
    assert source.size == len(pairs) and source.truncated == source.too_long == 0 and source.rows == tuple(pairs)
    rows = np.arange(source.size)
    batch = source.take(rows)
    for side, name in ((batch.chosen, "chosen"), (batch.rejected, "rejected")):
        assert side.tokens.dtype == side.length.dtype == np.int32
        for row, tokens, start, end in zip(pairs, *side):
            ids = [*encode_prompt(tok, row.prompt), *encode_reply(tok, getattr(row, name)), tok.eoc_id]
            assert tokens[:end].tolist() == ids and start == len(encode_prompt(tok, row.prompt))
            assert (tokens[end:] == tok.pad_id).all()


def test_truncation_takes_the_prompts_left_alike_on_both_sides_and_is_counted(tok, pairs):
    whole, short = PairSource(pairs, tok, 4096, 8), PairSource(pairs, tok, 96, 8)
    assert short.truncated == sum(96 < length for length in whole.lengths) > 0
    a, b = whole.take(np.arange(whole.size)), short.take(np.arange(short.size))
    for long, cut in zip(a[:2], b[:2]):
        for row in range(whole.size):
            end, lost = long.length[row], max(0, whole.lengths[row] - 96)
            assert cut.length[row] == end - lost and cut.prompt_len[row] == long.prompt_len[row] - lost
            assert cut.tokens[row, : end - lost].tolist() == long.tokens[row, lost:end].tolist()


def test_a_reply_that_does_not_fit_whole_is_left_out_and_counted(tok, pairs):
    long = Comparison(PROMPT, "x " * 200, "y")
    source = PairSource([long, *pairs[:3]], tok, 128, 2)
    assert source.too_long == 1 and source.rows == tuple(pairs[:3])
    edge = len(encode_prompt(tok, "\n\nHuman:\n\nAssistant:")) - 1 + len(encode_reply(tok, long.chosen)) + 1
    assert PairSource([long], tok, edge, 1).take(np.array([0])).chosen.prompt_len.tolist() == [1]
    with pytest.raises(DataError, match=f"none of 1 pairs fits in {edge - 1} tokens"):
        PairSource([long], tok, edge - 1, 1)


@pytest.mark.parametrize("name", ["source", "text"])
def test_a_batch_is_a_pure_function_of_seed_and_step(name, request):
    source = request.getfixturevalue(name)
    steps = [0, 7, source.steps_per_epoch, 1]
    first = [source.batch(3, step) for step in steps]
    again = [source.batch(3, step) for step in reversed(steps)][::-1]
    assert all(map(equal, first, again))
    assert not equal(source.batch(3, 0), source.batch(4, 0)) and not equal(first[0], first[2])


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_the_batch_of_one_host(source, count):
    for step in range(5):
        whole = source.batch(0, step)
        shares = [source.batch(0, step, Host(index, count)) for index in range(count)]
        assert equal([np.concatenate(parts) for parts in zip(*map(leaves, shares))], leaves(whole))
    with pytest.raises(DataError, match="a batch of 8 cannot be shared by host 0 of 3"):
        source.batch(0, 0, Host(0, 3))


def test_an_epoch_takes_each_row_at_most_once(tok, pairs):
    numbered = [row._replace(weight=float(number)) for number, row in enumerate(pairs)]
    source = PairSource(numbered, tok, 160, 8)
    epochs = [np.concatenate([source.batch(0, epoch * source.steps_per_epoch + step).weight
                              for step in range(source.steps_per_epoch)]) for epoch in (0, 1)]
    for seen in epochs:
        assert len(set(seen)) == len(seen) == source.steps_per_epoch * 8 > len(pairs) - 8
    assert epochs[0].tolist() != epochs[1].tolist()


def test_batches_are_only_as_wide_as_they_need(source, tok, pairs):
    widths = set()
    for step in range(source.steps_per_epoch):
        batch = source.batch(0, step)
        longest, width = max(batch.chosen.length.max(), batch.rejected.length.max()), batch.chosen.tokens.shape[1]
        assert batch.chosen.tokens.shape == batch.rejected.tokens.shape
        assert width == min(w for w in (32, 64, 96, 160) if w >= longest)
        widths.add(width)
    assert len(widths) >= 3


def test_batches_of_like_length_come_in_random_order(source):
    longest = [source.batch(0, step).chosen.length.max() for step in range(16)]
    rises = sum(a < b for a, b in zip(longest, longest[1:]))
    assert 3 <= rises <= 12


def test_packed_rows_are_the_documents_in_order(tok, text):
    first = text.take(np.arange(text.size))
    assert first.tokens.shape == (text.size, 16) and (first.length == 16).all() and (first.prompt_len == 0).all()
    stream = first.tokens.reshape(-1).tolist()
    expected = [*encode_document(tok, Document("The river 0 runs past the mill.")),
                *encode_document(tok, Document("The river 1 runs past the mill."))]
    assert stream[: len(expected)] == expected and text.n_tokens == len(stream)
    assert text.batch(0, 0).tokens.shape == (8, 16)


def test_too_few_rows_for_a_batch(tok, pairs):
    source = PairSource(pairs[:3], tok, 160, 8)
    with pytest.raises(DataError, match="3 rows do not fill a batch of 8"):
        source.batch(0, 0)
    with pytest.raises(DataError, match="do not fill a row of 64"):
        LMSource([Document("short")], tok, 64, 1)
