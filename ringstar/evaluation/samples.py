"""What a task asks of a model, and what makes it the length that is wanted.

A prompt is in two parts, as the runtime takes it: the document, which is encoded, and the question
behind it; the answer prefix stands after the assistant's header.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import Literal

Match = Literal["all", "part"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The document with its instruction, the question, and the beginning of the answer."""

    document: str
    question: str
    answer_prefix: str

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that tell it from others."""
        text = "\0".join([self.document, self.question, self.answer_prefix])
        return sha256(text.encode()).hexdigest()[:16]


# tokens of a prompt with all that the chat template puts around it
CountTokens = Callable[[Prompt], int]


@dataclass(frozen=True, slots=True)
class Draft:
    """A sample of any length: its haystack is the first units of an endless row of them.

    `build(units, tail)` is the prompt with so many whole units and a piece of the next one, whose
    whole text is `tail(units)`; a task whose units cannot be cut gives an empty one.  `text_sha256`
    is that of the text or of the questions that all of it is taken from, if there are any.
    """

    build: Callable[[int, str], Prompt]
    tail: Callable[[int], str]
    references: tuple[str, ...]
    text_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt of a task and what a right answer holds.

    `tokens` count the prompt with its chat template, and the `new_tokens` of its answer;
    `text_sha256` is as in `Draft`.
    """

    prompt: Prompt
    references: tuple[str, ...]
    tokens: int
    new_tokens: int
    text_sha256: str | None


def seeded(name: str) -> Random:
    """Random numbers that depend on `name` alone, on every machine."""
    return Random(int.from_bytes(sha256(name.encode()).digest()))
