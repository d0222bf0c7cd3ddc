"""Answers as JSON lines: each is on the disk before the next is begun."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.inputs import is_ids
from launch.lines import LineLog, line_of, whole_lines
from launch.outputs import check_begun_alike, write_config
from launch.questions import RESULT_FIELDS, Question
from ringstar.answers import Answer
from ringstar.config import AskConfig
from ringstar.errors import UserError

# sections and options of the config that answers depend on
_DECISIVE = ("model", "rope", "strategy", "document", "generation", "questions", "cache.dtype")


def answered(config: AskConfig, questions: Sequence[Question]) -> list[list[int]]:
    """The token ids of the answers that `output.path` has; UserError if it is about others."""
    path = config.output.path
    if path is None or not Path(path).expanduser().exists():
        return []
    lines = whole_lines(Path(path).expanduser())
    for number, (text, question) in enumerate(zip(lines, questions, strict=False), 1):
        if not _answers(text, question):
            why = (
                "answers another question; allowed: what an earlier run of these wrote, or no file"
            )
            raise UserError("output.path", f"{path}:{number}", why)
    if len(lines) > len(questions):
        why = f"has {len(lines)} answers to {len(questions)} questions"
        raise UserError("output.path", path, why)
    check_begun(config)
    return [json.loads(text)["answer_ids"] for text in lines]


def check_begun(config: AskConfig) -> None:
    """Raise UserError if `output.path` has anything that no run with these settings began."""
    path = config.output.path
    if path is None:
        return
    file = Path(path).expanduser()
    if file.exists() and file.stat().st_size:  # be it half a line
        check_begun_alike(config, path, _DECISIVE)


def _answers(text: str, question: Question) -> bool:
    try:
        line = json.loads(text)
    except ValueError:
        return False
    if not isinstance(line, dict) or not is_ids(line.get("answer_ids")):
        return False
    kept = {key: value for key, value in line.items() if key not in RESULT_FIELDS}
    return kept == question.line


class AnswerLog:
    """Where answers go: `output.path`, or standard output; rank 0 has one."""

    def __init__(self, config: AskConfig, done: int = 0):
        self._file: LineLog | None = None
        path = config.output.path
        if path is None:
            return
        write_config(config, path)
        self._file = LineLog(path)

    def add(self, line: dict[str, Any], answer: Answer) -> None:
        """One more answer, on the disk when this returns."""
        fields = {name: getattr(answer, name, None) for name in RESULT_FIELDS}
        fields |= {"answer": answer.text, "answer_ids": answer.ids}
        if self._file is not None:
            self._file.add({**line, **fields})
            return
        sys.stdout.write(line_of({**line, **fields}))
        sys.stdout.flush()
