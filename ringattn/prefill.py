"""Ring Attention, exact: KV blocks travel a ring of ranks, hidden behind compute.

Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers", section 3.  Passing queries
instead of a long past follows Yang et al., "Context Parallelism for Scalable Million-Token
Inference", section 3.

B batch, T local tokens, H query heads, K key/value heads (H % K == 0), D head dim.
Partials are float32 (float64 for float64 input); KV travels in the form in which it is kept,
heads unrepeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from localflash import KV, Partial, empty_partial, merge_into
from ringattn.plan import ExtendPlan, PackedPlan, PastBy, QueryStep, largest_share
from seqpar import (
    Attend,
    Handle,
    Step,
    Transport,
    accumulate_tiles,
    kv_over,
    kv_room,
    rows_of,
    token_nbytes,
)


class KVBuffers:
    """The two transfer buffers of a ring pass: one is read while the other is filled.

    Both exist from the first transfer on, so that a rank's peak does not depend on how many
    others there are.  They are kept from layer to layer and grow to the largest shard, whatever
    the form of the KV in them.
    """

    def __init__(self) -> None:
        self._rooms: list[Tensor] = []
        self._turn = 0

    def arriving(self, like: KV, tokens: int, capacity: int) -> KV:
        """The buffer that is free now, for `tokens` of at most `capacity` tokens like these."""
        needed = like.batch * capacity * token_nbytes(like)
        if not self._rooms or self._rooms[0].nbytes < needed:
            self._rooms = []
            self._rooms = [kv_room(like, capacity) for _ in range(2)]
        self._turn = 1 - self._turn
        return kv_over(self._rooms[self._turn], like, tokens)

    @property
    def nbytes(self) -> int:
        return sum(room.nbytes for room in self._rooms)


@dataclass(frozen=True, slots=True)
class Ring:
    """What every pass of one layer needs: the wire, the local kernel, room for arriving KV."""

    transport: Transport
    attend: Attend
    buffers: KVBuffers


def ring_pass(
    q_BTHD: Tensor, kv: KV, steps: tuple[Step, ...], into: Partial, ring: Ring, capacity: int
) -> None:
    """Local queries against the KV of every rank, accumulated `into` a running partial.

    `capacity` is the largest share of KV that any rank has, in tokens.
    """
    held = kv
    for step in steps:
        arriving = ring.buffers.arriving(kv, step.receive, capacity) if step.receive else None
        sent = held.tensors if step.send else ()
        transfer = ring.transport.shift(sent, arriving.tensors if arriving else ())
        ring.transport.mark("attend", source=step.source)
        accumulate_tiles(q_BTHD, held, step.tiles, into, ring.attend)
        transfer.wait()
        held = arriving or kv


def query_pass(
    q_BTHD: Tensor, past: KV, steps: tuple[QueryStep, ...], into: Partial, ring: Ring
) -> None:
    """The same product with the KV at rest: queries travel, and their partials come home."""
    held = q_BTHD
    coming_home: list[tuple[Handle, Partial | tuple[()]]] = []
    for distance, step in enumerate(steps):
        arriving = _like(q_BTHD, step.receive)
        onward = ring.transport.shift([held.contiguous()] if step.send else [], [arriving])
        ring.transport.mark("attend", owner=step.owner)
        own = step.owner == ring.transport.rank
        partial = into if own else empty_partial(held)
        accumulate_tiles(held, past, step.tiles, partial, ring.attend)
        _merge_home(coming_home, into)  # sent a step ago: hidden behind this one's attention
        if not own:
            back = empty_partial(q_BTHD) if step.returned else ()
            home = ring.transport.shift(partial if step.tiles else [], back, -distance)
            coming_home.append((home, back))
        onward.wait()
        held = arriving
    _merge_home(coming_home, into)


def _merge_home(coming: list[tuple[Handle, Partial | tuple[()]]], into: Partial) -> None:
    while coming:
        handle, back = coming.pop()
        handle.wait()
        if back:
            merge_into(*into, *back)


class Past(NamedTuple):
    """What this rank holds of a text from earlier, and how new queries of the text reach it."""

    kv: KV
    by: PastBy


def extend(
    q_BTHD: Tensor,
    new: KV,
    pasts: Sequence[Past],
    plan: PackedPlan,
    ring: Ring,
    window: int | None = None,
) -> Partial:
    """New tokens, sharded over ranks, against themselves and the past; a float32 partial.

    `new` and each text's past are this rank's shares, in the memory order of `plan`.
    """
    into = empty_partial(q_BTHD)
    ring_pass(q_BTHD, new, plan.new_steps(window), into, ring, plan.largest_new)
    for text, rows, past in zip(plan.texts, plan.rows, pasts, strict=True):
        _past_pass(q_BTHD[:, rows], past, text, rows_of(into, rows), ring, window)
    return into


def _past_pass(
    q_BTHD: Tensor, past: Past, plan: ExtendPlan, into: Partial, ring: Ring, window: int | None
) -> None:
    if past.by == "kv":
        seen = plan.past_seen(window)
        ring_pass(q_BTHD, past.kv, plan.past_kv_steps(window), into, ring, largest_share(seen))
    elif past.by == "queries":
        query_pass(q_BTHD, past.kv, plan.past_query_steps(window), into, ring)


def _like(q_BTHD: Tensor, tokens: int) -> Tensor:
    batch, _, heads, dim = q_BTHD.shape
    return q_BTHD.new_empty(batch, tokens, heads, dim)
