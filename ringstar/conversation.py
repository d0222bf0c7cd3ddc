"""Questions that follow one another about the same document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ringstar.answers import Answer
from ringstar.checks import token_ids
from ringstar.errors import UserError

if TYPE_CHECKING:
    from ringstar.runtime import Document, LongContext


class Conversation:
    """A document, and the turns so far: each question sees those before it.

    Its KV stays behind the document's until somebody else asks about the document; then the turns
    are read again, but never the document.  `ids` are the tokens of all turns.
    """

    def __init__(self, runtime: LongContext, document: Document):
        self.document, self.ids = document, list[int]()
        self._runtime, self._turns = runtime, 0
        self._key = object()  # KV of its turns is kept under this: it must not hold us

    def ask(self, question: str | Sequence[int], **options: Any) -> Answer:
        """The next turn; `options` are those of `LongContext.ask`.

        Token ids are read as they are; a text is put between turns as the model's own chat
        template does it.

        Raises:
            UserError: as `LongContext.ask`, or the template has no second turn.
        """
        ids = self._turn_ids(question)
        answer = self._runtime.answer(self.document, ids, top=self._key, before=self.ids, **options)
        self._add(ids, answer.ids)
        return answer

    def add(self, question: str | Sequence[int], answer_ids: Sequence[int]) -> None:
        """A turn that was answered elsewhere or earlier; it is read with the next one."""
        files = self._runtime.files
        if isinstance(answer_ids, str):
            why = (
                "token ids are needed, as Answer.ids has them; files.more_ids makes some of a text"
            )
            raise UserError("answer_ids", answer_ids, why)
        answer = list(answer_ids)  # may be none: the first token ended it
        if answer:
            answer = token_ids("answer_ids", answer, files.more_ids, files.vocab_size)
        self._add(self._turn_ids(question), answer)

    def _add(self, ids: Sequence[int], answer_ids: Sequence[int]) -> None:
        self.ids += [*ids, *answer_ids]
        self._turns += 1

    def _turn_ids(self, question: str | Sequence[int]) -> list[int]:
        files = self._runtime.files
        tokenize = files.next_query_ids if self._turns else files.query_ids
        return token_ids("question", question, tokenize, files.vocab_size)
