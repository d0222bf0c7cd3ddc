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
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from launch.compare_measure import Measured, Measurement
from launch.compare_picture import draw
from launch.compare_plan import Plan, make_plan
from launch.compare_progress import work_of
from launch.compare_result import result_of
from launch.compare_tables import tables
from launch.faults import DONE, leave
from launch.generate import print_piece, show_choices
from launch.help import help_text
from launch.options import COMPARE
from launch.outputs import check_writable, config_path, resolved_config, write_file
from launch.pictures import NO_MATPLOTLIB, check_picture, picture_path
from launch.progress import work_bar
from launch.start import RankCommand
from launch.weights import check_weights
from ringstar.config import ComparisonConfig
from ringstar.models import ModelFiles, find_model, quiet_transformers
from ringstar.ranks import check_ranks, make_ranks, under_torchrun
from ringstar.runtime import LongContext, choose_kernel


def main(arguments: Sequence[str]) -> int:
    """Parse, start ranks if asked to, compare; returns the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(help_text(__doc__ or "", COMPARE))
        return DONE
    command = RankCommand("launch.compare", COMPARE.parse, check_request, run_rank)
    return command.main(arguments)


def check_request(config: ComparisonConfig) -> tuple[ModelFiles, Plan]:
    """All that can be found wrong before ranks start and weights load."""
    quiet_transformers()
    check_writable(config.output)
    check_picture("compare.picture", config.compare.picture, config.output.path)
    files = find_model(config.model, config.rope)
    if not torch.cuda.is_available():  # ranks with GPUs ask on theirs, before weights load
        choose_kernel(config, files, torch.device("cpu"))
    check_weights(files)
    return files, make_plan(config, files)


def run_rank(config: ComparisonConfig, phases: Any) -> None:
    """What every rank does: connect, put each setting to the test; rank 0 prints and writes."""
    show_choices()
    check_ranks(config)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that it cannot show ends no run
    files, plan = check_request(config)
    config = replace(config, strategy=plan.exact.strategy)
    ranks, why = make_ranks(config.transport, phases)
    runtime = LongContext(config, files, ranks, why)
    if runtime.rank == 0:
        _say_plan(config, plan)
    work = work_of(plan, config.generation.max_new_tokens)
    with work_bar("compare", work, shown=runtime.rank == 0) as bar:
        found = Measurement(runtime, plan, bar).run()
    if runtime.rank == 0:
        print_piece(tables(plan, found))
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
    """The result, the resolved config beside it, and the picture."""
    path = config.output.path
    picture = picture_path(config.compare.picture, path)
    if path:
        result = result_of(runtime, plan, found)
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        write_file("output.path", path, text)
        write_file("output.path", config_path(path), resolved_config(config))
    if picture:
        write_file("compare.picture", picture, draw(plan, found))


if __name__ == "__main__":
    if not under_torchrun():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_grad_enabled(False)
    leave(main(sys.argv[1:]))
