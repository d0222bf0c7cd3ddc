"""Token ids of a task's prompt: document and question, as the model's chat template has them."""

from __future__ import annotations

from ringstar.evaluation import CountTokens, Prompt
from ringstar.models import ModelFiles


def prompt_ids(files: ModelFiles, prompt: Prompt) -> tuple[list[int], list[int]]:
    """The document's ids, and those of the question up to where the answer goes on."""
    # behind a header that ends a line the answer begins; behind a word it follows
    own_line = files.prompt.after_question[-1:].isspace()
    begun = prompt.answer_prefix if own_line else f" {prompt.answer_prefix}"
    query = files.query_ids(prompt.question) + files.more_ids(begun)
    return files.context_ids(prompt.document), query


def token_counter(files: ModelFiles) -> CountTokens:
    """How many tokens the model reads of a prompt."""
    return lambda prompt: sum(map(len, prompt_ids(files, prompt)))
