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
        """A draft of each question: gold paragraphs can be too long.

        One sample after another begins with the next of a random order, so that of those that fit
        none comes again before all have come, but the one behind one that does not.
        """
        questions, (every, _, number) = material.questions, name.rsplit("/", 2)
        items = questions.of_hops(self.several)
        order = seeded(every).sample(items, len(items))
        first = int(number) % max(1, len(order))
        for item in order[first:] + order[:first]:
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
