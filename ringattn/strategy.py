"""Ring Attention as the runtime uses it: one extension of a document after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from localflash import DenseKV, Partial
from ringattn.plan import Costs, ExtendPlan, PastBy
from ringattn.prefill import KVBuffers, Ring, extend
from seqpar import Attend, Layout, LayoutKind, Runs, Transport, Work, token_count


@dataclass(frozen=True)
class RingExtension:
    """New tokens sharded over ranks, after a sharded past."""

    plan: ExtendPlan
    transport: Transport
    buffers: KVBuffers
    past_by: PastBy | Literal["auto"]

    @property
    def positions(self) -> Runs:
        """What this rank computes, in order."""
        return self.plan.own

    @property
    def kept(self) -> Runs:
        """The positions among them that it keeps: all."""
        return self.plan.own

    @property
    def work(self) -> Work:
        """Each query sees itself and all before it; windows only make it less."""
        own = self.plan.own
        return Work(token_count(own), sum(len(run) + sum(run) for run in own))

    @property
    def encoded(self) -> int:
        """All positions before this are encoded once this extension is."""
        return self.plan.stop

    def token_ids(self, ids: Sequence[int]) -> list[int]:
        """The tokens at `positions` of the document `ids`."""
        return [ids[position] for run in self.plan.own for position in run]

    def attend(
        self,
        layer: int,
        q_BTHD: Tensor,
        new: DenseKV,
        past: DenseKV,
        *,
        window: int | None,
        attend: Attend,
    ) -> Partial:
        """One layer's attention for this rank's new tokens; float32, complete over all keys."""
        ring = Ring(self.transport, attend, self.buffers)
        past_by = self._past_by(q_BTHD, new, window)
        return extend(q_BTHD, new, past, self.plan, past_by, ring, window)

    def _past_by(self, q_BTHD: Tensor, new: DenseKV, window: int | None) -> PastBy:
        if self.past_by != "auto":
            return self.past_by if any(self.plan.past_seen(window)) else "none"
        heads, (kv_heads, head_dim) = q_BTHD.shape[2], new.k_BTHD.shape[2:]
        return self.plan.past_by(Costs(heads, kv_heads, head_dim, q_BTHD.element_size()), window)


class RingStrategy:
    """Deals chunks of a document over the ring.

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

    def plan(
        self, start: int, stop: int, past: tuple[Runs, ...]
    ) -> tuple[tuple[Runs, ...], list[RingExtension]]:
        """What each rank keeps of the positions [start, stop), and this rank's forward passes.

        `past[r]` is what each rank r holds already.
        """
        world = self._transport.world_size
        chunks = max(1, -(-(stop - start) // (self._chunk_tokens * world)))
        edges = [start + index * (stop - start) // chunks for index in range(chunks + 1)]
        owned: tuple[Runs, ...] = ((),) * world
        extensions = []
        for first, last in pairwise(edges):
            layout = Layout(self.layout, first, last, world)
            new = tuple(layout.runs(rank) for rank in range(world))
            plan = ExtendPlan(self._transport.rank, new, past)
            extensions.append(RingExtension(plan, self._transport, self._buffers, self._past_by))
            past, owned = _both(past, new), _both(owned, new)
        return owned, extensions


def _both(before: tuple[Runs, ...], more: tuple[Runs, ...]) -> tuple[Runs, ...]:
    return tuple(a + b for a, b in zip(before, more, strict=True))
