"""Splitting a chat prompt into the document, which is encoded once, and each question."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any

from ringstar.errors import UserError

SEPARATOR = "\n\n"
# as templates ask for the date: transformers goes by the clock
_TODAY = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(['"])(.*?)\1\s*\)""")


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """The text around a document and around a question, and where it comes from."""

    before_document: str
    after_question: str
    source: str
    add_special_tokens: bool
    # whether the template drops the white space at both ends of a message
    trims: bool = False
    # from the end of an answer to the next question; None: the template has no second turn
    between_turns: str | None = None

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that tell the text around a document and a question from others."""
        text = "\0".join([self.before_document, self.after_question])
        return sha256(text.encode()).hexdigest()[:16]

    def context_ids(self, tokenizer: Any, document: str) -> list[int]:
        """Token ids of everything up to the end of the document."""
        text = self.before_document + (document.lstrip() if self.trims else document)
        if self.add_special_tokens:
            return opening_ids(tokenizer, text)
        return tokenizer.encode(text, add_special_tokens=False)

    def query_ids(self, tokenizer: Any, question: str) -> list[int]:
        """Token ids of everything from the end of the document to where the answer begins."""
        asked = question.rstrip() if self.trims else question
        return continuing_ids(tokenizer, SEPARATOR + asked + self.after_question)

    def next_query_ids(self, tokenizer: Any, question: str) -> list[int]:
        """Token ids from the end of an answer to where the next one begins.

        Raises:
            UserError: the chat template has no second turn.
        """
        if self.between_turns is None:
            raise UserError("model.path", None, "its chat template has no second turn")
        asked = question.strip() if self.trims else question
        return continuing_ids(tokenizer, self.between_turns + asked + self.after_question)


def opening_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that more will follow, behind whatever the tokenizer puts first."""
    ids = tokenizer.encode(text)
    ends = bool(ids) and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if ends else ids  # some tokenizers close every text


def continuing_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that follows another."""
    # behind something, because some tokenizers put a space before what begins a text
    for something in ("a", "0", "\n", ")"):  # one that does not join with it
        before = tokenizer.encode(something, add_special_tokens=False)
        whole = tokenizer.encode(something + text, add_special_tokens=False)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return tokenizer.encode(text, add_special_tokens=False)


def prompt_format(tokenizer: Any, day: datetime | None = None) -> PromptFormat:
    """The model's own chat template with document and question in one user message.

    A model without a template gets a plain question and answer form.  A template that asks for the
    date is told `day`, or today's.

    Raises:
        UserError: the template does not leave the message as it is, so it cannot be split.
    """
    if not getattr(tokenizer, "chat_template", None):
        plain = "no chat template: plain question and answer"
        return PromptFormat("", "\nAnswer:", plain, True, between_turns=SEPARATOR)
    document, question = (uuid.uuid4().hex for _ in range(2))
    message = document + SEPARATOR + question
    spaced = f" \n{message} \n"
    try:
        template = _dated(tokenizer, day or datetime.now())  # the same for both
        rendered, with_space = (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=True,
                chat_template=template,
            )
            for content in (message, spaced)
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError("model.path", None, f"its chat template fails: {reason}") from error
    before, _, after = rendered.partition(message)
    around = before + after
    trims = with_space == before + message + after
    changed = not trims and with_space != before + spaced + after
    changed = changed or any(part[:8] in around for part in (document, question))
    if message not in rendered or changed:
        raise UserError(
            "model.path", None, "its chat template changes the message; give document.ids_path"
        )
    # the template writes its own beginning-of-text token
    between = _between_turns(tokenizer)
    return PromptFormat(before, after, "the model's chat template", False, trims, between)


def _dated(tokenizer: Any, day: datetime) -> str | None:
    """The template with this day where it asks for today; None if it does not ask."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return None
    return _TODAY.sub(lambda call: repr(day.strftime(call[2])), tokenizer.get_chat_template())


def _between_turns(tokenizer: Any) -> str | None:
    """What a template puts between an answer and the next question, if it can be told."""
    turns = [(role, uuid.uuid4().hex) for role in ("user", "assistant", "user")]
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in turns],
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception:  # whatever a template raises: it takes no such list
        return None
    _, answer, behind = rendered.partition(turns[1][1])
    between, question, _ = behind.partition(turns[2][1])
    return between if answer and question else None
