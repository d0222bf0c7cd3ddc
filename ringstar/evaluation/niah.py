"""Needles in a haystack: eight tasks, and one needle at a chosen depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal
from uuid import UUID

from ringstar.evaluation.haystacks import Haystack, depths_of, first_of, fresh, noise
from ringstar.evaluation.material import Material
from ringstar.evaluation.samples import Draft, Prompt, seeded

Hay = Literal["noise", "essay", "needles"]


@dataclass(frozen=True, slots=True)
class Needles:
    """A needle task: its haystack, what keys and values are, and how many of them.

    `keys` have `values` values each, and `queried` of the keys are asked for.
    """

    haystack: Hay
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queried: int = 1

    def drafts(
        self, name: str, length: int, material: Material, depth: float | None = None
    ) -> Iterator[Draft]:
        """One draft; `depth` puts a single needle there."""
        draw, seen = seeded(name), set[str]()
        new_key, new_value = self._key(draw, material, seen), self._value(draw, seen)
        pairs = [
            (key, new_value())
            for key in [new_key() for _ in range(self.keys)]
            for _ in range(self.values)
        ]
        asked = sorted(draw.sample(range(self.keys), self.queried))
        queried = [pairs[number * self.values][0] for number in asked]
        references = tuple(value for key, value in pairs if key in queried)
        draw.shuffle(pairs)
        placed = self._places(draw, len(pairs)) if depth is None else [depth]
        needles = [(at, self.sentence(*pair)) for at, pair in zip(placed, pairs, strict=True)]
        hay = self._hay(name, material, seen, draw)

        def build(units: int, tail: str) -> Prompt:
            return self._prompt(hay.text(units, tail, needles), queried)

        text_sha256 = material.essay.sha256 if self.haystack == "essay" else None
        yield Draft(build, hay.line, references, text_sha256)

    def sentence(self, key: str, value: str) -> str:
        """The needle."""
        return f"One of the special magic {self.value} for {key} is: {value}."

    def _prompt(self, context: str, queried: list[str]) -> Prompt:
        *others, last = queried
        keys = f"{', '.join(others)}, and {last}" if others else last
        if self.values * self.queried == 1:
            what, verb = self.value.removesuffix("s"), "is"
            begin = f"A special magic {what} is hidden"
        else:
            what, verb = self.value, "are"
            begin = f"Some special magic {what} are hidden"
        instruction = (
            f"{begin} within the following text. Make sure to memorize it."
            f" I will quiz you about the {what} afterwards."
        )
        wanted = f"special magic {what} for {keys} mentioned in the provided text"
        every = "all the" if verb == "are" else "the"
        question = f"What {verb} {every} {wanted}?"
        return Prompt(f"{instruction}\n{context}", question, f"The {wanted} {verb}")

    def _places(self, draw: Random, count: int) -> list[float]:
        if self.haystack == "essay":
            return depths_of(draw, count)
        return sorted(draw.random() for _ in range(count))

    def _hay(self, name: str, material: Material, seen: set[str], draw: Random) -> Haystack:
        if self.haystack == "noise":
            return noise()
        if self.haystack == "essay":
            essay = material.essay
            return essay.from_sentence(draw.randrange(len(essay.sentences)))
        others = seeded(f"{name}/distractors")
        new_key, new_value = self._key(others, material, seen), self._value(others, seen)
        return Haystack(first_of(lambda: self.sentence(new_key(), new_value())), "\n")

    def _key(self, draw: Random, material: Material, seen: set[str]) -> Callable[[], str]:
        words = material.words
        new = (lambda: words.pair(draw)) if self.key == "words" else (lambda: uuid(draw))
        return lambda: fresh(new, seen)

    def _value(self, draw: Random, seen: set[str]) -> Callable[[], str]:
        new = (lambda: number(draw)) if self.value == "numbers" else (lambda: uuid(draw))
        return lambda: fresh(new, seen)


def number(draw: Random) -> str:
    """Seven digits, the first of them not 0."""
    return str(draw.randrange(1_000_000, 10_000_000))


def uuid(draw: Random) -> str:
    """A random UUID (version 4)."""
    return str(UUID(int=draw.getrandbits(128), version=4))
