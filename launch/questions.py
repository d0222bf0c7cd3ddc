"""Questions about one document: a JSONL file, or lines that somebody types."""

from __future__ import annotations

import io
import logging
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launch.inputs import check_letters, each_line, is_ids
from ringstar.checks import check_fits, check_ids
from ringstar.config import AskConfig
from ringstar.errors import UserError
from ringstar.models import ModelFiles

log = logging.getLogger("ringstar")

_FORM = '{"question": "..."} or {"query_ids": [...]}, and whatever else, one on each line'
# what an answer adds to the line of its question
RESULT_FIELDS = (
    "answer",
    "answer_ids",
    "finish_reason",
    "query_tokens",
    "ttft_s",
    "tpot_s",
    "document_sha256",
    "block_size",
    "anchor_size",
)
# the name of a document that is the only one
ONLY = ""
# ranks that wait are told so before their patience ends
_IDLE_S = 60.0


@dataclass(frozen=True, slots=True)
class Question:
    """A line of the file, and the token ids of what it asks."""

    line: dict[str, Any]
    ids: list[int]
    document: str

    @property
    def asked(self) -> str | list[int]:
        """As the line has it: text, or token ids."""
        return self.line["query_ids"] if "query_ids" in self.line else self.line["question"]


def read_questions(
    config: AskConfig, files: ModelFiles, documents: Mapping[str, int], world: int
) -> list[Question]:
    """Every question of `questions.path`, checked; UserError names the line.

    `documents` are the tokens of each document by its name; one without a name is of all questions.
    """

    def read(line: dict[str, Any]) -> Question:
        question = _question(line, files, documents)
        size, new = len(question.ids), config.generation.max_new_tokens
        check_fits(config, files, world, documents[question.document], size, new)
        return question

    return list(each_line("questions.path", config.questions.path or "", _FORM, read))


def _question(line: dict[str, Any], files: ModelFiles, documents: Mapping[str, int]) -> Question:
    if ("question" in line) == ("query_ids" in line):
        raise UserError("line", None, f"needed: {_FORM}")
    taken = [name for name in RESULT_FIELDS if name in line]
    if taken:
        raise UserError(taken[0], None, "is what the answer will be called; rename it")
    if "query_ids" in line:
        if not is_ids(line["query_ids"]):
            raise UserError("query_ids", None, f"needed: {_FORM}")
        ids = line["query_ids"]
    else:
        if not isinstance(line["question"], str) or not line["question"].strip():
            raise UserError("question", None, "is empty, or not text")
        ids = files.query_ids(line["question"])
    check_ids("question", ids, files.vocab_size)
    name = ONLY if ONLY in documents else line.get("document")
    if not isinstance(name, str) or name not in documents:
        near = ", ".join(list(documents)[:8])
        raise UserError("document", name, f"names none of questions.documents_path: {near}")
    return Question(line, ids, name)


def typed_lines(patience_s: float, edited: bool) -> Iterator[str]:
    """What is typed, line by line; an empty one now and then while nobody types.

    Lines that are `edited` can be edited and remembered where they come from a terminal, which is
    in another state meanwhile: see `launch.terminal`.
    """
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(lines, edited), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=min(_IDLE_S, patience_s / 3))
        except queue.Empty:
            yield ""
            continue
        if line is None:
            return
        yield line


def _read_lines(lines: queue.Queue[str | None], edited: bool) -> None:
    """`input()` cannot be interrupted: so, in a thread."""
    asks = "? " if sys.stdin.isatty() else ""
    if asks and edited:
        import readline  # noqa: F401 - gives input() its editing
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # or such a byte would end it all
    try:
        while True:
            lines.put(_checked(input(asks)))
    except (EOFError, OSError, ValueError):
        lines.put(None)


def _checked(line: str) -> str:
    """Empty, and said to be wrong, if it is no text."""
    try:
        check_letters("question", line)
    except UserError as error:
        log.info(str(error))
        return ""
    return line
