"""Answers as JSON lines: each is on the disk before the next is begun."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.inputs import is_ids
from launch.library import Entry
from launch.lines import LineLog, line_of, whole_lines
from launch.outputs import OF_MODEL, check_begun_alike, write_config
from launch.questions import RESULT_FIELDS, Question
from launch.streams import print_piece
from ringstar.answers import Answer
from ringstar.config import AskConfig, saved_strategy
from ringstar.errors import UserError
from ringstar.ranks import world_size_of
from ringstar.store import saved_by
from ringstar.strategies import blocks_of

# sections and options of the config that answers depend on, wherever the document came from
_DECISIVE = (*OF_MODEL, "strategy", "generation", "questions.follow_up")


def answered(
    config: AskConfig, entries: Mapping[str, Entry], questions: Sequence[Question]
) -> list[list[int]]:
    """The token ids of the answers that `output.path` has; UserError if it is about others."""
    lines = _begun(config)
    contexts = contexts_of(config, entries) if lines else {}
    for number, (text, question) in enumerate(zip(lines, questions, strict=False), 1):
        line = _answer_in(text)
        kept = {key: value for key, value in line.items() if key not in RESULT_FIELDS}
        if kept != question.line:
            raise _other(config, number, "question")
        _check_context(config, number, line, contexts[question.document])
    if len(lines) > len(questions):
        why = f"has {len(lines)} answers to {len(questions)} questions"
        raise UserError("output.path", config.output.path, why)
    return [json.loads(text)["answer_ids"] for text in lines]


def check_typed_before(config: AskConfig, entry: Entry) -> None:
    """Raise UserError if `output.path` has anything but answers about this document."""
    context = _context_of(config, entry)
    for number, text in enumerate(_begun(config), 1):
        _check_context(config, number, _answer_in(text), context)


def contexts_of(config: AskConfig, entries: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
    """By the name of a document: what answers depend on besides the question and the config."""
    return {name: _context_of(config, entry) for name, entry in entries.items()}


def _context_of(config: AskConfig, entry: Entry) -> dict[str, Any]:
    strategy, world = config.strategy, config.launch.nproc or world_size_of(config.transport)
    if entry.load is not None:
        settings, world = saved_by("document.load", entry.load)
        strategy = saved_strategy("document.load", entry.load, settings)
    blocks = blocks_of(strategy, len(entry.ids), world)
    return {
        "document_sha256": entry.sha256,
        "block_size": blocks.size if blocks is not None else None,
        "anchor_size": blocks.anchor if blocks is not None else None,
    }


def _begun(config: AskConfig) -> list[str]:
    """The whole lines of `output.path`; UserError if no run with these settings began it."""
    path = config.output.path
    if path is None or not (file := Path(path).expanduser()).exists() or not file.stat().st_size:
        return []
    check_begun_alike(config, path, _DECISIVE)  # be it half a line
    return whole_lines(file)


def _check_context(
    config: AskConfig, number: int, line: dict[str, Any], context: dict[str, Any]
) -> None:
    for key, value in context.items():
        if line.get(key) != value:
            raise _other(config, number, key.removesuffix("_sha256"))


def _other(config: AskConfig, number: int, what: str) -> UserError:
    why = f"is about another {what}; allowed: what an earlier run of these wrote, or no file"
    return UserError("output.path", f"{config.output.path}:{number}", why)


def _answer_in(text: str) -> dict[str, Any]:
    """A line of the file; empty if it is no answer."""
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    return line if isinstance(line, dict) and is_ids(line.get("answer_ids")) else {}


class AnswerLog:
    """Where answers go: `output.path`, or standard output; rank 0 has one."""

    def __init__(self, config: AskConfig, entries: Mapping[str, Entry]):
        self._file: LineLog | None = None
        self._contexts = contexts_of(config, entries)
        path = config.output.path
        if path is None:
            return
        self._file, self._config = LineLog(path), config

    def begin(self) -> None:
        """Say beside the file how answers are made, before the first is."""
        if self._file is not None:
            write_config(self._config, str(self._config.output.path))

    def close(self) -> None:
        """Other runs may add to the file."""
        if self._file is not None:
            self._file.close()

    def add(self, line: dict[str, Any], answer: Answer, document: str) -> None:
        """One more answer, on the disk when this returns."""
        fields = {name: getattr(answer, name, None) for name in RESULT_FIELDS}
        fields |= {"answer": answer.text, "answer_ids": answer.ids, **self._contexts[document]}
        if self._file is not None:
            self._file.add({**line, **fields})
            return
        print_piece(line_of({**line, **fields}), kept=False)
