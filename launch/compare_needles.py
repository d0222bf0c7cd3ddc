"""Planting facts in the tokens of a user's own document, and judging the answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.compare_facts import Fact

Decode = Callable[[Sequence[int]], str]
Encode = Callable[[str], list[int]]

# of the document, how far a needle may be moved from its depth to the end of a sentence
_NEAR = 0.05
_LINE_END, _SENTENCE_END = "\n", re.compile(r"""[.!?]["')\]]*$""")
_WIDE_SENTENCE_END = ("\u3002", "\uff01", "\uff1f")  # of Chinese and Japanese


@dataclass(frozen=True, slots=True)
class Needle:
    """A fact at `depth` (0 to 1) of a document; `at` is the index of its first token there."""

    fact: Fact
    depth: float
    at: int


@dataclass(frozen=True, slots=True)
class Haystack:
    """The tokens of a document with needles in it."""

    ids: list[int]
    needles: tuple[Needle, ...]


def even_depths(count: int) -> list[float]:
    """The middles of `count` equal parts: 0.1, 0.3, … 0.9 for five."""
    return [(2 * i + 1) / (2 * count) for i in range(count)]


def plant(
    ids: Sequence[int], first: int, facts: Sequence[Fact], encode: Encode, decode: Decode
) -> Haystack:
    """The document `ids` with `facts` at even depths, in their order.

    Each stands at the end of a line or sentence near its depth, behind token `first`.  As many
    tokens as come in are dropped from the end, but never more than half of the document.
    """
    depths = even_depths(len(facts))
    added = sum(len(encode(f" {fact.sentence}\n")) for fact in facts)
    stop = max(len(ids) - added, first + (len(ids) - first + 1) // 2)
    body = list(ids[:stop])
    places = [_place(body, first, first + depth * (stop - first), decode) for depth in depths]
    planted, needles, done = [], [], 0
    for fact, depth, place in zip(facts, depths, places, strict=True):
        planted += body[done:place]
        needles.append(Needle(fact, depth, len(planted)))
        planted += encode(_as_there(fact.sentence, decode(body[max(0, place - 1) : place])))
        done = place
    planted += body[done:]
    planted += ids[stop : stop + max(0, len(ids) - len(planted))]  # `added` was the most it can be
    return Haystack(planted, tuple(needles))


def is_found(fact: Fact, answer: str) -> bool:
    """Whether an answer holds what is expected, as words of their own, in any case."""
    value = rf"(?<!\w){re.escape(fact.expected)}(?!\w)"
    return re.search(value, answer, re.IGNORECASE) is not None


def _as_there(sentence: str, before: str) -> str:
    """A line of its own behind a line, else one more sentence."""
    return f"{sentence}\n" if before.endswith(_LINE_END) else f" {sentence}"


def _place(ids: Sequence[int], first: int, wanted: float, decode: Decode) -> int:
    """The index near `wanted` where a sentence begins; failing that a word, failing that itself."""
    near = max(1, round(_NEAR * len(ids)))
    lowest, highest = max(first, 1, round(wanted) - near), min(len(ids), round(wanted) + near)
    nearest = sorted(range(lowest, highest + 1), key=lambda index: abs(index - wanted))
    for begins in (_begins_sentence, _begins_word):
        for index in nearest:
            if begins(ids, index, decode):
                return index
    return min(max(round(wanted), first), len(ids))


def _begins_sentence(ids: Sequence[int], index: int, decode: Decode) -> bool:
    before = decode(ids[index - 1 : index])
    if before.endswith((_LINE_END, *_WIDE_SENTENCE_END)):
        return True
    ended = _SENTENCE_END.search(before) is not None
    return ended and (index == len(ids) or _begins_word(ids, index, decode))


def _begins_word(ids: Sequence[int], index: int, decode: Decode) -> bool:
    before, both = decode(ids[index - 1 : index]), decode(ids[index - 1 : index + 1])
    return both[len(before) :][:1].isspace()
