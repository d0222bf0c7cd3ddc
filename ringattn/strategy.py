"""Ring Attention as the runtime uses it: one extension of texts after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from localflash import KV, Partial
from ringattn.plan import Costs, ExtendPlan, PackedPlan, PastBy
from ringattn.prefill import KVBuffers, Past, Ring, extend
from seqpar import (
    Attend,
    Layout,
    LayoutKind,
    Part,
    Runs,
    Span,
    Transport,
    Work,
    cut,
    token_count,
)


@dataclass(frozen=True)
class RingExtension:
    """New tokens of some texts, sharded over ranks, each after its own sharded past.

    `numbers[i]` is which span the i-th text of the plan is, `starts[i]` where that span starts.
    """

    plan: PackedPlan
    numbers: tuple[int, ...]
    starts: tuple[int, ...]
    transport: Transport
    buffers: KVBuffers
    past_by: PastBy | Literal["auto"]

    @property
    def parts(self) -> tuple[Part, ...]:
        """What this rank computes of each text; it keeps all of that."""
        return tuple(
            Part(number, text.own, text.own, text.stop)
            for number, text in zip(self.numbers, self.plan.texts, strict=True)
        )

    @property
    def work(self) -> Work:
        """Each query sees itself and all before it; windows only make it less."""
        runs = [run for text in self.plan.texts for run in text.own]
        return Work(token_count(tuple(runs)), sum(len(run) + sum(run) for run in runs))

    def token_ids(self, ids: Sequence[Sequence[int]]) -> list[int]:
        """The tokens to compute; `ids[i]` are those of span i, from its start on."""
        return [
            ids[number][position - start]
            for number, start, text in zip(self.numbers, self.starts, self.plan.texts, strict=True)
            for run in text.own
            for position in run
        ]

    def attend(
        self,
        layer: int,
        q_BTHD: Tensor,
        new: KV,
        pasts: Sequence[KV],
        *,
        window: int | None,
        attend: Attend,
    ) -> Partial:
        """One layer's attention for this rank's new tokens; float32, complete over all keys."""
        reached = [
            Past(past, self._past_by(text, Costs.of(q_BTHD, past), window))
            for text, past in zip(self.plan.texts, pasts, strict=True)
        ]
        ring = Ring(self.transport, attend, self.buffers)
        return extend(q_BTHD, new, reached, self.plan, ring, window)

    def _past_by(self, text: ExtendPlan, costs: Costs, window: int | None) -> PastBy:
        if self.past_by != "auto":
            return self.past_by if any(text.past_seen(window)) else "none"
        return text.past_by(costs, window)


class RingStrategy:
    """Deals chunks of texts over the ring; texts that are given together share chunks.

    `chunk_tokens` per rank bounds what a forward pass holds at once; `past_by` says how later
    chunks reach the KV of earlier ones: `kv` or `queries` travel, or `auto`, whichever is less.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        layout: LayoutKind = "zigzag",
        chunk_tokens: int = 8192,
        past_by: PastBy | Literal["auto"] = "auto",
    ):
        self.layout = layout
        self._transport, self._chunk_tokens, self._past_by = transport, chunk_tokens, past_by
        self._buffers = KVBuffers()

    def plan(self, spans: Sequence[Span]) -> tuple[list[tuple[Runs, ...]], list[RingExtension]]:
        """What each rank keeps of each span, and this rank's forward passes.

        Each text is dealt by itself, so that every rank has its share of the work of each.
        """
        world = self._transport.world_size
        pasts = [span.past for span in spans]
        owned: list[tuple[Runs, ...]] = [((),) * world for _ in spans]
        extensions = []
        for chunk in cut(spans, self._chunk_tokens * world):
            plans = []
            for number, first, last in chunk:
                layout = Layout(self.layout, first, last, world)
                new = tuple(layout.runs(rank) for rank in range(world))
                plans.append(ExtendPlan(self._transport.rank, new, pasts[number]))
                pasts[number], owned[number] = _both(pasts[number], new), _both(owned[number], new)
            numbers = tuple(number for number, _, _ in chunk)
            starts = tuple(spans[number].start for number in numbers)
            how = (self._transport, self._buffers, self._past_by)
            extensions.append(RingExtension(PackedPlan(tuple(plans)), numbers, starts, *how))
        return owned, extensions


def _both(before: tuple[Runs, ...], more: tuple[Runs, ...]) -> tuple[Runs, ...]:
    return tuple(a + b for a, b in zip(before, more, strict=True))
