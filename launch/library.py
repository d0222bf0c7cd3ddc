"""The documents that questions are about: one, or several by name."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from launch.inputs import each_line, is_ids, read_text
from launch.progress import encode_bar
from ringstar.checks import check_fits, check_ids
from ringstar.config import AskConfig
from ringstar.conversation import Conversation
from ringstar.errors import UserError
from ringstar.models import ModelFiles
from ringstar.ranks import world_size_of
from ringstar.runtime import Document, LongContext
from ringstar.store import saved_ids

log = logging.getLogger("ringstar")

_KINDS = ("path", "text", "context_ids", "load")
_FORM = (
    '{"document": NAME, "path": "..."}, or with "text", "context_ids" or "load" in place of "path",'
    " one on each line"
)


# a question, as text or as ids, and the token ids of its answer
Turn = tuple[str | list[int], list[int]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A document that may be asked about: its token ids, and the folder that it is loaded from."""

    ids: list[int]
    load: str | None

    @property
    def sha256(self) -> str:
        """Of its token ids."""
        return hashlib.sha256(array("q", self.ids)).hexdigest()


def read_entries(config: AskConfig, files: ModelFiles) -> dict[str, Entry]:
    """Every line of `questions.documents_path`, checked; UserError names the line."""
    key, path = "questions.documents_path", config.questions.documents_path or ""
    world = config.launch.nproc or world_size_of(config.transport)
    entries: dict[str, Entry] = {}

    def read(line: dict[str, Any]) -> tuple[str, Entry]:
        name, entry = _entry(line, files)
        if name in entries:
            raise UserError("document", name, "is the name of two documents")
        check_fits(config, files, world, len(entry.ids))
        return name, entry

    for name, entry in each_line(key, path, _FORM, read):
        entries[name] = entry
    return entries


def _entry(line: dict[str, Any], files: ModelFiles) -> tuple[str, Entry]:
    given = [kind for kind in _KINDS if kind in line]
    if len(given) != 1 or not isinstance(line.get("document"), str):
        raise UserError("line", None, f"needed: {_FORM}")
    ids = _ids(given[0], line[given[0]], files)
    check_ids("document", ids, files.vocab_size)
    return line["document"], Entry(ids, line.get("load"))


def _ids(kind: str, value: Any, files: ModelFiles) -> list[int]:
    if kind == "context_ids":
        if not is_ids(value):
            raise UserError(kind, None, f"needed: {_FORM}")
        return value
    if not isinstance(value, str) or not value.strip():
        raise UserError(kind, None, "is empty, or not text")
    if kind == "load":
        return saved_ids(kind, value)
    return files.context_ids(read_text(kind, value) if kind == "path" else value)


class Library:
    """Documents by name, encoded or loaded when they are first asked about.

    `longest[name]` counts the tokens of the longest question about it.  One that made room for
    others is encoded again.
    """

    def __init__(self, runtime: LongContext, entries: dict[str, Entry], longest: dict[str, int]):
        self.entries = entries
        self._runtime, self._longest = runtime, longest
        self._documents: dict[str, Document] = {}
        self._talks: dict[str, Conversation] = {}

    def document(self, name: str) -> Document:
        """Ready to be asked."""
        known = self._documents.get(name)
        if known is not None and not known.evicted:
            return known
        if known is not None and self._runtime.rank == 0:
            log.info(f"document {name} made room for others: it is encoded again")
        self._documents[name] = self._made(name)
        return self._documents[name]

    def conversation(self, name: str, before: Iterable[Turn] = ()) -> Conversation:
        """The questions about one document so far; `before` are turns of an earlier run."""
        talk = self._talks.get(name)
        if talk is None:
            talk = self._talks[name] = self._runtime.converse(self.document(name))
            for question, answer_ids in before:
                talk.add(question, answer_ids)
        talk.document = self.document(name)
        return talk

    def add(self, name: str, document: Document) -> None:
        """One that is ready."""
        self._documents[name] = document

    def _made(self, name: str) -> Document:
        entry = self.entries[name]
        if entry.load is not None:
            return self._runtime.load(entry.load)
        with encode_bar(len(entry.ids), shown=self._runtime.rank == 0) as on_progress:
            length = len(entry.ids) + self._longest.get(name, 0)
            return self._runtime.encode(entry.ids, on_progress, length=length)
