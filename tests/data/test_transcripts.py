"""Transcripts parse into turns and back; pairs split at the last Assistant boundary they share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hhjax.data.transcripts import Turn, has_marker, parse_transcript, render, split_pair

texts = st.text(max_size=40).map(str.strip).filter(lambda text: not has_marker("\n\n" + text))
dialogues = st.lists(st.builds(Turn, st.sampled_from(("Human", "Assistant")), texts), min_size=1, max_size=6).map(tuple)


@given(dialogues)
def test_render_and_parse_are_inverse(turns):
    assert parse_transcript(render(turns)) == turns


def test_a_marker_needs_a_blank_line():
    text = "\n\nHuman: He wrote\nHuman: hello, and Assistant: bye\n\nAssistant: ok"
    said = "He wrote\nHuman: hello, and Assistant: bye"
    assert parse_transcript(text) == (Turn("Human", said), Turn("Assistant", "ok"))


def test_a_stripped_transcript_is_understood():
    assert parse_transcript("Human: a\n\nAssistant: b") == parse_transcript("\n\nHuman: a\n\nAssistant: b")


@pytest.mark.parametrize("text, reason", [("hello", "no Human or Assistant turn"), ("", "no Human"),
                                          ("Once\n\nHuman: a", "text before the first turn")])
def test_what_is_no_transcript(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_transcript(text)


def test_split_at_the_last_shared_boundary():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert split_pair(start + " yes", start + " yes and no") == (start, "yes", "yes and no")


def test_dialogues_that_part_early_keep_several_turns_in_the_reply():
    start = "\n\nHuman: a\n\nAssistant:"
    prompt, chosen, rejected = split_pair(start + " b\n\nHuman: c\n\nAssistant: d", start + " x")
    assert (prompt, chosen, rejected) == (start, "b\n\nHuman: c\n\nAssistant: d", "x")


def test_a_boundary_half_shared_is_not_a_boundary():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssi"
    assert split_pair(start + "stant: d", start)[0] == "\n\nHuman: a\n\nAssistant:"


def test_an_empty_first_turn_is_an_empty_reply():
    start = "\n\nHuman: a\n\nAssistant:"
    assert split_pair(start + "\n\nHuman: b\n\nAssistant: c", start + " d")[1:] == ("", "d")


def test_nothing_shared():
    with pytest.raises(ValueError, match="no shared Assistant turn"):
        split_pair("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: x\n\nAssistant: b")


@given(dialogues, texts, texts)
def test_split_gives_back_both_sides(turns, chosen, rejected):
    prompt = render((*turns, Turn("Assistant", "")))
    got, left, right = split_pair(f"{prompt} {chosen}", f"{prompt} {rejected}")
    assert (got, left, right) == (prompt, chosen, rejected)
