"""The two kinds of forward pass, as the attention function sees them.

B batch, T tokens of this forward, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import localflash
from localflash import KV, Backend, Partial, add_sinks
from ringstar.models import PositionEmbeddings
from ringstar.paging import PageTable, ShardedCache
from ringstar.strategies import Extension
from ringstar.unified import UnifiedMax
from seqpar import Attend, Held, Run, Runs, Tile, Transport, attend_sharded, tiles, token_count


@dataclass
class ExtendPass:
    """New tokens of texts: each rank computes its own, and keeps all or the last of each text's.

    A rank that has nothing to compute runs one dummy token, which is cut off here: neither its
    KV nor its result is kept, but the rank takes part in every exchange.  `caches` are those of
    the texts of `extension.parts`.
    """

    position_embeddings: PositionEmbeddings
    extension: Extension
    caches: Sequence[ShardedCache]
    kernel: str | Backend
    on_layer: Callable[[], None]

    def attend(
        self,
        layer: int,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        own = sum(token_count(part.positions) for part in self.extension.parts)
        new = self._packed(k_BTKD[:, :own], v_BTKD[:, :own])
        held = [cache.of(window) for cache in self.caches]
        self._keep(layer, new, held)
        if len(held) == 1 and held[0].tokens - held[0].at == own:
            # the cache's copy lies as kernels like it
            new = held[0].view(layer, held[0].at, held[0].tokens)
        whole = self.extension.attend(
            layer,
            q_BTHD[:, :own],
            new,
            [kept.view(layer, 0, kept.at) for kept in held],
            window=window,
            attend=_bound(self.kernel, scale, softcap),
        )
        self.on_layer()
        return _output(whole, sinks, q_BTHD.dtype) if own else q_BTHD.new_zeros(q_BTHD.shape)

    def _packed(self, k_BTKD: Tensor, v_BTKD: Tensor) -> KV:
        """New KV as it is kept and sent; how far that is from it is measured."""
        pool = self.caches[0].pool
        packed = pool.storage.packed(k_BTKD, v_BTKD)
        if pool.storage.kind is not None:
            pool.rounding.add(k_BTKD, v_BTKD, packed)
        return packed

    def _keep(self, layer: int, new: KV, held: Sequence[PageTable]) -> None:
        """Write the last tokens of each text to its own cache."""
        stop = 0
        for part, cache in zip(self.extension.parts, held, strict=True):
            stop += token_count(part.positions)
            cache.write(layer, cache.at, new.slice(stop - token_count(part.kept), stop))


@dataclass
class ReplicatedPart:
    """A few new tokens of one text: `own` of them, as positions, are this rank's to keep.

    `start` is the position of the first one, `rows` where they are in the pass.
    """

    start: int
    rows: slice
    own: Runs
    cache: ShardedCache
    _tiles: dict[int | None, tuple[Tile, ...]] = field(default_factory=dict)

    def write(self, layer: int, window: int | None, k_BTKD: Tensor, v_BTKD: Tensor) -> Held:
        """Keep what is this rank's of the pass's KV; what it now holds of the text."""
        held, at = self.cache.of(window), self.rows.start - self.start
        for run in self.own:
            kept = slice(run.start + at, run.stop + at)
            new = self.cache.pool.storage.packed(k_BTKD[:, kept], v_BTKD[:, kept])
            held.write(layer, held.at, new)
        return Held(self.rows, held.view(layer, 0, held.tokens), self.tiles(window, held.runs))

    def tiles(self, window: int | None, held: Runs) -> tuple[Tile, ...]:
        if window not in self._tiles:
            new = Run(self.start, self.start + self.rows.stop - self.rows.start)
            self._tiles[window] = tiles((new,), held, window)
        return self._tiles[window]


@dataclass
class ReplicatedPass:
    """A few new tokens that every rank computes, against KV that is sharded over ranks.

    Their KV is dealt over ranks (`turn_runs`).
    """

    position_embeddings: PositionEmbeddings
    parts: Sequence[ReplicatedPart]
    transport: Transport
    kernel: str | Backend
    unified: UnifiedMax | None = None

    def attend(
        self,
        layer: int,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        whole = attend_sharded(
            q_BTHD,
            [part.write(layer, window, k_BTKD, v_BTKD) for part in self.parts],
            transport=self.transport,
            attend=self._kernel_of(layer, scale, softcap),
        )
        return _output(whole, sinks, q_BTHD.dtype)

    def _kernel_of(self, layer: int, scale: float, softcap: float | None) -> Attend:
        if self.unified is None:
            return _bound(self.kernel, scale, softcap)
        return self.unified.of(layer, self.kernel, scale, softcap)


def turn_runs(start: int, tokens: int, rank: int, world: int) -> Runs:
    """Which of the replicated positions [start, start + tokens) `rank` keeps.

    A question is cut into neighbouring pieces; the rank of the first piece moves on with the
    position, so that single generated tokens go round and shards stay balanced.
    """
    piece = (rank + start) % world
    run = Run(start + piece * tokens // world, start + (piece + 1) * tokens // world)
    return (run,) if len(run) else ()


def _output(whole: Partial, sinks_H: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Attention over all keys (B, T, H, D), as the model goes on with it."""
    out_BTHD = whole[0] if sinks_H is None else add_sinks(*whole, sinks_H)
    return out_BTHD.to(dtype)


def _bound(kernel: str | Backend, scale: float, softcap: float | None) -> partial:
    return partial(localflash.attend, scale=scale, softcap=softcap, backend=kernel)
