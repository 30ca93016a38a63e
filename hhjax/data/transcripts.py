"""HH transcripts: text into turns and back, and a pair into its shared prompt and two replies."""

import re
from typing import NamedTuple

HUMAN, ASSISTANT = "Human", "Assistant"
OPEN_REPLY = "\n\nAssistant:"  # how every prompt ends

_MARKER = re.compile(r"\n\n(Human|Assistant):")


class Turn(NamedTuple):
    """What one side said. role: "Human" or "Assistant"; text: without surrounding white space, may be empty."""

    role: str
    text: str


def canonical(text: str) -> str:
    """The transcript with exactly one blank line before its first marker; many copies of HH have stripped it."""
    bare = text.lstrip()
    return "\n\n" + bare if bare.startswith(("Human:", "Assistant:")) else text


def has_marker(text: str) -> bool:
    """Whether a turn starts somewhere in `text`: "Human:" without a blank line before it is plain text."""
    return _MARKER.search(text) is not None


def parse_transcript(text: str) -> tuple[Turn, ...]:
    """The turns of "\\n\\nHuman: …\\n\\nAssistant: …"; an open last turn has empty text.

    Roles need not alternate (about 1 in 150 HH rows holds two Human turns in a row).
    Raises ValueError if there is no turn, or text before the first.
    """
    before, *parts = _MARKER.split(canonical(text))
    if not parts:
        raise ValueError("no Human or Assistant turn")
    if before.strip():
        raise ValueError("text before the first turn")
    return tuple(Turn(role, said.strip()) for role, said in zip(parts[::2], parts[1::2]))


def render(turns: tuple[Turn, ...]) -> str:
    """The transcript text of `turns`, the inverse of `parse_transcript`; an empty last turn stays open."""
    return "".join(f"\n\n{turn.role}: {turn.text}".rstrip(" ") for turn in turns)


def split_pair(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two transcripts as (prompt, chosen reply, rejected reply), split at the last Assistant boundary they share.

    The prompt ends in "\\n\\nAssistant:". Where the dialogues part before their last
    turns (9 of 2,352 rows of helpful-base), the replies hold what follows as transcript text.
    A reply whose first turn is empty is "". Raises ValueError if no Assistant boundary is shared.
    """
    chosen, rejected = canonical(chosen), canonical(rejected)
    boundary = chosen.rfind(OPEN_REPLY, 0, _shared_length(chosen, rejected))
    if boundary < 0:
        raise ValueError("no shared Assistant turn")
    end = boundary + len(OPEN_REPLY)
    return chosen[:end], _reply(chosen[end:]), _reply(rejected[end:])


def _reply(text: str) -> str:
    return "" if _MARKER.match(text.lstrip(" ")) else text.strip()


def _shared_length(a: str, b: str) -> int:
    """Length of the longest common prefix, by bisection over slices (fast in C for long texts)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
