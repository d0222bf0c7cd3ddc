"""What tasks are made of: words, a long text, and paragraphs with questions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from ringstar.evaluation.haystacks import Essay, default_essay
from ringstar.evaluation.invented import invented_questions
from ringstar.evaluation.questions import QuestionSet
from ringstar.evaluation.words import Words, read_words


class Material:
    """Each is made when a task first needs it; what was made can be told from `sources`."""

    def __init__(
        self,
        essay: Callable[[], Essay] = default_essay,
        questions: Callable[[], QuestionSet] = invented_questions,
        words: Callable[[], Words] = read_words,
    ):
        self._essay, self._questions, self._words = essay, questions, words

    @cached_property
    def essay(self) -> Essay:
        return self._essay()

    @cached_property
    def questions(self) -> QuestionSet:
        return self._questions()

    @cached_property
    def words(self) -> Words:
        return self._words()

    def sources(self) -> dict[str, dict[str, str]]:
        """Where what was used comes from; with the SHA-256 of texts."""
        used = {name: vars(self).get(name) for name in ("essay", "questions", "words")}
        return {
            name: {
                "source": made.source,
                **({"sha256": made.sha256} if hasattr(made, "sha256") else {}),
            }
            for name, made in used.items()
            if made is not None
        }
