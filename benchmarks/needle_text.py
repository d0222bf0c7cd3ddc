"""Documents with needles: one noise line again and again, and facts hidden between its sentences.

The same seed makes the same documents.  A fact gives a number of seven digits for a key of two
words, in the wording of RULER's needle tasks; nothing else in a document holds a digit or a key.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

INSTRUCTION = (
    "Some special magic numbers are hidden in the text below. Remember each of them:"
    " afterwards you are asked for one."
)
NOISE = (
    "The river runs to the sea.",
    "The lamp hangs over the door.",
    "Bread and salt are on the table.",
    "We walk up the hill and home again.",
    "The wind is mild today.",
)
ADJECTIVES = (
    *("amber", "bitter", "brave", "clever", "crooked", "dusty", "eager", "frozen", "gentle"),
    *("golden", "hollow", "humble", "jolly", "lonely", "mellow", "narrow", "patient", "proud"),
    *("quiet", "rapid", "rusty", "silent", "sleepy", "tender", "velvet", "wild"),
)
NOUNS = (
    *("anchor", "badger", "barrel", "beacon", "candle", "castle", "comet", "dragon", "falcon"),
    *("garden", "hammer", "island", "kettle", "ladder", "lantern", "mirror", "orchard", "pebble"),
    *("piano", "rabbit", "saddle", "spider", "temple", "tunnel", "violin", "wagon"),
)


@dataclass(frozen=True, slots=True)
class Needle:
    """A fact, put behind `depth` (0 to 1) of the document's noise."""

    key: str
    value: str
    depth: float

    @property
    def sentence(self) -> str:
        return f"One of the special magic numbers for {self.key} is: {self.value}."

    @property
    def question(self) -> str:
        return f"What is the special magic number for {self.key} in the text above?"

    @property
    def answer_prefix(self) -> str:
        """Where the answer is made to begin; the value is what should come next."""
        return f"The special magic number for {self.key} in the text above is"


def make_needles(seed: str, depths: Sequence[float]) -> tuple[Needle, ...]:
    """A needle for each depth; no two share a word of their keys, or a value."""
    draw, count = random.Random(seed), len(depths)
    words = zip(draw.sample(ADJECTIVES, count), draw.sample(NOUNS, count), strict=True)
    values = draw.sample(range(1_000_000, 10_000_000), count)
    return tuple(
        Needle("-".join(pair), str(value), depth)
        for pair, value, depth in zip(words, values, depths, strict=True)
    )


def document_text(needles: Sequence[Needle], sentences: int) -> str:
    """`sentences` of noise, with each needle behind its share of them."""
    lines = [NOISE[i % len(NOISE)] for i in range(sentences)]
    for needle in sorted(needles, key=lambda needle: needle.depth, reverse=True):
        lines.insert(round(needle.depth * sentences), needle.sentence)
    return f"{INSTRUCTION}\n\n{' '.join(lines)}"


def fitted_text(needles: Sequence[Needle], tokens: int, count_tokens: Callable[[str], int]) -> str:
    """The longest document of at most `tokens` tokens: shorter by less than a sentence.

    ValueError: the needles alone are longer.
    """
    low, high = 0, tokens  # sentences that fit, and too many: each has more than one token
    if count_tokens(document_text(needles, low)) > tokens:
        raise ValueError(f"tokens={tokens} is too short for {len(needles)} needles")
    while high - low > 1:
        middle = (low + high) // 2
        if count_tokens(document_text(needles, middle)) <= tokens:
            low = middle
        else:
            high = middle
    return document_text(needles, low)
