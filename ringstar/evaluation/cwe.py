"""Common words: the ten most frequent of a shuffled, numbered list, behind a solved example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from ringstar.evaluation.haystacks import first_of
from ringstar.evaluation.material import Material
from ringstar.evaluation.samples import Draft, Prompt, seeded

COMMON = 10
SHORT_BELOW = 4096


@dataclass(frozen=True, slots=True)
class Counts:
    """How often a common word and another one appear; so in the example, with so many others."""

    often: tuple[int, int]
    shown_often: tuple[int, int]
    shown_others: int


LONG, SHORT = Counts((30, 3), (10, 3), 30), Counts((6, 1), (3, 1), 10)
_INSTRUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others."
    " Memorize the ones that appear most often."
)
_QUESTION = f"Question: What are the {COMMON} most common words in the above list?"
_ANSWER_PREFIX = f"The top {COMMON} words that appear most often in the list are:"


class CommonWords:
    """A unit is one word more among those that are not common, as often as these appear."""

    def drafts(
        self, name: str, length: int, material: Material, depth: float | None = None
    ) -> Iterator[Draft]:
        """One draft."""
        words = material.words.distinct(seeded(name))
        counts = SHORT if length < SHORT_BELOW else LONG
        shown, others = (list(islice(words, count)) for count in (COMMON, counts.shown_others))
        listed = _listed(shown, others, counts.shown_often, f"{name}/example")
        numbered = _numbered(shown)
        answer = f"Answer: {_ANSWER_PREFIX} {numbered}"
        solved = f"{_INSTRUCTION}\n{listed}\n{_QUESTION}\n{answer}"
        common = list(islice(words, COMMON))
        uncommon = first_of(lambda: next(words))

        def build(units: int, tail: str) -> Prompt:
            rest = [uncommon(number) for number in range(units)]
            context = _listed(common, rest, counts.often, f"{name}/order/{units}")
            return Prompt(f"{solved}\n\n{_INSTRUCTION}\n{context}", _QUESTION, _ANSWER_PREFIX)

        yield Draft(build, lambda number: "", tuple(common))


def _listed(
    common: Sequence[str], others: Sequence[str], often: tuple[int, int], order: str
) -> str:
    words = [*common] * often[0] + [*others] * often[1]
    seeded(order).shuffle(words)
    return _numbered(words)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
