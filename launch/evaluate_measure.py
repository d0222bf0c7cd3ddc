"""One sample after another, put to every contender that has not had it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence

from launch.evaluate_log import Key, Scored
from launch.evaluate_plan import Cell, Plan
from launch.evaluate_prompt import prompt_ids
from launch.evaluate_star import Contender
from launch.progress import TOKENS_OF_A_STEP, WorkBar
from launch.result_fields import runtime_fields
from ringstar.answers import Answer
from ringstar.config import StrategyConfig
from ringstar.errors import UserError
from ringstar.evaluation import Sample, score
from ringstar.runtime import Document, LongContext

log = logging.getLogger("ringstar")

# as much is encoded once before, so that no sample pays for the first steps
_WARM_UP_TOKENS = 256

Job = tuple[Cell, int, list[Contender]]


def pending(plan: Plan, done: Collection[Key]) -> list[Job]:
    """What is left to do, in order."""
    jobs = []
    for cell, number in plan.jobs():
        key = cell.task.name, cell.length, cell.depth, number
        left = [star for star in plan.contenders if (*key, star.label) not in done]
        if left:
            jobs.append((cell, number, left))
    return jobs


def work_of(jobs: Sequence[Job]) -> int:
    """In tokens of a document."""
    return sum(
        (cell.length + TOKENS_OF_A_STEP * cell.task.new_tokens) * len(left)
        for cell, _, left in jobs
    )


class Measurement:
    """Every rank makes the same calls; `add` is called with each scored sample."""

    def __init__(
        self, runtime: LongContext, plan: Plan, bar: WorkBar, add: Callable[[Scored], None]
    ):
        self._runtime, self._plan, self._bar, self._add = runtime, plan, bar, add
        self._fingerprint = runtime.fingerprint

    def run(self, jobs: Sequence[Job]) -> None:
        """All jobs; each sample is made once, and encoded once for each contender."""
        if jobs:
            first = self._plan.sample(jobs[0][0], 0)  # which was made before, to check it
            ids, _ = prompt_ids(self._plan.files, first.prompt)
            self._runtime.encode(ids[:_WARM_UP_TOKENS], strategy=self._plan.contenders[0].exact)
        for cell, number, left in jobs:
            made = self._made(cell, number)
            if made is None:
                continue
            sample, context, query, strategies = made
            for contender in left:
                strategy = strategies[contender.label]
                document = self._encode(cell, contender.label, strategy, context, len(query))
                answer = self._ask(cell, document, query, sample)
                self._add(self._scored(cell, number, contender, sample, document, answer))
                del document  # before the next one takes its place

    def _made(
        self, cell: Cell, number: int
    ) -> tuple[Sample, list[int], list[int], dict[str, StrategyConfig]] | None:
        """A sample, its prompt's ids, and every contender's settings; None where not all fits.

        Words may not fit where the cell's first did, or sizes, if one is a share: others may.
        """
        try:
            sample = self._plan.sample(cell, number)
            context, query = prompt_ids(self._plan.files, sample.prompt)
            runtime, sizes = self._runtime, (len(context), len(query), sample.new_tokens)
            given = (runtime.config, runtime.files, runtime.world_size, *sizes)
            every = {star.label: star.fitting(*given) for star in self._plan.contenders}
            return sample, context, query, every
        except UserError as error:
            where = f"{cell.task.name} {cell.length:,}"
            if self._runtime.rank == 0:
                log.warning(f"{where}: sample {number} is left out: {error}")
            return None

    def _encode(
        self, cell: Cell, label: str, strategy: StrategyConfig, ids: list[int], query: int
    ) -> Document:
        what = f"{cell.task.name} {cell.length:,}, {label}"
        with self._bar.encode(what, cell.length) as on_progress:
            return self._runtime.encode(
                ids, on_progress, strategy=strategy, length=len(ids) + query
            )

    def _ask(self, cell: Cell, document: Document, query: list[int], sample: Sample) -> Answer:
        """Greedy; what follows once every reference is there cannot change the score."""
        match = cell.task.match

        def complete(text: str) -> bool:
            return score(text, sample.references, match) == 1

        with self._bar.question(sample.new_tokens):
            return self._runtime.ask(
                document, query, until=complete, max_new_tokens=sample.new_tokens
            )

    def _scored(
        self,
        cell: Cell,
        number: int,
        contender: Contender,
        sample: Sample,
        document: Document,
        answer: Answer,
    ) -> Scored:
        return Scored(
            task=cell.task.name,
            length=cell.length,
            depth=cell.depth,
            index=number,
            strategy=contender.label,
            seed=self._plan.config.seed,
            digest=sample.prompt.digest,
            tokens=sample.tokens,
            document_tokens=document.tokens,
            query_tokens=answer.query_tokens,
            question=sample.prompt.question,
            references=list(sample.references),
            answer=answer.text,
            answer_tokens=len(answer.ids),
            finish_reason=answer.finish_reason,
            score=score(answer.text, sample.references, cell.task.match),
            encode_s=document.encode_s,
            ttft_s=answer.ttft_s,
            tpot_s=answer.tpot_s,
            kv_bytes=max(document.metrics.kv_bytes),
            bytes_sent=max(document.metrics.bytes_sent),
            **runtime_fields(self._runtime),
            text_sha256=sample.text_sha256,
            fingerprint=self._fingerprint,
            template=self._plan.files.prompt.digest,
        )
