"""The two kinds of forward pass, as the attention function sees them.

B batch, T tokens of this forward, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import localflash
from localflash import DenseKV, Partial, add_sinks
from ringstar.cache import ShardedCache
from ringstar.models import PositionEmbeddings
from ringstar.strategies import Extension
from ringstar.unified import UnifiedMax
from seqpar import Attend, Run, Runs, Tile, Transport, attend_sharded, tiles, token_count


@dataclass
class ExtendPass:
    """New tokens of a document: each rank computes its own, and keeps all or the last of them.

    A rank that has nothing to compute runs one dummy token, which is cut off here: neither its
    KV nor its result is kept, but the rank takes part in every exchange.
    """

    position_embeddings: PositionEmbeddings
    extension: Extension
    cache: ShardedCache
    kernel: str
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
        own = token_count(self.extension.positions)
        kept = token_count(self.extension.kept)
        held = self.cache.of(window)
        new = DenseKV(k_BTKD[:, :own], v_BTKD[:, :own])
        to_keep = new.slice(own - kept, own)
        held.write(layer, held.at, to_keep.k_BTHD, to_keep.v_BTHD)
        if kept == own:  # the cache's copy lies as kernels and transfers like it
            new = held.view(layer, held.at, held.at + kept)
        whole = self.extension.attend(
            layer,
            q_BTHD[:, :own],
            new,
            held.view(layer, 0, held.at),
            window=window,
            attend=_bound(self.kernel, scale, softcap),
        )
        self.on_layer()
        return _output(whole, sinks, q_BTHD.dtype) if own else q_BTHD.new_zeros(q_BTHD.shape)


@dataclass
class ReplicatedPass:
    """A few new tokens that every rank computes, against KV that is sharded over ranks.

    Their KV is dealt over ranks (`turn_runs`): `own` is the part of them that this rank keeps,
    as positions; `start` is the position of the first one.
    """

    position_embeddings: PositionEmbeddings
    start: int
    tokens: int
    own: Runs
    cache: ShardedCache
    transport: Transport
    kernel: str
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
        held = self.cache.of(window)
        for run in self.own:
            kept = slice(run.start - self.start, run.stop - self.start)
            held.write(layer, held.at, k_BTKD[:, kept], v_BTKD[:, kept])
        whole = attend_sharded(
            q_BTHD,
            held.view(layer, 0, held.tokens) if held.tokens else _none(k_BTKD, v_BTKD),
            self._tiles(window, held.runs),
            transport=self.transport,
            attend=self._kernel_of(layer, scale, softcap),
        )
        return _output(whole, sinks, q_BTHD.dtype)

    def _kernel_of(self, layer: int, scale: float, softcap: float | None) -> Attend:
        if self.unified is None:
            return _bound(self.kernel, scale, softcap)
        return self.unified.of(layer, self.kernel, scale, softcap)

    def _tiles(self, window: int | None, held: Runs) -> tuple[Tile, ...]:
        if window not in self._known_tiles:
            new = (Run(self.start, self.start + self.tokens),)
            self._known_tiles[window] = tiles(new, held, window)
        return self._known_tiles[window]

    def __post_init__(self) -> None:
        self._known_tiles: dict[int | None, tuple[Tile, ...]] = {}


def turn_runs(start: int, tokens: int, rank: int, world: int) -> Runs:
    """Which of the replicated positions [start, start + tokens) `rank` keeps.

    A question is cut into neighbouring pieces; the rank of the first piece moves on with the
    position, so that single generated tokens go round and shards stay balanced.
    """
    piece = (rank + start) % world
    run = Run(start + piece * tokens // world, start + (piece + 1) * tokens // world)
    return (run,) if len(run) else ()


def _none(k_BTKD: Tensor, v_BTKD: Tensor) -> DenseKV:
    """No tokens, of the heads and dtype of these."""
    return DenseKV(k_BTKD[:, :0], v_BTKD[:, :0])


def _output(whole: Partial, sinks_H: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Attention over all keys (B, T, H, D), as the model goes on with it."""
    out_BTHD = whole[0] if sinks_H is None else add_sinks(*whole, sinks_H)
    return out_BTHD.to(dtype)


def _bound(kernel: str, scale: float, softcap: float | None) -> partial:
    return partial(localflash.attend, scale=scale, softcap=softcap, backend=kernel)
