"""Measure what answers cost: time to first token, per token, throughput; with peers beside.

    python -m launch.bench model=smollm2 bench.lengths=1K,4K bench.worlds=1,2 output.path=bench.json
    python -m launch.bench model.path=DIR bench.worlds=1,8 bench.lengths=32K,128K \\
        bench.batches=1,4 bench.strategy=ring bench.strategy="star block_size=1/8" \\
        --against bench.json
    torchrun --nproc-per-node 8 -m launch.bench model.path=DIR bench.lengths=128K

Every combination of strategy, number of ranks, length and batch is a cell: prompts of random tokens
are read and answered, bench.requests times, as closely as the peers beside do it:

  hf-eager, hf-sdpa       Hugging Face's generate in one process, with these attentions
  hf-batch                its generate_batch (continuous batching)
  llama.cpp               llama-cpp-python, on the GGUF file that the model comes from
  ring-attention-pytorch  attention alone, on as many ranks as ours

Each number of ranks, and each peer, runs in processes of its own, one after another; on a CPU each
has all cores.  On a machine that others use too, bench.rounds=3 measures everyone three times, one
round after another, so that what others do falls on all.  A block for each cell is printed when it
is done, then tables, and as the last line of standard output everything as JSON.  --against
compares with an earlier result and ends with status 1 if something of ours takes more than
bench.tolerance longer: on a CPU as multiples of a peer's time in the same run, on the same kind of
GPU in milliseconds.
"""

from __future__ import annotations

from launch.interrupts import quiet_interrupts

if __name__ == "__main__":  # the imports below take seconds
    quiet_interrupts()

import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from launch.bench.against import changes, lost, read_earlier
from launch.bench.attention import OURS
from launch.bench.cells import AttentionTimes, Line, LineReader, Measured
from launch.bench.children import check_world, children
from launch.bench.picture import draw
from launch.bench.plan import Plan
from launch.bench.ranks import check_request as check_plan
from launch.bench.ranks import measure
from launch.bench.result import result_of, row_of
from launch.bench.tables import block, comparison, tables
from launch.faults import DONE, ENDED, FAULT, USER, Fault, Reporter, exit_status
from launch.help import help_text
from launch.options import BENCH
from launch.outputs import check_writable, write_file, write_result
from launch.pictures import NO_MATPLOTLIB, check_picture, picture_path
from launch.progress import BAR_FORM
from launch.ranks import start_ranks
from launch.start import RankCommand, run_program
from launch.streams import print_every_letter, print_piece, show_choices
from ringstar.config import BenchConfig
from ringstar.models import ModelFiles
from ringstar.ranks import under_torchrun

log = logging.getLogger("ringstar")
_AGAINST = re.compile("^--against=")


def main(arguments: Sequence[str]) -> int:
    """Parse, start everyone who is measured, report; returns the exit status."""
    given = with_against(arguments)
    if under_torchrun():
        run = partial(run_rank, given)
        return RankCommand("launch.bench", BENCH.parse, check_request, run, _help).main(given)
    if {"-h", "--help"} & set(given):
        print(_help())
        return DONE
    reporter = Reporter()
    return exit_status(lambda: _start_everyone(given, reporter), reporter)


def check_request(config: BenchConfig) -> tuple[ModelFiles, Plan, dict[str, Any] | None]:
    """All that can be found wrong before anything starts; with it the result to compare with."""
    check_writable(config)
    check_picture("bench.picture", config.bench.picture, config.output.path)
    files, plan = check_plan(config)
    return files, plan, read_earlier(plan, files)


def run_rank(arguments: Sequence[str], config: BenchConfig, phases: Any) -> None:
    """What each of torchrun's ranks does: measure; rank 0 reports."""
    files, plan, earlier = check_request(config)
    if os.environ["RANK"] == "0":
        _say_plan(config, plan)
    with tempfile.TemporaryDirectory() as folder, _bar(plan) as bar:
        report = Report(arguments, files, plan, earlier, bar)
        cells = Path(folder) / "cells.jsonl"
        reader, first = LineReader(cells, report.show), os.environ["RANK"] == "0"
        try:
            with reader:
                measure(config, files, plan, str(cells), phases)
        except Exception:  # what is done is not lost, and the fault is what is said
            with suppress(Exception):
                if first:
                    report.finish(reader.lines, whole=False)
            raise
    if first:
        report.finish(reader.lines)


def _start_everyone(arguments: Sequence[str], reporter: Reporter) -> int:
    config = BENCH.parse(arguments)
    reporter.show_traceback = config.launch.traceback
    show_choices()
    print_every_letter()
    files, plan, earlier = check_request(config)
    for world in plan.worlds:
        check_world(config, world)
    _say_plan(config, plan)
    worst, stopped = DONE, False
    with tempfile.TemporaryDirectory() as folder, _bar(plan) as bar:
        report = Report(arguments, files, plan, earlier, bar)
        cells = Path(folder) / "cells.jsonl"
        with LineReader(cells, report.show) as reader:
            for child in children(plan, arguments, cells):
                bar.clear()
                status = start_ranks(child.module, child.arguments, child.nproc)
                if status >= ENDED or (status == USER and not child.peer):
                    worst, stopped = status, True
                    break
                if status != DONE and child.peer:
                    log.info(f"{child.module} ended so; the others go on")
                elif status != DONE:  # it was said which rank, and why
                    worst = worst or status
    if stopped:
        if any(isinstance(line, Measured) for line in reader.lines):
            with suppress(Exception):  # what is done is not lost
                report.finish(reader.lines, whole=False)
        return worst
    measured = {line.key for line in reader.lines if isinstance(line, AttentionTimes)}
    if any(key[0] == OURS and key not in measured for key in plan.attention()):
        worst = worst or FAULT
    report.finish(reader.lines, whole=worst == DONE)
    return worst


class Report:
    """What is said and written of a benchmark."""

    def __init__(
        self,
        arguments: Sequence[str],
        files: ModelFiles,
        plan: Plan,
        earlier: dict[str, Any] | None,
        bar: tqdm,
    ):
        self._command = ["launch.bench", *arguments]
        self._config, self._files, self._plan = plan.config, files, plan
        self._earlier, self._bar = earlier, bar

    def show(self, line: Line) -> None:
        """A cell that is done."""
        if not isinstance(line, Measured):
            return
        with self._bar.external_write_mode():
            print_piece(block(row_of(line)) + "\n")
        self._bar.update(line.length * line.batch)

    def finish(self, lines: Sequence[Line], *, whole: bool = True) -> None:
        """Tables, files, and the last line; raises Fault if something of ours became slower.

        What is not `whole` takes the place of no earlier file.
        """
        config = self._config
        result = result_of(self._command, self._files, self._plan, lines)
        print_piece(tables(result))
        found, how = changes(result, self._earlier) if self._earlier else ([], "")
        if self._earlier is not None:
            print_piece(comparison(found, how, config.bench.tolerance, str(config.bench.against)))
            result["against"] = [asdict(change) for change in found]
        path = picture_path(config.bench.picture, config.output.path)
        # before a disk may be full
        print_piece(json.dumps(result) + "\n", kept=config.output.path is not None)
        files = [Path(file) for file in (config.output.path, path) if file is not None]
        there = [file for file in files if file.expanduser().exists()]
        if there and not whole:
            log.info(f"{there[0]} is left as it was: this benchmark is not whole")
            return
        write_result(config, result)
        if path is not None:
            write_file("bench.picture", path, draw(result))
        if self._earlier is not None and not found:
            raise Fault("nothing could be compared: no cell was measured alike both times")
        gone = lost(self._plan, result, self._earlier) if self._earlier is not None else []
        if gone:
            who, world, length, batch = gone[0]
            cell = f"{who}, {world} ranks, {length:,} tokens, batch {batch}"
            raise Fault(f"{len(gone)} cells had times before, and have none now: first {cell}")
        slower = sum(change.times > 1 + config.bench.tolerance for change in found)
        if slower:
            share = f"{config.bench.tolerance:.0%} (bench.tolerance)"
            raise Fault(f"{slower} times are longer than before by more than {share}")


def _say_plan(config: BenchConfig, plan: Plan) -> None:
    for note in plan.notes:
        log.info(note)
    if config.output.path and picture_path(config.bench.picture, config.output.path) is None:
        log.info(f"no picture: {NO_MATPLOTLIB}")
    rounds = config.bench.rounds
    often = f", {rounds} rounds of them" if rounds > 1 else ""
    log.info(f"{sum(1 for _ in plan.cells())} cells{often}")


def _bar(plan: Plan) -> tqdm:
    each = sum(load.length * load.batch for _, _, load in plan.cells())
    return tqdm(
        desc="bench",
        total=float(each * plan.config.bench.rounds),
        bar_format=BAR_FORM,
        disable=not sys.stderr.isatty() or int(os.environ.get("RANK", "0")) > 0,
        leave=False,
    )


def with_against(arguments: Sequence[str]) -> list[str]:
    """`--against FILE` and `--against=FILE` as our own option."""
    given, found = list(arguments), []
    while given:
        word = given.pop(0)
        if word == "--against" and given:
            word = f"{word}={given.pop(0)}"
        found.append(_AGAINST.sub("bench.against=", word))
    return found


def _help() -> str:
    return help_text(__doc__ or "", BENCH)


if __name__ == "__main__":
    run_program(main)
