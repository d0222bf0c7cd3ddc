"""Questions about paragraphs that stand among others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ringstar.evaluation.material import Material
from ringstar.evaluation.questions import Item, QuestionSet
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
            if any(text not in item.paragraphs for text in questions.paragraphs):
                yield _draft(name, item, questions)


def _draft(name: str, item: Item, questions: QuestionSet) -> Draft:
    @cache  # made once the question's own paragraphs are known to fit
    def others() -> list[str]:
        every = [text for text in questions.paragraphs if text not in item.paragraphs]
        return seeded(f"{name}/distractors").sample(every, len(every))

    def distractor(number: int) -> str:
        # of a small set each comes again and again
        return others()[number % len(others())]

    def build(units: int, tail: str) -> Prompt:
        distractors = [distractor(number) for number in range(units)]
        texts = [*item.paragraphs, *distractors, *([tail] if tail else [])]
        seeded(f"{name}/order/{len(texts)}").shuffle(texts)
        listed = "\n\n".join(f"Document {n}:\n{text}" for n, text in enumerate(texts, 1))
        document = f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{listed}"
        return Prompt(document, f"{_INSTRUCTION}\n\nQuestion: {item.question}", "Answer:")

    return Draft(build, distractor, item.answers, questions.sha256)
