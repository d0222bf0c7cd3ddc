"""Making room for new KV: what may go, and what is refused before anything is computed."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from ringstar.errors import Refusal
from ringstar.metrics import gather_integers
from ringstar.paging import Needs, PagePool
from ringstar.shard import TextShard
from ringstar.stowed import Place, Stowed
from seqpar import Transport


class Victims:
    """One rank's shards of the texts that may go, the one to go first in front.

    With a `place` their KV goes there, and can come back; without one it is dropped.  Every rank
    has the same texts in the same order.
    """

    def __init__(self, shards: Sequence[TextShard] = (), place: Place | None = None):
        self._shards, self._place = [shard for shard in shards if shard.is_here], place

    def nbytes(self) -> int:
        """Bytes of the pages that would be given back, if none of them were shared."""
        return sum(shard.cache.allocated_nbytes for shard in self._shards)

    def next_goes(self, transport: Transport) -> bool:
        """Let the next one go, on all ranks; false if there is none.

        Raises RuntimeError if ranks do not have the same texts; Refusal, before it goes on any
        rank, if one of them has no place for it.
        """
        (tokens,) = gather_integers(transport, [self._shards[0].tokens if self._shards else 0])
        if not all(tokens):
            return False
        if len(set(tokens)) > 1:
            raise RuntimeError("ranks have different documents: each must make the same calls")
        shard = self._shards.pop(0)
        if self._place is None:
            shard.evict()
        else:
            shard.stow(_copied(transport, shard, self._place))
        return True


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
    # victims count the pages that they share each for itself
    freed = min(victims.nbytes() + pool.free_nbytes, pool.allocated_nbytes)
    hopeless = max(0, pool.missing(needs) - freed)
    _refuse_if(transport, pool, hopeless)
    while True:
        (missing,) = gather_integers(transport, [pool.missing(needs)])
        if not any(missing):
            return pool.plan(needs)
        if not victims.next_goes(transport):
            _refuse_if(transport, pool, missing[transport.rank])


def _refuse_if(transport: Transport, pool: PagePool, missing: int) -> None:
    everyone, limits = gather_integers(transport, [missing, pool.limit or 0])
    if any(everyone):
        rank = max(range(len(everyone)), key=lambda rank: everyone[rank])
        why = (
            f"{everyone[rank]:,} bytes too few on rank {rank} for the KV that is needed; shorter"
            " documents, more ranks, cache.dtype=int8, cache.offload=disk or more memory would do"
        )
        raise Refusal("cache.max_bytes", f"{limits[rank]:,}", why)
