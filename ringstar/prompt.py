"""Splitting a chat prompt into the document, which is encoded once, and each question."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

SEPARATOR = "\n\n"


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """The text around a document and around a question, and where it comes from."""

    before_document: str
    after_question: str
    source: str
    add_special_tokens: bool

    def context_ids(self, tokenizer: Any, document: str) -> list[int]:
        """Token ids of everything up to the end of the document."""
        text = self.before_document + document
        return tokenizer.encode(text, add_special_tokens=self.add_special_tokens)

    def query_ids(self, tokenizer: Any, question: str) -> list[int]:
        """Token ids of everything from the end of the document to where the answer begins."""
        text = SEPARATOR + question + self.after_question
        return tokenizer.encode(text, add_special_tokens=False)


def prompt_format(tokenizer: Any) -> PromptFormat:
    """The model's own chat template with document and question in one user message.

    A model without a template gets a plain question and answer form.
    """
    if not getattr(tokenizer, "chat_template", None):
        return PromptFormat("", "\nAnswer:", "no chat template: plain question and answer", True)
    document, question = (f"<{uuid.uuid4().hex}>" for _ in range(2))
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": document + SEPARATOR + question}],
        tokenize=False,
        add_generation_prompt=True,
    )
    before, rest = rendered.split(document)
    after = rest.removeprefix(SEPARATOR).removeprefix(question)
    # the template writes its own beginning-of-text token
    return PromptFormat(before, after, "the model's chat template", False)
