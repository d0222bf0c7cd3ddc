"""Which pieces of attention a ring pass computes, and what travels when: pure integers.

A *tile* is one kernel call: a slice of this rank's queries against a slice of the KV that it
holds, under a band.  A *step* is what one rank does between two transfers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from localflash import Band, Piece, pieces
from seqpar.layout import Run, Runs, token_count


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries `q` against keys `k`, both indices into local memory; band None: all visible."""

    q: slice
    k: slice
    band: Band | None


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a ring pass on one rank.

    The rank holds what `source` owns.  It passes `send` tokens of it on to the next rank and
    receives `receive` tokens from the previous one (0: nothing travels, because nobody further
    on would see them), and computes `tiles` meanwhile.
    """

    source: int
    send: int
    receive: int
    tiles: tuple[Tile, ...]


class Work(NamedTuple):
    """What one rank computes in a forward pass.

    `tokens` go through every layer; `pairs` of a query and a key are visible, which cost
    4·H·D floating point operations each in every layer.
    """

    tokens: int
    pairs: int


def pairs(tile: Tile) -> int:
    """Visible pairs of a query and a key."""
    rows, keys = (part.stop - part.start for part in (tile.q, tile.k))
    return sum(_piece_pairs(piece, rows, keys) for piece in pieces(rows, keys, tile.band))


def _piece_pairs(piece: Piece, rows: int, keys: int) -> int:
    q, k = len(range(*piece.q.indices(rows))), len(range(*piece.k.indices(keys)))
    return q * k if piece.kind == "full" else q * (q + 1) // 2


def tiles(q_runs: Runs, k_runs: Runs, window: int | None = None) -> tuple[Tile, ...]:
    """The kernel calls for local queries at `q_runs` against local keys at `k_runs`.

    Pairs of runs that the band leaves empty are skipped; neighbours that are wholly visible
    become one call, and join the banded keys that follow them where one band can say both.
    """
    rows: list[Tile] = []
    for q, q_run in _placed(q_runs):
        rows += _join_keys(_row(q, q_run, k_runs, window), window)
    return tuple(_join_queries(rows))


def visible(q_runs: Runs, k_runs: Runs, window: int | None = None) -> bool:
    """Whether any query sees any key."""
    return any(_sees(q, k, window) for q in q_runs for k in k_runs)


def ring_steps(
    rank: int, q_runs: list[Runs], k_runs: list[Runs], window: int | None = None
) -> tuple[Step, ...]:
    """The pass of `rank`: at step t it holds the KV of rank − t, modulo the world.

    `q_runs[r]` and `k_runs[r]` are what rank r owns.  A KV shard is passed on only while some
    rank further round still sees a key of it; the last step never sends.
    """
    world = len(q_runs)

    def seen(source: int, reader: int) -> bool:
        return visible(q_runs[reader], k_runs[source], window)

    send, receive = (travels(holder % world, k_runs, seen) for holder in (rank, rank - 1))
    return tuple(
        Step(
            source=(rank - step) % world,
            send=send[step],
            receive=receive[step],
            tiles=tiles(q_runs[rank], k_runs[(rank - step) % world], window),
        )
        for step in range(world)
    )


def travels(
    holder: int, moving: Sequence[Runs], wanted: Callable[[int, int], bool]
) -> tuple[int, ...]:
    """Tokens that `holder` passes on at each step, when `moving[r]` goes round from each rank r.

    A share goes on while `wanted(its rank, reader)` for some reader that it has not met yet.
    """
    world = len(moving)
    return tuple(
        token_count(moving[source])
        if any(wanted(source, (holder + hop) % world) for hop in range(1, world - step))
        else 0
        for step in range(world)
        for source in [(holder - step) % world]
    )


def _placed(runs: Runs) -> list[tuple[slice, Run]]:
    placed, at = [], 0
    for run in runs:
        placed.append((slice(at, at + len(run)), run))
        at += len(run)
    return placed


def _sees(q: Run, k: Run, window: int | None) -> bool:
    return k.start <= q.last and (window is None or k.last > q.start - window)


def _sees_all(q: Run, k: Run, window: int | None) -> bool:
    return k.last <= q.start and (window is None or k.start > q.last - window)


def _row(q: slice, q_run: Run, k_runs: Runs, window: int | None) -> list[Tile]:
    row = []
    for k, k_run in _placed(k_runs):
        if _sees_all(q_run, k_run, window):
            row.append(Tile(q, k, None))
        elif _sees(q_run, k_run, window):
            band = Band(q_run.start, q_run.step, k_run.start, k_run.step, window)
            row.append(Tile(q, k, band))
    return row


def _join_keys(row: list[Tile], window: int | None) -> list[Tile]:
    joined: list[Tile] = []
    for tile in row:
        before = joined[-1] if joined else None
        if before is None or before.band is not None or before.k.stop != tile.k.start:
            joined.append(tile)
        elif tile.band is None:
            joined[-1] = replace(before, k=slice(before.k.start, tile.k.stop))
        elif (band := _reach_back(tile.band, before.k.stop - before.k.start, window)) is not None:
            joined[-1] = Tile(tile.q, slice(before.k.start, tile.k.stop), band)
        else:
            joined.append(tile)
    return joined


def _reach_back(band: Band, tokens: int, window: int | None) -> Band | None:
    """`band` over `tokens` more keys in front that are all visible, if a band can say so.

    Their true positions do not matter, only that the band's own spacing keeps them visible:
    the nearest of them must not come after the first query.
    """
    even = band.q_step == band.k_step and window is None
    if not even or band.k_start - band.k_step > band.q_start:
        return None
    return replace(band, k_start=band.k_start - tokens * band.k_step)


def _join_queries(rows: list[Tile]) -> list[Tile]:
    joined: list[Tile] = []
    for tile in rows:
        before = joined[-1] if joined else None
        same_keys = before is not None and before.k == tile.k and before.q.stop == tile.q.start
        if before is not None and same_keys and before.band is None and tile.band is None:
            joined[-1] = replace(before, q=slice(before.q.start, tile.q.stop))
        else:
            joined.append(tile)
    return joined
