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

import os
import signal

if __name__ == "__main__":  # the imports below take seconds, and Ctrl-C is quiet meanwhile too
    # a rank waits in native code, where Python would not hear it
    _quiet = signal.SIG_DFL if "RANK" in os.environ else lambda *_: os._exit(130)
    signal.signal(signal.SIGINT, _quiet)

import io
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from launch.faults import DONE, leave
from launch.generate import print_piece, show_choices
from launch.help import help_text
from launch.options import SCORE
from launch.outputs import check_writable, config_path, resolved_config, write_file
from launch.pictures import NO_MATPLOTLIB, check_picture, picture_path
from launch.progress import encode_bar
from launch.score_picture import draw
from launch.score_plan import Plan, make_plan
from launch.score_result import line_of, result_of, table
from launch.start import RankCommand
from launch.weights import check_weights
from ringstar.config import ScoreConfig
from ringstar.models import ModelFiles, find_model, quiet_transformers
from ringstar.ranks import check_ranks, make_ranks, under_torchrun
from ringstar.runtime import Document, LongContext, choose_kernel
from ringstar.scores import Score

log = logging.getLogger("ringstar")


def main(arguments: Sequence[str]) -> int:
    """Parse, start ranks if asked to, score; returns the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(help_text(__doc__ or "", SCORE))
        return DONE
    return RankCommand("launch.score", SCORE.parse, check_request, run_rank).main(arguments)


def check_request(config: ScoreConfig) -> tuple[ModelFiles, Plan]:
    """All that can be found wrong before ranks start and weights load."""
    quiet_transformers()
    check_writable(config.output)
    files = find_model(config.model, config.rope)
    if not torch.cuda.is_available():  # ranks with GPUs ask on theirs, before weights load
        choose_kernel(config, files, torch.device("cpu"))
    check_weights(files)
    plan = make_plan(config, files)
    if not plan.continuations:
        check_picture("score.picture", config.score.picture, config.output.path)
    return files, plan


def run_rank(config: ScoreConfig, phases: Any) -> None:
    """What every rank does: connect, score; rank 0 prints and writes."""
    show_choices()
    check_ranks(config)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that it cannot show ends no run
    files, plan = check_request(config)
    ranks, why = make_ranks(config.transport, phases)
    runtime = LongContext(config, files, ranks, why)
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
            print_piece(lines[-1])
    if first and path is not None:
        _write(config, "".join(lines))
        log.info(f"{len(lines)} continuations scored, in {path}")


def _document(
    config: ScoreConfig, runtime: LongContext, plan: Plan
) -> tuple[Document, Sequence[int]]:
    """As it was saved; or encoded but for its last token, and what is read after it."""
    ids, after = plan.document, plan.after
    if config.document.load is not None:
        return runtime.load(config.document.load), after
    length = len(ids) + len(after) + plan.longest - 1
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
    print_piece(table(result))
    if config.output.path is not None:
        _write(config, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    _draw(config, runtime, score)


def _write(config: ScoreConfig, text: str) -> None:
    path = config.output.path
    assert path is not None
    write_file("output.path", path, text)
    write_file("output.path", config_path(path), resolved_config(config))


def _draw(config: ScoreConfig, runtime: LongContext, score: Score) -> None:
    path = picture_path(config.score.picture, config.output.path)
    if path is not None:
        name = f"{runtime.files.folder.name}, {config.strategy.name}"
        write_file("score.picture", path, draw(name, score, config.score.pieces))
    elif config.output.path is not None:
        log.info(f"no picture: {NO_MATPLOTLIB}")


if __name__ == "__main__":
    if not under_torchrun():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_grad_enabled(False)
    leave(main(sys.argv[1:]))
