"""Frequent words: the most frequent of random letters, whose counts fall as 1/rank²."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator
from random import Random

from ringstar.evaluation.haystacks import fresh
from ringstar.evaluation.material import Material
from ringstar.evaluation.samples import Draft, Prompt, seeded

LETTERS = 6
TOKENS_PER_WORD = 50
# ranks that are asked for; rank 1 is shown as dots
RANKS = range(2, 5)
DOTS = "..."
_ZETA_2 = math.pi**2 / 6
# the fewest words with which rank 4 is more frequent than rank 5
_LEAST_WORDS = 53
_MOST_EXTRA_DOTS = 20
_INSTRUCTION = (
    "Read the following coded text and track the frequency of each coded word."
    " Find the three most frequently appeared coded words."
)
_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'."
    " What are the three most frequently appeared words in the above coded text?"
)
_ANSWER_PREFIX = "According to the coded text above, the three most frequently appeared words are:"


class FrequentWords:
    """A unit is one word more in all; what is left of the budget is filled with dots."""

    def drafts(
        self, name: str, length: int, material: Material, depth: float | None = None
    ) -> Iterator[Draft]:
        """One draft."""
        draw, seen = seeded(name), set[str]()
        size = max(length // TOKENS_PER_WORD, RANKS.stop)
        vocabulary = [DOTS, *(fresh(lambda: _letters(draw), seen) for _ in range(size - 1))]

        def build(units: int, tail: str) -> Prompt:
            counts = counts_of(_LEAST_WORDS + units, size)
            words = [word for word, n in zip(vocabulary, counts, strict=True) for _ in range(n)]
            words += [DOTS] * tail.count(DOTS)
            seeded(f"{name}/order/{units}").shuffle(words)
            return Prompt(f"{_INSTRUCTION}\n{' '.join(words)}", _QUESTION, _ANSWER_PREFIX)

        references = tuple(vocabulary[rank - 1] for rank in RANKS)
        yield Draft(build, lambda number: f"{DOTS} " * _MOST_EXTRA_DOTS, references)


def counts_of(words: int, vocabulary: int) -> list[int]:
    """How often each rank appears among about `words`: words / (ζ(2)·rank²), rounded down."""
    return [int(words / (_ZETA_2 * rank**2)) for rank in range(1, vocabulary + 1)]


def _letters(draw: Random) -> str:
    return "".join(draw.choices(string.ascii_lowercase, k=LETTERS))
