"""Evaluate exact and Star Attention on long-context tasks: RULER's thirteen, and needles by depth.

    python -m launch.evaluate launch.nproc=4 model.path=DIR evaluate.lengths=4K,16K,64K \\
        evaluate.samples=40 output.path=evaluation.json
    python -m launch.evaluate launch.nproc=2 model=smollm2 evaluate.tasks="niah_* vt" \\
        evaluate.lengths=1K,4K evaluate.star="block_size=1/4" \\
        evaluate.star="block_size=1K anchor_size=256" output.path=evaluation.json

Every setting gets the same samples: exact (Ring Attention, or dense on one rank) and each
evaluate.star, whose sizes are tokens or shares of the document; without any, quarters and eighths.
Each sample is a line of NAME.samples.jsonl as soon as it is scored.  A run that was stopped goes on
where it was, and the same command with more samples, lengths, tasks or settings adds to it.

  niah_single_1 to _3     one needle, in noise or an essay: words or UUIDs
  niah_multikey_1 to _3   among needles of other keys; 2 and 3: nothing but needles
  niah_multivalue         four values of one key
  niah_multiquery         four keys are asked for
  vt                      variables that are assigned each other's value
  cwe, fwe                the most frequent words
  qa_1, qa_2              questions about one paragraph, or about two
  needle_by_depth         one needle in an essay, at evaluate.depths depths

Cost: each sample is encoded once for exact and once for each setting of star.
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
from pathlib import Path
from typing import Any

import torch

from launch.compare import NO_MATPLOTLIB
from launch.compare_picture import can_draw
from launch.evaluate_log import SampleLog, Scored, samples_path, scored_before
from launch.evaluate_measure import Job, Measurement, pending, work_of
from launch.evaluate_picture import draw
from launch.evaluate_plan import Plan, make_plan
from launch.evaluate_result import result_of, results
from launch.evaluate_tables import tables
from launch.faults import DONE, leave
from launch.generate import print_piece, show_choices
from launch.help import help_text
from launch.options import EVALUATE
from launch.outputs import check_file, check_writable, write_file
from launch.progress import work_bar
from launch.start import RankCommand
from launch.weights import check_weights
from ringstar.config import EvaluationConfig
from ringstar.errors import UserError
from ringstar.evaluation import BY_DEPTH
from ringstar.exchange import text_of_rank_0
from ringstar.models import ModelFiles, find_model, quiet_transformers
from ringstar.ranks import Ranks, check_ranks, make_ranks, under_torchrun
from ringstar.runtime import LongContext, choose_kernel

log = logging.getLogger("ringstar")


def main(arguments: Sequence[str]) -> int:
    """Parse, start ranks if asked to, evaluate; returns the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(help_text(__doc__ or "", EVALUATE))
        return DONE
    command = RankCommand("launch.evaluate", EVALUATE.parse, check_request, run_rank)
    return command.main(arguments)


def check_request(config: EvaluationConfig) -> tuple[ModelFiles, Plan, list[Scored]]:
    """All that can be found wrong before ranks start and weights load."""
    quiet_transformers()
    check_writable(config.output)
    _check_pictures(config)
    files = find_model(config.model, config.rope)
    if not torch.cuda.is_available():  # ranks with GPUs ask on theirs, before weights load
        choose_kernel(config, files, torch.device("cpu"))
    check_weights(files)
    plan = make_plan(config, files)
    return files, plan, scored_before(config, plan)


def run_rank(config: EvaluationConfig, phases: Any) -> None:
    """What every rank does: connect, score what is left; rank 0 writes and prints."""
    show_choices()
    check_ranks(config)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that it cannot show ends no run
    files, plan, before = check_request(config)
    ranks, why = make_ranks(config.transport, phases)
    jobs = pending(plan, _done(ranks, before))
    first = ranks.transports[0].rank == 0
    samples = SampleLog(config, before) if first else None
    if first:
        _say_plan(config, plan, jobs)
    if jobs:
        exact = replace(config, strategy=plan.contenders[0].exact)
        runtime = LongContext(exact, files, ranks, why)
        log.setLevel(logging.WARNING)  # blocks of each sample's own size are nothing to say
        with work_bar("evaluate", work_of(jobs), shown=first) as bar:
            add = samples.add if samples else lambda line: None
            Measurement(runtime, plan, bar, add).run(jobs)
    if samples:
        _report(config, files, plan, samples.lines)
    for transport in ranks.transports:
        transport.close()


def _done(ranks: Ranks, before: Sequence[Scored]) -> set[tuple]:
    """The keys of what rank 0 has on file, on every rank."""
    text = json.dumps([line.key for line in before])
    told = ranks.run(lambda transport: text_of_rank_0(transport, text))[0]
    return {tuple(key) for key in json.loads(told or "[]")}


def _say_plan(config: EvaluationConfig, plan: Plan, jobs: Sequence[Job]) -> None:
    for note in plan.notes:
        log.info(note)
    if config.output.path and picture_path(config) is None:
        log.info(f"no picture: {NO_MATPLOTLIB}")
    total = len(plan.contenders) * sum(1 for _ in plan.jobs())
    left = sum(len(contenders) for _, _, contenders in jobs)
    there = f", {total - left} of them done" if left < total else ""
    log.info(f"{total} samples over {len(plan.contenders)} settings{there}")


def picture_path(config: EvaluationConfig) -> Path | None:
    """Where the picture of the tasks goes; None if there is none."""
    given, output = config.evaluate.picture, config.output.path
    if given is not None:
        return Path(given).expanduser()
    if output is None or not can_draw():
        return None
    return Path(output).expanduser().with_suffix(".png")


def _depth_path(picture: Path) -> Path:
    """Where needles by depth go: beside it."""
    return picture.with_name(f"{picture.stem}.depths{picture.suffix}")


def _check_pictures(config: EvaluationConfig) -> None:
    path = picture_path(config)
    if config.output.path:
        check_file("output.path", str(samples_path(config.output.path)))
    if path is None:
        return
    given = config.evaluate.picture or str(path)
    if not can_draw():
        raise UserError("evaluate.picture", given, NO_MATPLOTLIB)
    if not given.endswith(".png"):
        raise UserError("evaluate.picture", given, "allowed: a name that ends in .png")
    for name in (path, _depth_path(path)):
        check_file("evaluate.picture", str(name))


def _report(
    config: EvaluationConfig, files: ModelFiles, plan: Plan, lines: Sequence[Scored]
) -> None:
    """Tables, the result, and the pictures."""
    found = results(plan, lines)
    print_piece(tables(plan, found))
    path, picture = config.output.path, picture_path(config)
    if path:
        result = result_of(config, files, plan, found)
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        write_file("output.path", path, text)
    if picture is None:
        return
    of_tasks = [row for row in found if row.task != BY_DEPTH]
    by_depth = [row for row in found if row.task == BY_DEPTH]
    parts = ((picture, of_tasks, "tasks"), (_depth_path(picture), by_depth, "one needle by depth"))
    for target, rows, what in parts:
        if rows:
            title = f"{files.folder.name}: {what}"
            write_file("evaluate.picture", target, draw(plan, rows, title))


if __name__ == "__main__":
    if not under_torchrun():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_grad_enabled(False)
    leave(main(sys.argv[1:]))
