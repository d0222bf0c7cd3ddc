"""What needles are hidden in: endless rows of lines, and where in them something is put."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from platform import python_version
from random import Random
from textwrap import wrap
from typing import TypeVar

T = TypeVar("T")

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# Latin, Devanagari, Urdu and Arabic; Chinese and Japanese have no space behind theirs
_SENTENCE_END = re.compile("(?<=[.!?\u0964\u06d4\u061f])\\s+|(?<=[\u3002\uff01\uff1f])")
# where there are no such marks a text is cut into pieces, for needles stand between them
_LONGEST = 400
# a sentence of prose: a capital, words, and no more marks than people write
_PROSE = re.compile(r"""[A-Z][A-Za-z ,;:'"()\-]{30,400}[.!?]""")


@dataclass(frozen=True, slots=True)
class Haystack:
    """Line number `i` is `line(i)`; lines are held apart by `separator`."""

    line: Callable[[int], str]
    separator: str

    def text(self, lines: int, tail: str, needles: Sequence[tuple[float, str]]) -> str:
        """`lines` lines and a piece of another, with each needle at its depth from 0 to 1."""
        rows = [self.line(number) for number in range(lines)] + ([tail] if tail else [])
        size, in_order = len(rows), sorted(needles, key=lambda placed: placed[0])
        # from the last to the first, so that places before it stay what they are
        for depth, needle in in_order[::-1]:
            rows.insert(place(depth, size), needle)
        return self.separator.join(rows)


def place(depth: float, lines: int) -> int:
    """The gap between `lines` lines, from 0 to `lines`, that `depth` from 0 to 1 means."""
    return min(lines, int(depth * (lines + 1)))


def noise() -> Haystack:
    """One line again and again."""
    return Haystack(lambda number: NOISE, "\n")


@dataclass(frozen=True, slots=True)
class Essay:
    """Sentences of a natural text, where it comes from, and the SHA-256 of what was read."""

    sentences: tuple[str, ...]
    source: str
    sha256: str

    def from_sentence(self, first: int) -> Haystack:
        """The text from there on, and from its beginning again when it ends."""
        size = len(self.sentences)
        return Haystack(lambda number: self.sentences[(first + number) % size], " ")


def essay_of(text: str, source: str) -> Essay:
    """The sentences of a text, or pieces; white space of any kind and length is one space."""
    cut = partial(wrap, width=_LONGEST, break_on_hyphens=False)
    pieces = [piece for sentence in _sentences(text) for piece in cut(sentence)]
    return Essay(tuple(pieces), source, sha256(text.encode()).hexdigest())


def default_essay() -> Essay:
    """The prose in Python's own documentation, which every installation has (PSF licence)."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    source = f"documentation of Python {python_version()} (pydoc_data.topics)"
    prose = tuple(filter(_PROSE.fullmatch, _sentences(text)))
    return Essay(prose, source, sha256(text.encode()).hexdigest())


def _sentences(text: str) -> list[str]:
    return [found for found in _SENTENCE_END.split(" ".join(text.split())) if found]


def first_of(draw: Callable[[], T]) -> Callable[[int], T]:
    """Item number `i` of an endless row; items are drawn in order and kept."""
    items: list[T] = []

    def item(number: int) -> T:
        while len(items) <= number:
            items.append(draw())
        return items[number]

    return item


def fresh(draw: Callable[[], str], seen: set[str]) -> str:
    """What `draw` gives that was not seen yet; it is seen now."""
    while (found := draw()) in seen:
        pass
    seen.add(found)
    return found


def depths_of(draw: Random, count: int, points: int = 40) -> list[float]:
    """`count` of `points` even depths from 0 to 1, in ascending order."""
    return [point / (points - 1) for point in sorted(draw.sample(range(points), count))]
