"""What `launch.score` is to score: a document, and what may follow it; read and checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launch.inputs import (
    check_letters,
    check_one_reader,
    each_line,
    given_text,
    is_ids,
    read_document,
    read_text,
)
from ringstar.checks import check_fits, check_ids
from ringstar.config import ScoreConfig
from ringstar.errors import UserError
from ringstar.models import ModelFiles
from ringstar.ranks import world_size_of

_FORM = (
    '{"continuation": "..."} or {"continuation_ids": [...]}, and whatever else, one on each line'
)
# what a score adds to the line of its continuation
RESULT_FIELDS = ("token_ids", "logprobs", "greedy", "logprob", "is_greedy", "perplexity")


@dataclass(frozen=True, slots=True)
class Continuation:
    """A line of the file, or one that stands for a text of the command line; its token ids."""

    line: dict[str, Any]
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Plan:
    """Token ids of the document and of what comes before every continuation.

    `text_bytes`: of the document in UTF-8; None if it was given as token ids.
    """

    document: list[int]
    text_bytes: int | None
    after: list[int]
    continuations: list[Continuation]

    @property
    def longest(self) -> int:
        """Tokens of the longest continuation."""
        return max((len(each.ids) for each in self.continuations), default=0)


def make_plan(config: ScoreConfig, files: ModelFiles) -> Plan:
    """Read and check the whole input; raises UserError."""
    check_one_reader(config)
    document, own_query = read_document(config.document)
    question = _question(config, own_query)
    continuations = list(_continuations(config, files))
    if not continuations:
        _check_alone(config, own_query)
    after = files.query_ids(question) if question is not None else own_query or []
    size = None
    if isinstance(document, str):
        size = len(document.encode())
        # a question stands in a chat, and the document with it
        to_ids = files.plain_ids if question is None else files.context_ids
        document = to_ids(document)
    plan = Plan(document, size, after, continuations)
    _check(config, files, plan)
    return plan


def _question(config: ScoreConfig, own_query: list[int] | None) -> str | None:
    given = [key for key in ("question", "question_path") if getattr(config, key) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise UserError("question_path", config.question_path, "there is a question; give one")
    if own_query is not None:
        raise UserError(given[0], None, "document.ids_path has query_ids already; give one")
    if config.question_path is not None:
        return read_text("question_path", config.question_path).strip("\r\n")
    return given_text("question", config.question or "")


def _check_alone(config: ScoreConfig, own_query: list[int] | None) -> None:
    """Raise UserError for what makes no sense without continuations."""
    needed = "without score.continuation or score.path the document itself is scored: "
    if config.question is not None or config.question_path is not None:
        key = "question" if config.question is not None else "question_path"
        raise UserError(key, getattr(config, key), needed + "drop it, or give what may answer it")
    if own_query is not None:
        raise UserError("document.ids_path", config.document.ids_path, needed + "drop query_ids")
    if config.document.load is not None:
        why = needed + "that encodes it; give document.path"
        raise UserError("document.load", config.document.load, why)


def _continuations(config: ScoreConfig, files: ModelFiles) -> Iterator[Continuation]:
    for text in config.score.continuation:
        check_letters("score.continuation", text)
        with_text = {"continuation": text}
        yield Continuation(with_text, _ids("score.continuation", with_text, files))
    if config.score.path is None:
        return
    yield from each_line("score.path", config.score.path, _FORM, lambda line: _of_line(line, files))


def _of_line(line: dict[str, Any], files: ModelFiles) -> Continuation:
    if ("continuation" in line) == ("continuation_ids" in line):
        raise UserError("line", None, f"needed: {_FORM}")
    taken = [name for name in RESULT_FIELDS if name in line]
    if taken:
        raise UserError(taken[0], None, "is what the score will be called; rename it")
    return Continuation(line, _ids("continuation", line, files))


def _ids(key: str, line: dict[str, Any], files: ModelFiles) -> list[int]:
    if "continuation_ids" in line:
        ids = line["continuation_ids"]
        if not is_ids(ids):
            raise UserError("continuation_ids", None, f"needed: {_FORM}")
    else:
        text = line["continuation"]
        if not isinstance(text, str) or not text:
            raise UserError(key, None, "is empty, or not text")
        ids = files.more_ids(text)
    check_ids(key, ids, files.vocab_size)
    return ids


def _check(config: ScoreConfig, files: ModelFiles, plan: Plan) -> None:
    check_ids("document", plan.document, files.vocab_size)
    world = config.launch.nproc or world_size_of(config.transport)
    if plan.continuations:
        document, query = len(plan.document), len(plan.after) + plan.longest - 1
        if not plan.after and document > 1 and config.document.load is None:
            document, query = document - 1, query + 1  # its last token is read after it
        check_fits(config, files, world, document, query)
        if plan.after:
            check_ids("question", plan.after, files.vocab_size)
        return
    if len(plan.document) < 2:
        raise UserError("document", "1 token", "the first has nothing before it; needed: 2 or more")
    check_fits(config, files, world, len(plan.document) - 1)  # the last is not read
