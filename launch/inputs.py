"""The document and the question, read and checked before anything heavy starts."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

from ringstar.checks import check_fits, check_ids
from ringstar.config import Config, DocumentConfig
from ringstar.errors import UserError, reason
from ringstar.letters import has_half_letters
from ringstar.models import ModelFiles
from ringstar.ranks import under_torchrun, world_size_of
from ringstar.store import saved_ids

STDIN = "-"
# options that name a text, which may come through a pipe, and those that name any file to read, in
# whichever command has them
_TEXTS = (
    "document.path",
    "document.ids_path",
    "question_path",
    "questions.path",
    "questions.documents_path",
    "score.path",
)
INPUTS = (
    *_TEXTS,
    "model.path",
    "evaluate.essay_path",
    "evaluate.qa_path",
    "bench.against",
)
C = TypeVar("C", bound=Config)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """Token ids of the document and of the question."""

    context_ids: list[int]
    query_ids: list[int]


def read_request(config: Config, files: ModelFiles) -> Request:
    """Everything the run needs to know of its input; raises UserError."""
    check_one_reader(config)
    document, own_query = read_document(config.document)
    question = _question(config, own_query is not None)
    context = _context(document, files)
    query = files.query_ids(question) if question is not None else list(own_query or ())
    check_ids("question", query, files.vocab_size)
    if config.generation.stop and files.tokenizer is None:
        raise UserError("generation.stop", config.generation.stop[0], "needs a tokenizer")
    world = config.launch.nproc or world_size_of(config.transport)
    check_fits(config, files, world, len(context), len(query), config.generation.max_new_tokens)
    return Request(context, query)


def read_context(config: Config, files: ModelFiles) -> list[int]:
    """Token ids of a document that is asked about later; raises UserError."""
    document, query = read_document(config.document)
    if query is not None:
        why = "questions.path has the questions, or they are typed; drop query_ids"
        raise UserError("document.ids_path", config.document.ids_path, why)
    context = _context(document, files)
    world = config.launch.nproc or world_size_of(config.transport)
    check_fits(config, files, world, len(context))
    return context


def _context(document: str | list[int], files: ModelFiles) -> list[int]:
    ids = files.context_ids(document) if isinstance(document, str) else list(document)
    check_ids("document", ids, files.vocab_size)
    return ids


def read_text(key: str, path: str) -> str:
    """A text file, `-` for standard input; raises UserError."""
    raw = _read_bytes(key, path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            key, path, f"is not text: byte {error.start} is not UTF-8; convert it to UTF-8 text"
        ) from error
    if "\0" in text:
        raise UserError(key, path, "is not text: it holds zero bytes")
    if not text.strip():
        raise UserError(key, path, "is empty")
    return text


@contextmanager
def standard_input_kept(config: C) -> Iterator[tuple[C, dict[str, str]]]:
    """Ranks cannot share a pipe: what comes through one is kept in a file for the run.

    Yields the config that names that file, and the options that say the same.
    """
    check_one_reader(config)
    piped = {key: path for key, path in given_paths(config, _TEXTS).items() if is_stream(path)}
    if not piped:
        yield config, {}
        return
    with tempfile.TemporaryDirectory(prefix="ringstar-") as folder:
        copies = {key: str(Path(folder) / key) for key in piped}
        for key, path in piped.items():
            Path(copies[key]).write_bytes(_read_bytes(key, path))
        kept = reduce(lambda made, item: _changed(made, *item), copies.items(), config)
        try:
            yield kept, copies
        except UserError as error:  # as it was given, and not as it is named here
            shown = str(error.value)
            for key, copy in copies.items():
                shown = shown.replace(copy, piped[key])
            raise UserError(error.key, error.value and shown, error.allowed) from error


def _changed(config: C, key: str, value: str) -> C:
    """The config with another value for one option."""
    section, _, name = key.rpartition(".")
    whole: dict[str, Any] = {name: value}
    return replace(
        config, **({section: replace(getattr(config, section), **whole)} if section else whole)
    )


def each_line(key: str, path: str, form: str, read: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """What `read` makes of each line of a file of JSON objects; a UserError names the line."""
    # not `splitlines`: texts may hold other characters that end lines
    for number, text in enumerate(read_text(key, path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            made = read(_object(text, form))
        except UserError as error:
            raise UserError(key, f"{path}:{number}", str(error)) from error
        yield made


def _object(text: str, form: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("line", None, f"is not JSON ({error}); needed: {form}") from error
    if not isinstance(found, dict):
        raise UserError("line", None, f"needed: {form}")
    if has_half_letters(json.dumps(found, ensure_ascii=False)):
        why = "holds half a letter: one of \\ud800 to \\udfff without its other half"
        raise UserError("line", None, why)
    return found


def read_document(document: DocumentConfig) -> tuple[str | list[int], list[int] | None]:
    """The document, as text or as ids; and the question's ids, if a file holds both."""
    given = {
        f"document.{name}": value
        for name, value in vars(document).items()
        if value is not None and name not in ("save", "checkpoint_every")
    }
    if len(given) != 1:
        raise UserError(
            "document",
            None,
            "exactly one of document.path, document.text, document.ids_path and document.load is"
            " needed;"
            f" given: {' and '.join(given) or 'none'}",
        )
    ((key, value),) = given.items()
    if key == "document.ids_path":
        return _ids_file(key, value)
    if key == "document.load":
        return saved_ids(key, value), None
    if key == "document.path":
        return read_text(key, value), None
    return given_text(key, value), None


def _question(config: Config, has_query_ids: bool) -> str | None:
    given = [k for k in ("question", "question_path") if getattr(config, k) is not None]
    if has_query_ids:
        if given:
            raise UserError(given[0], None, "document.ids_path has query_ids already; give one")
        return None
    if len(given) != 1:
        raise UserError(
            "question",
            None,
            "exactly one of question and question_path is needed;"
            f" given: {' and '.join(given) or 'none'}",
        )
    if config.question_path is not None:
        return read_text("question_path", config.question_path).strip("\r\n")
    return given_text("question", config.question or "")


def given_text(key: str, value: str) -> str:
    """Text that was given on the command line; raises UserError."""
    if not value.strip():
        raise UserError(key, value, "is empty")
    check_letters(key, value)
    return value


def check_letters(key: str, value: str) -> None:
    """Raise UserError for text of the command line that was not UTF-8."""
    if has_half_letters(value):  # undecodable bytes become these
        raise UserError(key, None, "is not UTF-8 text")


def _ids_file(key: str, path: str) -> tuple[list[int], list[int] | None]:
    form = '{"context_ids": [...], "query_ids": [...]}, lists of integers'
    try:
        content = json.loads(_read_bytes(key, path))
    except (ValueError, RecursionError) as error:
        raise UserError(key, path, f"is not JSON ({error}); needed: {form}") from error
    if not isinstance(content, dict) or not is_ids(content.get("context_ids")):
        raise UserError(key, path, f"needed: {form}")
    query = content.get("query_ids")
    if query is not None and not is_ids(query):
        raise UserError(key, path, f"query_ids: needed: {form}")
    return content["context_ids"], query


def is_ids(value: Any) -> bool:
    """Whether a value from a JSON file is a list of integers."""
    return isinstance(value, list) and all(type(item) is int for item in value)


def given_paths(config: Config, keys: Sequence[str] = INPUTS) -> dict[str, str]:
    """Those of the options `keys` that this command has and that were given."""
    found = {}
    for key in keys:
        section, _, name = key.rpartition(".")
        path = getattr(getattr(config, section, None) if section else config, name, None)
        if path is not None:
            found[key] = path
    return found


def check_one_reader(config: Config) -> None:
    """Raise UserError if two options would read standard input."""
    readers = [key for key, path in given_paths(config, _TEXTS).items() if path == STDIN]
    if len(readers) > 1:
        raise UserError(readers[1], STDIN, f"standard input is {readers[0]} already")


def is_stream(path: str) -> bool:
    """Whether it can be read only once: standard input, or a pipe with a name."""
    try:
        file = Path(path).expanduser()
        return path == STDIN or (file.exists() and not file.is_file() and not file.is_dir())
    except (OSError, ValueError, RuntimeError):  # who reads it says what is wrong
        return False


def _read_bytes(key: str, path: str) -> bytes:
    if under_torchrun() and is_stream(path):
        what = "standard input" if path == STDIN else "a pipe"
        raise UserError(key, path, f"ranks cannot share {what}; use launch.nproc")
    if path == STDIN:
        return sys.stdin.buffer.read()
    try:
        return Path(path).expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # the last: a ~name of nobody
        raise UserError(key, path, f"cannot be read: {reason(error)}") from error
