"""The demo's document: Python's own documentation with four facts planted in it.

Chosen so that the small model answers each of them right on one device: a wrong answer of the
ring would then show as one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics


@dataclass(frozen=True, slots=True)
class Fact:
    """A sentence, how deep it is planted (0 to 1), what is asked, what must be in the answer."""

    depth: float
    sentence: str
    question: str
    expected: str


FACTS = (
    Fact(
        0.10,
        "The winner of the village chess tournament was Henrik Olsen.",
        "According to the text above, who was the winner of the village chess tournament?",
        "Henrik Olsen",
    ),
    Fact(
        0.35,
        "The favourite color of the gardener is turquoise.",
        "According to the text above, what is the favourite color of the gardener?",
        "turquoise",
    ),
    Fact(
        0.60,
        "The phone number of the harbor office is 555-0142.",
        "According to the text above, what is the phone number of the harbor office?",
        "555-0142",
    ),
    Fact(
        0.85,
        "The favorite food of the elephant at the zoo is watermelon.",
        "According to the text above, what is the favorite food of the elephant at the zoo?",
        "watermelon",
    ),
)
_TOPICS = ("types", "specialnames")


def demo_document(count: Callable[[str], int], tokens: int) -> str:
    """At most `tokens` of text, as `count` counts them, facts as paragraphs of their own."""
    facts = [fact.sentence for fact in FACTS]
    room = tokens - count("\n\n".join(facts)) - 4 * len(facts)
    paragraphs = _within(count, "\n\n".join(topics[name].strip() for name in _TOPICS), room)
    sizes = [count(paragraph) + 1 for paragraph in paragraphs]
    planted, waiting, passed = [], list(FACTS), 0
    for paragraph, size in zip(paragraphs, sizes, strict=True):
        while waiting and passed >= waiting[0].depth * sum(sizes):
            planted.append(waiting.pop(0).sentence)
        planted.append(paragraph)
        passed += size
    return "\n\n".join([*planted, *(fact.sentence for fact in waiting)])


def _within(count: Callable[[str], int], text: str, tokens: int) -> list[str]:
    """Paragraphs of as many whole lines of `text` as fit."""
    lines = text.split("\n")
    fits, too_many = 0, len(lines) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if count("\n".join(lines[:middle])) <= tokens:
            fits = middle
        else:
            too_many = middle
    return "\n".join(lines[:fits]).rstrip().split("\n\n")
