"""Questions about paragraphs that stand among others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ringstar.evaluation.material import Material
from ringstar.evaluation.questions import Item
from ringstar.evaluation.samples import Draft, Prompt, seeded

_INSTRUCTION = (
    "Answer the question based on the given documents."
    " Only give me the answer and do not output any other words."
)


@dataclass(frozen=True, slots=True)
class QuestionAnswering:
    """Gold paragraphs and distractors; `several`: the answer takes more than one paragraph."""

    several: bool

    def drafts(
        self, name: str, length: int, material: Material, depth: float | None = None
    ) -> Iterator[Draft]:
        """A draft of each question, in random order: gold paragraphs can be too long."""
        questions = material.questions
        items = questions.of_hops(self.several)
        for item in seeded(name).sample(items, len(items)):
            others = [text for text in questions.paragraphs if text not in item.paragraphs]
            if others:
                yield _draft(name, item, others, questions.sha256)


def _draft(name: str, item: Item, others: list[str], text_sha256: str) -> Draft:
    draw = seeded(f"{name}/distractors")
    others = draw.sample(others, len(others))

    def build(units: int, tail: str) -> Prompt:
        # of a small set each comes again and again
        distractors = [others[number % len(others)] for number in range(units)]
        texts = [*item.paragraphs, *distractors, *([tail] if tail else [])]
        seeded(f"{name}/order/{len(texts)}").shuffle(texts)
        listed = "\n\n".join(f"Document {n}:\n{text}" for n, text in enumerate(texts, 1))
        document = f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{listed}"
        return Prompt(document, f"{_INSTRUCTION}\n\nQuestion: {item.question}", "Answer:")

    return Draft(build, lambda number: others[number % len(others)], item.answers, text_sha256)
