"""Variable tracking: one chain of assignments among noise, behind a solved example."""

from __future__ import annotations

import string
from collections.abc import Iterator
from random import Random

from ringstar.evaluation.haystacks import fresh, noise
from ringstar.evaluation.material import Material
from ringstar.evaluation.samples import Draft, Prompt, seeded

HOPS = 4
_EXAMPLE_LINES = 5
_INSTRUCTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text."
)


class VariableTracking:
    """Which variables have the value that the first of a chain was given?"""

    def drafts(
        self, name: str, length: int, material: Material, depth: float | None = None
    ) -> Iterator[Draft]:
        """One draft."""
        draw, seen = seeded(name), set[str]()
        solved = _solved_example(draw, seen)
        value, names, needles = _chain(draw, seen)
        hay = noise()

        def build(units: int, tail: str) -> Prompt:
            context = hay.text(units, tail, needles)
            document = f"{solved}\n\n{_INSTRUCTION}\n\n{context}"
            return Prompt(document, _question(value), _answer_prefix(value))

        yield Draft(build, hay.line, tuple(names))


def _chain(draw: Random, seen: set[str]) -> tuple[str, list[str], list[tuple[float, str]]]:
    """The value, the names that have it, and the assignments in order, each at its depth."""
    value = fresh(lambda: str(draw.randrange(10_000, 100_000)), seen)
    names = [fresh(lambda: _letters(draw), seen) for _ in range(HOPS + 1)]
    given = [value, *(f"VAR {name}" for name in names)]
    lines = [f"VAR {name} = {what}" for name, what in zip(names, given, strict=False)]
    depths = sorted(draw.random() for _ in lines)
    return value, names, list(zip(depths, lines, strict=True))


def _solved_example(draw: Random, seen: set[str]) -> str:
    value, names, needles = _chain(draw, seen)
    context = noise().text(_EXAMPLE_LINES, "", needles)
    answer = f"Answer: {_answer_prefix(value)} {' '.join(names)}"
    return f"{_INSTRUCTION}\n\n{context}\n{_question(value)}\n{answer}"


def _question(value: str) -> str:
    return f"Question: Find all variables that are assigned the value {value} in the text above."


def _answer_prefix(value: str) -> str:
    return (
        "According to the chain(s) of variable assignment in the text above,"
        f" {HOPS + 1} variables are assigned the value {value}, they are:"
    )


def _letters(draw: Random) -> str:
    return "".join(draw.choices(string.ascii_uppercase, k=5))
