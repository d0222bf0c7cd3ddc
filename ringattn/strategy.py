"""Ring Attention as the runtime uses it: one extension of a document after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from localflash import DenseKV
from ringattn.plan import Costs, ExtendPlan, PastBy
from ringattn.prefill import KVBuffers, Ring, extend
from seqpar import Attend, Layout, LayoutKind, Runs, Transport


@dataclass(frozen=True)
class RingExtension:
    """New tokens at positions [start, stop), sharded over ranks, after a sharded past."""

    start: int
    stop: int
    plan: ExtendPlan
    transport: Transport
    buffers: KVBuffers
    past_by: PastBy | Literal["auto"]

    @property
    def own(self) -> Runs:
        """The positions that this rank computes and keeps."""
        return self.plan.own

    @property
    def owned(self) -> tuple[Runs, ...]:
        """The positions that each rank keeps."""
        return self.plan.new

    def attend(
        self,
        q_BTHD: Tensor,
        new: DenseKV,
        past: DenseKV,
        *,
        window: int | None,
        attend: Attend,
    ) -> Tensor:
        """One layer's attention for this rank's new tokens; float32 (B, T, H, D)."""
        ring = Ring(self.transport, attend, self.buffers)
        past_by = self._past_by(q_BTHD, new, window)
        return extend(q_BTHD, new, past, self.plan, past_by, ring, window)

    def _past_by(self, q_BTHD: Tensor, new: DenseKV, window: int | None) -> PastBy:
        if self.past_by != "auto":
            return self.past_by if any(self.plan.past) else "none"
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

    def extensions(self, start: int, stop: int, past: tuple[Runs, ...]) -> Iterator[RingExtension]:
        """Encode positions [start, stop) after `past[r]`, what each rank r holds already."""
        world = self._transport.world_size
        chunks = max(1, -(-(stop - start) // (self._chunk_tokens * world)))
        edges = [start + index * (stop - start) // chunks for index in range(chunks + 1)]
        for first, last in pairwise(edges):
            layout = Layout(self.layout, first, last, world)
            new = tuple(layout.runs(rank) for rank in range(world))
            plan = ExtendPlan(self._transport.rank, new, past)
            yield RingExtension(first, last, plan, self._transport, self._buffers, self._past_by)
            past = tuple(before + more for before, more in zip(past, new, strict=True))
