"""Phase 1 of Star Attention on one rank, as forward passes: pure integers.

A *lane* is what a rank computes behind one anchor, in the order in which it computes it: the
anchor's tokens first, unless they are kept or come from another rank, then the tokens of its
blocks.  A lane is cut into *passes*, each one forward of the model.

Keys are found in three places: `new`, the tokens of this pass; `past`, what the rank keeps from
earlier passes; `anchor`, anchor tokens that are neither, because they are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from localflash import Band
from seqpar import Run, Runs, Tile, pairs, token_count
from starattn.blocks import Blocks

# how often an anchor's KV is computed: once in all, once on each rank, once for each block
Share = Literal["world", "rank", "none"]
SHARES: tuple[str, ...] = get_args(Share)
_NOTHING = Run(0, 0)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens [start, stop) of a lane, causal among themselves, behind all of `prefix`."""

    start: int
    stop: int
    prefix: Run | None = None


@dataclass(frozen=True, slots=True)
class Lane:
    """`dropped` anchor tokens, those before block `block`, and then the positions `kept`.

    `received`: the anchor tokens are not computed here.  `at` tokens were kept before.
    """

    block: int
    dropped: int
    received: bool
    kept: Runs
    stretches: tuple[Stretch, ...]
    at: int = 0

    @property
    def start(self) -> int:
        return self.dropped if self.received else 0

    @property
    def stop(self) -> int:
        return self.dropped + token_count(self.kept)


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward: the tokens [start, stop) of a lane, and the tiles of each place of keys.

    `shares`: the anchor's KV is broadcast during this pass.  `several`: the lane has other passes
    too, so that anchor tokens which are not kept must be held from one to the next.  `made`: the
    anchor tokens, by their place in the anchor, that this pass begins with and that others need.
    """

    lane: Lane
    start: int
    stop: int
    shares: bool
    several: bool
    made: Run
    new: tuple[Tile, ...]
    past: tuple[Tile, ...]
    anchor: tuple[Tile, ...]

    @property
    def dropped(self) -> Run:
        """The anchor tokens that it computes and that are not kept."""
        return Run(self.start, max(self.start, min(self.stop, self.lane.dropped)))

    @property
    def kept(self) -> Runs:
        """The positions that it computes and keeps."""
        if self.stop <= max(self.start, self.lane.dropped):
            return ()
        offset = self.lane.kept[0].start - self.lane.dropped
        return (Run(max(self.start, self.lane.dropped) + offset, self.stop + offset),)

    @property
    def pairs(self) -> int:
        """Visible pairs of a query and a key."""
        tiles = (*self.new, *self.past, *self.anchor)
        return sum(pairs(tile) for tile in tiles)


def plan_passes(
    blocks: Blocks, rank: int, share: Share, anchor_is_head: bool, chunk_tokens: int
) -> tuple[Pass, ...]:
    """The forward passes of `rank`, of at most `chunk_tokens` each.

    `anchor_is_head`: the anchor is the beginning of block 0 itself.  The pass of rank 0 that
    makes an anchor for others holds all of it, even if it is longer than `chunk_tokens`.
    """
    shares = (
        share == "world"
        and blocks.anchor > 0
        and any(blocks.of_rank(other) for other in range(1, blocks.world))
    )
    lanes = _lanes(blocks, rank, share, anchor_is_head, shares)
    passes = [step for lane in lanes for step in _cut(lane, chunk_tokens, blocks.anchor, shares)]
    if shares and not passes:  # nothing to compute, but a part in the broadcast
        idle = Lane(0, 0, received=True, kept=(), stretches=())
        return (Pass(idle, 0, 0, True, False, _NOTHING, (), (), ()),)
    return tuple(passes)


def _lanes(
    blocks: Blocks, rank: int, share: Share, anchor_is_head: bool, shares: bool
) -> Iterator[Lane]:
    own = blocks.of_rank(rank)
    if share == "none":
        for block in own:
            at = (block - own[0]) * blocks.size
            yield _lane(blocks, range(block, block + 1), blocks.anchor if block else 0, at=at)
    elif own:
        behind = own[-1] > 0 or shares  # some block needs the anchor
        dropped = blocks.anchor if behind and not (rank == 0 and anchor_is_head) else 0
        yield _lane(blocks, own, dropped, received=shares and rank > 0)


def _lane(blocks: Blocks, own: range, dropped: int, *, received: bool = False, at: int = 0) -> Lane:
    kept = Run(blocks.run(own[0]).start, blocks.run(own[-1]).stop)
    stretches = tuple(_stretches(blocks, own, dropped))
    return Lane(own[-1], dropped, received, (kept,), stretches, at)


def _stretches(blocks: Blocks, own: range, dropped: int) -> list[Stretch]:
    """The anchor and the blocks of a lane; a block right after its anchor continues it."""
    anchor = Run(0, blocks.anchor)
    stretches = [Stretch(0, dropped)] if dropped else []
    start = dropped
    for block in own:
        stop = start + len(blocks.run(block))
        prefix = anchor if block and blocks.anchor else None
        alone = stretches[-1:] == [Stretch(0, blocks.anchor)]
        if prefix and alone and start == blocks.anchor:
            stretches = [Stretch(0, stop)]
        else:
            stretches.append(Stretch(start, stop, prefix))
        start = stop
    return stretches


def _cut(lane: Lane, chunk_tokens: int, anchor: int, shares: bool) -> Iterator[Pass]:
    makes = shares and not lane.received
    first = lane.start + (max(chunk_tokens, anchor) if makes else chunk_tokens)
    edges = [lane.start, *range(first, lane.stop, chunk_tokens), lane.stop]
    for start, stop in pairwise(edges):
        shared, several = shares and start == lane.start, len(edges) > 2
        if shared and makes:
            made = Run(0, anchor)
        else:
            made = Run(start, min(stop, lane.dropped)) if several else _NOTHING
        yield Pass(lane, start, stop, shared, several, made, *_tiles(lane, start, stop))


def _tiles(
    lane: Lane, start: int, stop: int
) -> tuple[tuple[Tile, ...], tuple[Tile, ...], tuple[Tile, ...]]:
    """The tiles of the tokens [start, stop) of a lane, by where their keys are."""
    new: list[Tile] = []
    past: list[Tile] = []
    anchor: list[Tile] = []
    for stretch in lane.stretches:
        first, last = max(start, stretch.start), min(stop, stretch.stop)
        if first >= last:
            continue
        q = slice(first - start, last - start)
        seen = [Run(stretch.start, first)] + ([stretch.prefix] if stretch.prefix else [])
        for run in seen:
            anchor += _full(q, run, 0, min(start, lane.dropped), 0)
            past += _full(q, run, lane.dropped, start, lane.at - lane.dropped)
            new += _full(q, run, start, stop, -start)
        new.append(Tile(q, q, Band(0, 1, 0, 1)))
    return tuple(new), tuple(past), tuple(anchor)


def _full(q: slice, run: Run, first: int, last: int, offset: int) -> list[Tile]:
    """All of `run` that lies in [first, last), whose memory index is `offset` more."""
    start, stop = max(run.start, first), min(run.stop, last)
    return [Tile(q, slice(start + offset, stop + offset), None)] if start < stop else []
