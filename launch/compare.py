"""Hold Star Attention against exact attention, on your own document and questions.

    python -m launch.compare launch.nproc=4 model.path=DIR document.path=book.txt \\
        question="What's the ship's name?" question="Who left?" \\
        compare.star="block_size=4K" compare.star="block_size=4K anchor_size=1K" \\
        output.path=compare.json
    python -m launch.compare transport=threads transport.world_size=2 model=smollm2 ...

It answers every question exactly (Ring Attention, or dense on one rank) and with each setting of
star, and prints the answers side by side, with the time, KV and bytes of each encode.
Without compare.star it takes blocks of a quarter and an eighth of the document behind whole
anchors, and a quarter behind none.  The model is loaded once.

  KL       how far star's guess of the next token is from exact's, in nats; 0 is the same guess.
           Measured at every token of exact's answer, and of passages quoted from the document.
  top-1    how often the likeliest next token is the same.
  needles  facts planted at even depths of a copy of the document: which are found again?

Cost: with S settings and T needle trials, (1 + S)·(1 + T) encodes; without needles 1 + S.
"""

from __future__ import annotations

from launch.interrupts import quiet_interrupts

if __name__ == "__main__":  # the imports below take seconds
    quiet_interrupts()

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from launch.compare_measure import Measured, Measurement
from launch.compare_picture import draw
from launch.compare_plan import Plan, make_plan
from launch.compare_progress import work_of
from launch.compare_result import result_of
from launch.compare_tables import tables
from launch.help import help_text
from launch.options import COMPARE
from launch.outputs import check_writable, write_file, write_result
from launch.pictures import NO_MATPLOTLIB, check_picture, picture_path
from launch.progress import work_bar
from launch.start import RankCommand, run_program
from launch.streams import print_piece
from launch.weights import usable_model
from ringstar.config import ComparisonConfig
from ringstar.models import ModelFiles
from ringstar.ranks import make_ranks
from ringstar.runtime import LongContext


def main(arguments: Sequence[str]) -> int:
    """Parse, start ranks if asked to, compare; returns the exit status."""
    command = RankCommand(
        "launch.compare",
        COMPARE.parse,
        check_request,
        run_rank,
        help=lambda: help_text(__doc__ or "", COMPARE),
    )
    return command.main(arguments)


def check_request(config: ComparisonConfig) -> tuple[ModelFiles, Plan]:
    """All that can be found wrong before ranks start and weights load."""
    check_writable(config)
    check_picture("compare.picture", config.compare.picture, config.output.path)
    files = usable_model(config)
    return files, make_plan(config, files)


def run_rank(config: ComparisonConfig, phases: Any) -> None:
    """What every rank does: connect, put each setting to the test; rank 0 prints and writes."""
    files, plan = check_request(config)
    config = replace(config, strategy=plan.exact.strategy)
    runtime = LongContext(config, files, *make_ranks(config.transport, phases))
    if runtime.rank == 0:
        _say_plan(config, plan)
    work = work_of(plan, config.generation.max_new_tokens)
    with work_bar("compare", work, shown=runtime.rank == 0) as bar:
        found = Measurement(runtime, plan, bar).run()
    if runtime.rank == 0:
        print_piece(tables(plan, found), kept=config.output.path is not None)
        _write(config, runtime, plan, found)
    runtime.close()


def _say_plan(config: ComparisonConfig, plan: Plan) -> None:
    log = logging.getLogger("ringstar")
    for note in plan.notes:
        log.info(note)
    if config.output.path and picture_path(config.compare.picture, config.output.path) is None:
        log.info(f"no picture: {NO_MATPLOTLIB}")
    log.info(f"{plan.encodes} encodes, {len(plan.settings)} settings")


def _write(
    config: ComparisonConfig, runtime: LongContext, plan: Plan, found: Sequence[Measured]
) -> None:
    """The result, and the picture."""
    write_result(config, result_of(runtime, plan, found))
    picture = picture_path(config.compare.picture, config.output.path)
    if picture:
        write_file("compare.picture", picture, draw(plan, found))


if __name__ == "__main__":
    run_program(main)
