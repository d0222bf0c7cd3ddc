"""Ask many questions about long documents: each is encoded or loaded once, then asked.

    python -m launch.ask launch.nproc=4 model.path=DIR document.path=book.txt \\
        questions.path=questions.jsonl output.path=answers.jsonl
    python -m launch.ask model.path=DIR document.load=book.kv       # type questions, or pipe them
    python -m launch.ask transport=threads transport.world_size=2 model=smollm2 ...

questions.path has one JSON object on each line: {"question": "..."} or {"query_ids": [...]}, with
any other fields, which come back.  Answers are written in the same order, one line each, as soon as
each is there; a run that was stopped goes on where it was when it is started again.
Without questions.path every line of standard input is a question; its answer is streamed.
Each question is asked alone; with questions.follow_up=true it sees those before it.
questions.documents_path has several documents, one on each line: {"document": NAME, "path": FILE},
or "text", "context_ids", "load" in place of "path"; each question then has "document": NAME, too.
"""

from __future__ import annotations

from launch.interrupts import quiet_interrupts

if __name__ == "__main__":  # the imports below take seconds
    quiet_interrupts()

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from launch.answers import AnswerLog, answered, check_typed_before
from launch.encode import encoded_document
from launch.help import help_text
from launch.inputs import STDIN, Request, check_one_reader, read_context
from launch.library import Entry, Library, Turn, read_entries
from launch.lines import check_free
from launch.options import ASK
from launch.outputs import check_writable
from launch.questions import ONLY, Question, read_questions, typed_lines
from launch.start import RankCommand, run_program
from launch.streams import print_piece
from launch.terminal import terminal_as_it_was
from launch.weights import usable_model
from ringstar.answers import Answer
from ringstar.config import AskConfig
from ringstar.errors import UserError
from ringstar.exchange import text_of_rank_0
from ringstar.models import ModelFiles
from ringstar.ranks import make_ranks, under_torchrun, world_size_of
from ringstar.runtime import LongContext

log = logging.getLogger("ringstar")


def main(arguments: Sequence[str]) -> int:
    """Parse, start ranks if asked to, answer; returns the exit status."""
    command = RankCommand(
        "launch.ask",
        ASK.parse,
        check_request,
        run_rank,
        help=lambda: help_text(__doc__ or "", ASK),
    )
    with terminal_as_it_was():
        return command.main(arguments)


def check_request(config: AskConfig) -> tuple[ModelFiles, dict[str, Entry], list[Question]]:
    """All that can be found wrong before ranks start and weights load."""
    check_one_reader(config)
    several = config.questions.documents_path is not None
    if config.questions.path is None and (several or config.document.path == STDIN):
        what = "each names its document" if several else "standard input is the document"
        raise UserError("questions.path", None, f"needed: {what}")
    check_writable(config)
    files = usable_model(config)
    entries = _entries(config, files)
    questions: list[Question] = []
    if config.questions.path is not None:
        world = config.launch.nproc or world_size_of(config.transport)
        sizes = {name: len(entry.ids) for name, entry in entries.items()}
        questions = read_questions(config, files, sizes, world)
        answered(config, entries, questions)
    else:
        check_typed_before(config, entries[ONLY])
    if config.output.path is not None:
        check_free(config.output.path)
    return files, entries, questions


def _entries(config: AskConfig, files: ModelFiles) -> dict[str, Entry]:
    """The documents by name, or the only one."""
    if config.questions.documents_path is None:
        return {ONLY: Entry(read_context(config, files), config.document.load)}
    for name, value in vars(config.document).items():
        if value is not None:
            why = "questions.documents_path has the documents; drop one of them"
            raise UserError(f"document.{name}", value, why)
    return read_entries(config, files)


def run_rank(config: AskConfig, phases: Any) -> None:
    """What every rank does: connect, encode or load, answer; rank 0 reads and writes."""
    files, entries, questions = check_request(config)
    runtime = LongContext(config, files, *make_ranks(config.transport, phases))
    asked: dict[str, list[int]] = {}
    for question in questions:
        asked.setdefault(question.document, []).append(len(question.ids))
    if not config.questions.follow_up:
        _check_lengths(runtime, entries, asked)
    longest = {name: max(sizes) for name, sizes in asked.items()}
    library = Library(runtime, entries, longest)
    with _answer_log(config, runtime, entries) as answers:
        if ONLY in entries:
            request = Request(entries[ONLY].ids, [0] * longest.get(ONLY, 0))
            library.add(ONLY, encoded_document(config, runtime, request))
        if config.questions.path is not None:
            _answer_file(config, runtime, library, questions, answers)
        else:
            _answer_typed(config, runtime, library, answers)
    runtime.close()


def _check_lengths(
    runtime: LongContext, entries: Mapping[str, Entry], asked: Mapping[str, list[int]]
) -> None:
    """Raise UserError now if a document would have to be encoded for each question anew."""
    for name, sizes in asked.items():
        entry = entries[name]
        if entry.load is None:
            runtime.check_lengths([len(entry.ids) + tokens for tokens in sizes])


def _answer_file(
    config: AskConfig,
    runtime: LongContext,
    library: Library,
    questions: list[Question],
    answers: AnswerLog | None,
) -> None:
    first = runtime.rank == 0
    found = json.dumps(answered(config, library.entries, questions))
    done = json.loads(_of_rank_0(runtime, found) or "[]")
    if answers is not None:
        answers.begin()
    if first and done:
        log.info(f"{len(done)} of {len(questions)} questions are answered in {config.output.path}")
    shown = first and sys.stderr.isatty() and config.output.path is not None
    before: dict[str, list[Turn]] = {}
    for question, answer_ids in zip(questions, done, strict=False):
        before.setdefault(question.document, []).append((question.asked, answer_ids))
    ask = asker(config, runtime, library, before)
    for question in tqdm(questions[len(done) :], "questions", disable=not shown, leave=False):
        answer = ask(question.document, question.asked)
        if answers is not None:
            answers.add(question.line, answer, question.document)


def _answer_log(
    config: AskConfig, runtime: LongContext, entries: Mapping[str, Entry]
) -> AbstractContextManager[AnswerLog | None]:
    """Where rank 0 keeps answers; typed questions have theirs on the screen."""
    kept = config.questions.path is not None or config.output.path is not None
    return closing(AnswerLog(config, entries)) if kept and runtime.rank == 0 else nullcontext()


def _answer_typed(
    config: AskConfig, runtime: LongContext, library: Library, answers: AnswerLog | None
) -> None:
    """Until the end of standard input; every rank hears the same."""
    # nobody is there to put the terminal in order after a rank of torchrun's that was stopped
    edited = config.launch.report is not None or not under_torchrun()
    lines = typed_lines(config.transport.timeout_s, edited) if runtime.rank == 0 else iter(())
    ask = asker(config, runtime, library)
    show = partial(print_piece, kept=answers is not None)
    if answers is not None:
        check_typed_before(config, library.entries[ONLY])  # another run may have begun it meanwhile
        answers.begin()
    while (question := _of_rank_0(runtime, next(lines, None))) is not None:
        if not question.strip():
            continue
        try:
            answer = ask(ONLY, question, on_text=show)
        except UserError as error:  # the same on every rank
            if runtime.rank == 0:
                log.info(str(error))
            continue
        if runtime.rank == 0:
            ids = "" if runtime.files.tokenizer else " ".join(map(str, answer.ids))
            show(f"{ids}\n")
        if answers is not None:
            answers.add({"question": question}, answer, ONLY)


def asker(
    config: AskConfig,
    runtime: LongContext,
    library: Library,
    before: Mapping[str, Sequence[Turn]] = MappingProxyType({}),
) -> Callable[..., Answer]:
    """What takes a document's name and a question: alone, or after those before it and answers."""

    def ask(name: str, question: str | list[int], **options: Any) -> Answer:
        if config.questions.follow_up:
            return library.conversation(name, before.get(name, ())).ask(question, **options)
        return runtime.ask(library.document(name), question, **options)

    return ask


def _of_rank_0(runtime: LongContext, text: str | None) -> str | None:
    return runtime.ranks.run(lambda transport: text_of_rank_0(transport, text))[0]


if __name__ == "__main__":
    run_program(main)
