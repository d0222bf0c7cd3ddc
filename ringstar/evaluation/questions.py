"""Paragraphs with questions, as a user's file has them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from ringstar.letters import has_half_letters

FORM = '{"question": "...", "answers": ["..."], "paragraphs": ["..."]}'


@dataclass(frozen=True, slots=True)
class Item:
    """A question, every answer that is right, and the paragraphs that say so."""

    question: str
    answers: tuple[str, ...]
    paragraphs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Items, all paragraphs that can distract from theirs, and where they come from."""

    items: tuple[Item, ...]
    paragraphs: tuple[str, ...]
    source: str
    sha256: str

    def of_hops(self, several: bool) -> list[Item]:
        """Items whose answer takes several paragraphs, or one."""
        return [item for item in self.items if (len(item.paragraphs) > 1) == several]


def read_questions(text: str, source: str) -> QuestionSet:
    """JSON (a list) or JSON lines of `FORM`; one without a question only distracts.

    Raises ValueError, naming the place, for what is neither.
    """
    items, paragraphs = [], []
    for where, row in _rows(text):
        given, answers = row.get("paragraphs"), row.get("answers", [])
        if not (_are_texts(given) and given and _are_texts(answers)):
            raise ValueError(f"{where}: needed: {FORM}")
        paragraphs += given
        if "question" in row:
            if not (_are_texts([row["question"]]) and answers):
                raise ValueError(f"{where}: needed: {FORM}")
            items.append(Item(row["question"], tuple(answers), tuple(given)))
    if not items:
        raise ValueError(f"has no question; needed: {FORM}")
    every = tuple(dict.fromkeys(paragraphs))
    return QuestionSet(tuple(items), every, source, sha256(text.encode()).hexdigest())


def _rows(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Each row with its place."""
    if text.lstrip().startswith("["):
        rows = [(f"item {n}", row) for n, row in enumerate(_parsed(text), 1)]
    else:
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(f"line {n}", _parsed(line, n)) for n, line in lines]
    texts = ((where, json.dumps(row, ensure_ascii=False)) for where, row in rows)
    half = next((where for where, text in texts if has_half_letters(text)), None)
    if half:
        raise ValueError(f"{half}: holds half a letter: one of \\ud800 to \\udfff alone")
    wrong = next((where for where, row in rows if not isinstance(row, dict)), None)
    if wrong:
        raise ValueError(f"{wrong}: needed: {FORM}")
    return rows


def _parsed(text: str, line: int | None = None) -> Any:
    """JSON; `line`: which one of the file it is, if it is one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where, why = line or getattr(error, "lineno", 1), getattr(error, "msg", str(error))
        raise ValueError(f"line {where}: is not JSON ({why}); needed: {FORM}") from error


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v.strip() for v in value)
