"""One number of ranks: every strategy that it can run, with every load.

`python -m launch.bench` starts it for each number of ranks; what is measured goes to bench.cells.
"""

from __future__ import annotations

from launch.interrupts import quiet_interrupts

if __name__ == "__main__":  # the imports below take seconds
    quiet_interrupts()

import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from launch.bench.cells import Line, Load, Measured, add_line, measured
from launch.bench.measure import timed_calls
from launch.bench.plan import Plan, make_plan
from launch.evaluate_star import Contender
from launch.options import BENCH
from launch.start import RankCommand, run_program
from launch.weights import usable_model
from ringstar import attach, detach
from ringstar.checks import choose_kernel
from ringstar.config import BenchConfig, StrategyConfig
from ringstar.errors import Refusal, in_a_line
from ringstar.metrics import gather_integers
from ringstar.models import ModelFiles, choose_dtype, choose_rope_precision
from ringstar.models.one_device import plain_model
from ringstar.models.plain_generate import PlainGenerate, has_attention
from ringstar.ranks import Ranks, make_ranks
from ringstar.runtime import LongContext
from ringstar.timed import Generates, Timed


def check_request(config: BenchConfig) -> tuple[ModelFiles, Plan]:
    """All that can be found wrong before ranks start and weights load."""
    files = usable_model(config)
    return files, make_plan(config, files)


def run_rank(config: BenchConfig, phases: Any) -> None:
    """What every rank does: connect, and measure; rank 0 writes."""
    files, plan = check_request(config)
    assert config.bench.cells is not None
    measure(config, files, plan, config.bench.cells, phases)


def measure(config: BenchConfig, files: ModelFiles, plan: Plan, cells: str, phases: Any) -> None:
    """Every strategy with every load, as lines of the file `cells`."""
    ranks, why = make_ranks(config.transport, phases)
    first = ranks.transports[0].rank == 0
    RankBench(config, files, plan, ranks, why, cells if first else None).run()
    for transport in ranks.transports:
        transport.close()


class Encoded:
    """A prompt by itself: its document is encoded, and the question at its end answered."""

    def __init__(self, runtime: LongContext, strategy: StrategyConfig, question_tokens: int):
        self._runtime, self._strategy, self._asked = runtime, strategy, question_tokens

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timed:
        (prompt,) = prompts
        text, question = list(prompt[: -self._asked]), list(prompt[-self._asked :])
        asked_s = time.perf_counter()
        document = self._runtime.encode(text, strategy=self._strategy, length=len(prompt))
        encoded_s = time.perf_counter()
        answer = self._runtime.ask(document, question, max_new_tokens=new_tokens, ignore_eos=True)
        document.forget()
        times = [encoded_s + token_s for token_s in answer.token_s]
        return Timed(asked_s, [times], [answer.ids])


class RankBench:
    """Everything that these ranks measure."""

    def __init__(
        self,
        config: BenchConfig,
        files: ModelFiles,
        plan: Plan,
        ranks: Ranks,
        why: str,
        cells: str | None,
    ):
        self._config, self._files, self._plan = config, files, plan
        self._ranks, self._why = ranks, why
        first = ranks.transports[0]
        self._world, self._device = first.world_size, first.device
        self._kernel = choose_kernel(config, files, first.device).backend.name
        self._cells = cells

    def run(self) -> None:
        alone = [load for load in self._plan.loads if load.batch == 1]
        together = [load for load in self._plan.loads if load.batch > 1]
        if alone:
            self._documents(alone)
        if together:
            self._batches(together)

    def _documents(self, loads: Sequence[Load]) -> None:
        """One prompt at a time, as `launch.generate` does it."""
        runtime = LongContext(self._config, self._files, self._ranks, self._why)
        asked = self._config.bench.question_tokens
        for contender, load in self._rounds(loads):
            strategy = contender.strategy(load.length - asked)
            self._measure(contender, load, Encoded(runtime, strategy, asked))

    def _batches(self, loads: Sequence[Load]) -> None:
        """Several prompts together, by Hugging Face's own `generate` on an attached model."""
        config = self._config
        gc.collect()  # the weights of `_documents`: a bound model refers to itself
        dtype, _ = choose_dtype(config.model, self._files.config, self._device)
        precision, _ = choose_rope_precision(
            config.rope, self._files, beyond_limit=config.model.allow_beyond_limit
        )
        # which of its own it has is no matter: attaching replaces it
        attention = "sdpa" if has_attention(self._files, "sdpa") else "eager"
        model = plain_model(self._files, dtype, self._device, attention)
        for contender, load in self._rounds(loads):
            strategy = contender.strategy(load.length - config.bench.question_tokens)
            attach(
                model,
                strategy,
                self._ranks,
                kernel=config.kernel.name,
                rope_precision=precision,
                chunk_tokens=config.encode.chunk_tokens,
                query_tokens=config.bench.question_tokens,
                cache=replace(config.cache, offload="none", offload_path=None),
            )
            try:
                self._measure(contender, load, PlainGenerate(model))
            finally:
                detach(model)

    def _rounds(self, loads: Sequence[Load]) -> Iterator[tuple[Contender, Load]]:
        """Every strategy with every load, round after round."""
        for _ in range(self._config.bench.rounds):
            yield from itertools.product(self._plan.here(self._world), loads)

    def _measure(self, contender: Contender, load: Load, who: Generates) -> None:
        """One cell; one that finds no room, which all ranks are told, says so."""
        try:
            calls, cpu_s, peak = timed_calls(
                who, self._config, self._files, load, self._device, self._barrier
            )
        except Refusal as refusal:
            sizes = self._world, load.length, load.batch
            return self._write(Measured(contender.label, *sizes, why_not=in_a_line(refusal)))
        peaks, cpus = self._gathered([peak, round(1e9 * cpu_s)])
        if self._ranks.transports[0].name == "threads":  # of one process, seen by one rank
            peaks, cpus = peaks[:1], cpus[:1]
        who_and_where = (contender.label, self._world)
        how = self._ranks.transports[0].name, self._kernel
        self._write(measured(who_and_where, load, calls, sum(cpus) / 1e9, peaks, *how))

    def _barrier(self) -> None:
        self._ranks.run(lambda transport: transport.barrier())

    def _gathered(self, mine: Sequence[int]) -> list[list[int]]:
        return self._ranks.run(lambda transport: gather_integers(transport, mine))[0]

    def _write(self, line: Line) -> None:
        if self._cells is not None:
            add_line(self._cells, line)


COMMAND = RankCommand(
    "launch.bench.ranks", BENCH.parse, check_request, run_rank, lambda: __doc__ or ""
)

if __name__ == "__main__":
    run_program(COMMAND.main)
