"""Making room for new KV: what may go, and what is refused before anything is computed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ringstar.errors import Refusal
from ringstar.metrics import gather_integers
from ringstar.paging import Needs, PagePool
from ringstar.shard import TextShard
from ringstar.stowed import Place, Stowed
from seqpar import Transport


@dataclass(frozen=True, slots=True)
class Victim:
    """One rank's shard of a text that may go, and whether somebody can still ask about it."""

    shard: TextShard
    held: bool


class Victims:
    """One rank's shards of the texts that may go, the one to go first in front.

    With a `place` the KV of those that are held goes there, and can come back; what is not held is
    dropped, like all of it without a place.  Every rank has the same texts in the same order;
    they are asked for with `find` once room is wanted, by every rank before any of them goes.
    """

    def __init__(
        self,
        find: Callable[[], Sequence[Victim]] = tuple,
        place: Place | None = None,
        *,
        keeps: bool = False,
    ):
        self._find, self._place, self._keeps = find, place, keeps

    @cached_property
    def _found(self) -> tuple[list[Victim], list[Victim]]:
        """Those whose KV is in pages, and those whose is put aside."""
        here: list[Victim] = []
        aside: list[Victim] = []
        for victim in self._find():
            (here if victim.shard.is_here else aside).append(victim)
        return here, aside

    def nbytes(self) -> int:
        """Bytes of the pages that would be given back, if none of them were shared."""
        return sum(victim.shard.cache.allocated_nbytes for victim in self._found[0])

    def next_goes(self, transport: Transport) -> bool:
        """Let the next one go, on all ranks; false if there is none.

        Raises RuntimeError if ranks do not have the same texts; Refusal, before it goes on any
        rank, if one of them has no place for it.
        """
        here, aside = self._found
        first = here[0] if here else None
        mine = [first.shard.tokens, first.held] if first else [0, False]
        tokens, held, others = gather_integers(transport, [*mine, len(aside)])
        if first is None or not all(tokens):
            return False
        if len(set(tokens)) > 1 or (self._keeps and len(set(others)) > 1):
            raise RuntimeError("ranks have different documents: each must make the same calls")
        del here[0]
        if self._place is None or not any(held):
            first.shard.evict()
        else:
            self._drop_forgotten(transport)
            first.shard.stow(_copied(transport, first.shard, self._place))
        return True

    def _drop_forgotten(self, transport: Transport) -> None:
        """What was put aside while somebody could ask about it, and now nobody can."""
        _, aside = self._found
        if not aside or not self._keeps:
            return
        held = gather_integers(transport, [victim.held for victim in aside])
        for victim, by_rank in zip(aside, held, strict=True):
            if not any(by_rank):
                victim.shard.evict()
        aside.clear()


def _copied(transport: Transport, shard: TextShard, place: Place) -> Stowed:
    """A copy of the shard in `place`, once every rank has one of its own; else raises Refusal."""
    copy, failed = None, 0
    try:
        copy = shard.copied_to(place)
    except OSError as error:
        failed = error.errno or errno.EIO
    (codes,) = gather_integers(transport, [failed])
    if copy is None or any(codes):
        rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
        why = f"a document cannot be put there on rank {rank}: {os.strerror(code).lower()}"
        raise Refusal("cache.offload_path", str(place), why)
    return copy


def make_room(transport: Transport, pool: PagePool, needs: Needs, victims: Victims) -> None:
    """Let texts go until these pages can be had on every rank.

    Raises Refusal, on all ranks, if they cannot be had; before any text goes, unless it shared
    so many pages that its going freed too few.
    """
    if pool.limit is None:
        return
    (missing,) = gather_integers(transport, [pool.missing(needs)])
    if any(missing):
        # victims count the pages that they share each for itself
        freed = min(victims.nbytes() + pool.free_nbytes, pool.allocated_nbytes)
        _refuse_if(transport, pool, max(0, pool.missing(needs) - freed))
    while any(missing):
        if not victims.next_goes(transport):
            _refuse_if(transport, pool, missing[transport.rank])
        (missing,) = gather_integers(transport, [pool.missing(needs)])
    pool.plan(needs)


def _refuse_if(transport: Transport, pool: PagePool, missing: int) -> None:
    everyone, limits = gather_integers(transport, [missing, pool.limit or 0])
    if any(everyone):
        rank = max(range(len(everyone)), key=lambda rank: everyone[rank])
        why = (
            f"{everyone[rank]:,} bytes too few on rank {rank} for the KV that is needed; shorter"
            " documents, more ranks, cache.dtype=int8, cache.offload=disk or more memory would do"
        )
        raise Refusal("cache.max_bytes", f"{limits[rank]:,}", why)
