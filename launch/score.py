"""How likely the model holds texts to be: continuations of a document, or the document itself.

    python -m launch.score launch.nproc=4 model.path=DIR document.path=book.txt output.path=a.json
    python -m launch.score launch.nproc=4 model.path=DIR document.path=book.txt \\
        score.path=continuations.jsonl output.path=scores.jsonl
    python -m launch.score transport=threads transport.world_size=2 model=smollm2 \\
        document.load=book.kv question="Who left?" score.continuation="Captain Vega left."

score.path has one JSON object on each line: {"continuation": "..."} or {"continuation_ids": [...]},
with any other fields, which come back; each is scored by itself, right after the document or, with
a question, as its answer.  A line of the result adds the log-probability of each token.

Without continuations every token of the document is scored but the first, which has nothing before
it, each by the rank that encodes the one before: the document's perplexity, as a table and as a
picture also piece by piece.  By ring that is the perplexity on one device.  Star is approximate:
a token is given what its block sees, a continuation all that is kept.
"""

from __future__ import annotations

from launch.interrupts import quiet_interrupts

if __name__ == "__main__":  # the imports below take seconds
    quiet_interrupts()

import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from launch.help import help_text
from launch.options import SCORE
from launch.outputs import check_writable, write_config, write_file, write_result
from launch.pictures import NO_MATPLOTLIB, check_picture, picture_path
from launch.progress import encode_bar
from launch.score_picture import draw
from launch.score_plan import Plan, make_plan
from launch.score_result import line_of, result_of, table
from launch.start import RankCommand, run_program
from launch.streams import print_piece
from launch.weights import usable_model
from ringstar.config import ScoreConfig
from ringstar.errors import UserError
from ringstar.models import ModelFiles
from ringstar.ranks import make_ranks
from ringstar.runtime import Document, LongContext
from ringstar.scores import Score

log = logging.getLogger("ringstar")


def main(arguments: Sequence[str]) -> int:
    """Parse, start ranks if asked to, score; returns the exit status."""
    command = RankCommand(
        "launch.score",
        SCORE.parse,
        check_request,
        run_rank,
        help=lambda: help_text(__doc__ or "", SCORE),
    )
    return command.main(arguments)


def check_request(config: ScoreConfig) -> tuple[ModelFiles, Plan]:
    """All that can be found wrong before ranks start and weights load."""
    check_writable(config)
    files = usable_model(config)
    plan = make_plan(config, files)
    if not plan.continuations:
        check_picture("score.picture", config.score.picture, config.output.path)
    elif config.score.picture is not None:
        why = "draws the perplexity of a document, and continuations are scored; drop one"
        raise UserError("score.picture", config.score.picture, why)
    return files, plan


def run_rank(config: ScoreConfig, phases: Any) -> None:
    """What every rank does: connect, score; rank 0 prints and writes."""
    files, plan = check_request(config)
    runtime = LongContext(config, files, *make_ranks(config.transport, phases))
    if plan.continuations:
        _score_continuations(config, runtime, plan)
    else:
        _score_document(config, runtime, plan)
    runtime.close()


def _score_continuations(config: ScoreConfig, runtime: LongContext, plan: Plan) -> None:
    """A line for each; printed as soon as it is there, or written at the end."""
    first, path, lines = runtime.rank == 0, config.output.path, []
    document, after = _document(config, runtime, plan)
    shown = first and sys.stderr.isatty() and path is not None
    for each in tqdm(plan.continuations, "continuations", disable=not shown, leave=False):
        (score,) = runtime.score(document, [each.ids], after=after)
        lines.append(json.dumps(line_of(each, score), ensure_ascii=False) + "\n")
        if first and path is None:
            print_piece(lines[-1], kept=False)
    if first and path is not None:
        write_file("output.path", path, "".join(lines))
        write_config(config, path)
        log.info(f"{len(lines)} continuations scored, in {path}")


def _document(
    config: ScoreConfig, runtime: LongContext, plan: Plan
) -> tuple[Document, Sequence[int]]:
    """As it was saved; or encoded but for its last token, and what is read after it."""
    ids, after = plan.document, plan.after
    if config.document.load is not None:
        return runtime.load(config.document.load), after
    read = [len(each.ids) - 1 for each in plan.continuations]
    length = runtime.check_lengths([len(ids) + len(after) + tokens for tokens in read])
    if not after and len(ids) > 1:  # so that its own last token is not read twice
        ids, after = ids[:-1], ids[-1:]
    with encode_bar(len(ids), shown=runtime.rank == 0) as on_progress:
        return runtime.encode(ids, on_progress, length=length), after


def _score_document(config: ScoreConfig, runtime: LongContext, plan: Plan) -> None:
    started = time.perf_counter()
    with encode_bar(len(plan.document), shown=runtime.rank == 0) as on_progress:
        score = runtime.score_text(plan.document, on_progress)
    seconds = time.perf_counter() - started
    if runtime.rank != 0:
        return
    result = result_of(config, runtime, plan, score, seconds)
    print_piece(table(result), kept=config.output.path is not None)
    write_result(config, result)
    _draw(config, runtime, score)


def _draw(config: ScoreConfig, runtime: LongContext, score: Score) -> None:
    path = picture_path(config.score.picture, config.output.path)
    if path is not None:
        name = f"{runtime.files.name}, {config.strategy.name}"
        write_file("score.picture", path, draw(name, score, config.score.pieces))
    elif config.output.path is not None:
        log.info(f"no picture: {NO_MATPLOTLIB}")


if __name__ == "__main__":
    run_program(main)
