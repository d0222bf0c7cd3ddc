"""Evaluate exact and Star Attention on long-context tasks: RULER's thirteen, and needles by depth.

    python -m launch.evaluate launch.nproc=4 model.path=DIR evaluate.lengths=4K,16K,64K \\
        evaluate.samples=40 output.path=evaluation.json
    python -m launch.evaluate launch.nproc=2 model=smollm2 evaluate.tasks="niah_* vt" \\
        evaluate.lengths=1K,4K evaluate.star="block_size=1/4" \\
        evaluate.star="block_size=1K anchor_size=256" output.path=evaluation.json

Every setting gets the same samples: exact (Ring Attention, or dense on one rank) and each
evaluate.star, whose sizes are tokens or shares of the document; without any, quarters and eighths;
evaluate.star=none evaluates exact alone.
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

from launch.interrupts import quiet_interrupts

if __name__ == "__main__":  # the imports below take seconds
    quiet_interrupts()

import json
import logging
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.evaluate_log import (
    SampleLog,
    Scored,
    check_model,
    models_of,
    samples_path,
    scored_before,
)
from launch.evaluate_measure import Job, Measurement, pending, work_of
from launch.evaluate_picture import draw
from launch.evaluate_plan import Plan, make_plan
from launch.evaluate_result import result_of, results
from launch.evaluate_tables import tables
from launch.help import help_text
from launch.lines import check_free
from launch.options import EVALUATE
from launch.outputs import check_file, check_writable, write_file, write_result
from launch.pictures import NO_MATPLOTLIB, check_picture, picture_path
from launch.progress import work_bar
from launch.start import RankCommand, run_program
from launch.streams import choices_unsaid, print_piece
from launch.weights import usable_model
from ringstar.config import EvaluationConfig
from ringstar.evaluation import BY_DEPTH
from ringstar.exchange import text_of_rank_0
from ringstar.models import ModelFiles
from ringstar.ranks import Ranks, make_ranks
from ringstar.runtime import LongContext

log = logging.getLogger("ringstar")


def main(arguments: Sequence[str]) -> int:
    """Parse, start ranks if asked to, evaluate; returns the exit status."""
    command = RankCommand(
        "launch.evaluate",
        EVALUATE.parse,
        check_request,
        run_rank,
        help=lambda: help_text(__doc__ or "", EVALUATE),
    )
    return command.main(arguments)


def check_request(config: EvaluationConfig) -> tuple[ModelFiles, Plan, list[Scored]]:
    """All that can be found wrong before ranks start and weights load."""
    check_writable(config)
    _check_files(config)
    files = usable_model(config)
    plan = make_plan(config, files)
    if config.output.path:
        check_free(samples_path(config.output.path))
    return files, plan, scored_before(config, plan)


def run_rank(config: EvaluationConfig, phases: Any) -> None:
    """What every rank does: connect, score what is left; rank 0 writes and prints."""
    files, plan, before = check_request(config)
    ranks, why = make_ranks(config.transport, phases)
    jobs = pending(plan, _done(ranks, before))
    first = ranks.transports[0].rank == 0
    if first:
        _say_plan(config, plan, jobs)
    with closing(SampleLog(config, before)) if first else nullcontext() as samples:
        runtime = _runtime(config, files, plan, ranks, why, before) if jobs else None
        if samples:
            samples.begin()
        if runtime is not None:
            with choices_unsaid(), work_bar("evaluate", work_of(jobs), shown=first) as bar:
                add = samples.add if samples else lambda line: None
                Measurement(runtime, plan, bar, add).run(jobs)
        if samples:
            _report(config, files, plan, samples.lines)
    # a runtime's also writes its trace
    for each in [runtime] if runtime is not None else ranks.transports:
        each.close()


def _runtime(
    config: EvaluationConfig,
    files: ModelFiles,
    plan: Plan,
    ranks: Ranks,
    why: str,
    before: Sequence[Scored],
) -> LongContext:
    """With the model, which is the one that was scored before."""
    exact = replace(config, strategy=plan.contenders[0].exact)
    runtime = LongContext(exact, files, ranks, why)
    check_model(config.output.path, _of_rank_0(ranks, models_of(before)), runtime)
    return runtime


def _done(ranks: Ranks, before: Sequence[Scored]) -> set[tuple]:
    """The keys of what rank 0 has on file, on every rank."""
    return {tuple(key) for key in _of_rank_0(ranks, [line.key for line in before])}


def _of_rank_0(ranks: Ranks, value: Any) -> Any:
    """What rank 0 has, as JSON knows it."""
    text = json.dumps(value)
    return json.loads(ranks.run(lambda transport: text_of_rank_0(transport, text))[0] or "[]")


def _say_plan(config: EvaluationConfig, plan: Plan, jobs: Sequence[Job]) -> None:
    for note in plan.notes:
        log.info(note)
    if config.profile.path is not None and not jobs:
        log.info("no trace: every sample is scored already")
    if config.output.path and picture_paths(config) is None:
        log.info(f"no picture: {NO_MATPLOTLIB}")
    total = len(plan.contenders) * sum(1 for _ in plan.jobs())
    left = sum(len(contenders) for _, _, contenders in jobs)
    there = f", {total - left} of them done" if left < total else ""
    log.info(f"{total} samples over {len(plan.contenders)} settings{there}")


def _check_files(config: EvaluationConfig) -> None:
    """Samples and pictures, which go beside the result."""
    if config.output.path:
        check_file("output.path", str(samples_path(config.output.path)))
    check_picture("evaluate.picture", config.evaluate.picture, config.output.path)
    pictures = picture_paths(config)
    if pictures:
        check_file("evaluate.picture", str(pictures[1]))


def picture_paths(config: EvaluationConfig) -> tuple[Path, Path] | None:
    """Where the picture of the tasks goes, and beside it that of needles by depth."""
    given = picture_path(config.evaluate.picture, config.output.path)
    if given is None:
        return None
    path = Path(given)
    return path, path.with_name(f"{path.stem}.depths{path.suffix}")


def _report(
    config: EvaluationConfig, files: ModelFiles, plan: Plan, lines: Sequence[Scored]
) -> None:
    """Tables, the result, and the pictures."""
    found = results(plan, lines)
    print_piece(tables(plan, found), kept=config.output.path is not None)
    write_result(config, result_of(config, files, plan, found))
    pictures = picture_paths(config)
    if pictures is None:
        return
    of_tasks = [row for row in found if row.task != BY_DEPTH]
    by_depth = [row for row in found if row.task == BY_DEPTH]
    parts = ((of_tasks, "tasks"), (by_depth, "one needle by depth"))
    for path, (rows, what) in zip(pictures, parts, strict=True):
        if rows:
            title = f"{files.name}: {what}"
            write_file("evaluate.picture", path, draw(plan, rows, title))


if __name__ == "__main__":
    run_program(main)
