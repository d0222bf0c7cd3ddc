"""Several texts side by side in one pass, without padding: pure integers.

Tokens of a rank are in the order of the texts; no tile spans two of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from seqpar.layout import Runs, token_count
from seqpar.schedule import Step, Tile


@dataclass(frozen=True, slots=True)
class Span:
    """Positions [start, stop) of a text, to be encoded after the `past[r]` that each rank r has."""

    start: int
    stop: int
    past: tuple[Runs, ...]

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank computes of one text in a forward pass.

    `text` counts the texts that are encoded together; `positions` are computed, in this order,
    and `kept`, the last of them, stay.  Once the pass is over, all positions before `encoded`
    are encoded on all ranks, or that is not known: 0 where passes do not go from first to last.
    """

    text: int
    positions: Runs
    kept: Runs
    encoded: int


def side_by_side(counts: Sequence[int]) -> list[slice]:
    """Where texts of so many tokens each are in memory, one after another."""
    return [slice(start, stop) for start, stop in pairwise(accumulate(counts, initial=0))]


def cut(spans: Sequence[Span], chunk_tokens: int) -> Iterator[list[tuple[int, int, int]]]:
    """Chunks of about equal size, at most `chunk_tokens`, of all spans one after another.

    Each is a list of (which span, first position, position after the last).
    """
    places = side_by_side([len(span) for span in spans])
    total = places[-1].stop
    chunks = max(1, -(-total // chunk_tokens))
    for first, last in pairwise(index * total // chunks for index in range(chunks + 1)):
        yield [
            (number, span.start + start - place.start, span.start + stop - place.start)
            for number, (span, place) in enumerate(zip(spans, places, strict=True))
            for start, stop in [(max(first, place.start), min(last, place.stop))]
            if start < stop
        ]


def packed_steps(
    rank: int,
    queries: Sequence[tuple[Runs, ...]],
    keys: Sequence[tuple[Runs, ...]],
    steps: Sequence[tuple[Step, ...]],
) -> tuple[Step, ...]:
    """One ring pass in place of one for each text: KV of all texts travels as one piece.

    `queries[i][r]` and `keys[i][r]` are what rank r owns of text i, `steps[i]` its pass on `rank`.
    The piece goes on while some text's does.
    """
    if len(steps) == 1:
        return steps[0]
    rows = side_by_side([token_count(runs[rank]) for runs in queries])
    world = len(keys[0])

    def together(at_once: tuple[Step, ...]) -> Step:
        source = at_once[0].source
        after = (source - 1) % world  # the piece that comes next is its neighbour's
        held, coming = ([token_count(runs[owner]) for runs in keys] for owner in (source, after))
        places = side_by_side(held)
        return Step(
            source=source,
            send=sum(held) if any(step.send for step in at_once) else 0,
            receive=sum(coming) if any(step.receive for step in at_once) else 0,
            tiles=tuple(
                _moved(tile, row, place)
                for step, row, place in zip(at_once, rows, places, strict=True)
                for tile in step.tiles
            ),
        )

    return tuple(together(at_once) for at_once in zip(*steps, strict=True))


def _moved(tile: Tile, rows: slice, place: slice) -> Tile:
    q = slice(tile.q.start + rows.start, tile.q.stop + rows.start)
    return replace(tile, q=q, k=slice(tile.k.start + place.start, tile.k.stop + place.start))
