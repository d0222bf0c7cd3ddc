"""Visibility between two evenly spaced runs of positions, and its split into kernel calls.

Integers only. Rows are queries (index i, position s = q_start + i*q_step), columns are keys
(index j, position p = k_start + j*k_step). Tq, Tk count them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

# Squares only, so that top-left and bottom-right alignment of a kernel's `causal` agree.
# causal: column <= row; anticausal: column >= row.
Kind = Literal["full", "causal", "anticausal"]


@dataclass(frozen=True, slots=True)
class Band:
    """The key at position p is visible to the query at position s iff s - window < p <= s.

    `window=None` has no left limit. Whatever is not masked at all is `band=None`, not a Band.
    """

    q_start: int
    q_step: int
    k_start: int
    k_step: int
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("q_step", "k_step", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Band.{name}={value}: must be at least 1")


def from_key(band: Band | None, index: int) -> Band | None:
    """The band as the keys from this index on have it."""
    if band is None or index == 0:
        return band
    k_start = band.k_start + index * band.k_step
    return Band(band.q_start, band.q_step, k_start, band.k_step, band.window)


class Piece(NamedTuple):
    """One kernel call: the rows `q` against the keys `k`, both possibly strided slices."""

    q: slice
    k: slice
    kind: Kind


class Offsets(NamedTuple):
    """Key index j is visible to row i iff i + lo <= j <= i + hi (`lo=None`: no left limit)."""

    lo: int | None
    hi: int


class _Block(NamedTuple):
    q0: int
    q1: int
    k0: int
    k1: int
    kind: Kind


def normalise(band: Band) -> Offsets:
    """The band as index offsets; ValueError unless both steps are equal."""
    if band.q_step != band.k_step:
        raise ValueError(f"band={band}: offsets exist only for equal steps; use split_steps")
    gap, step = band.q_start - band.k_start, band.q_step
    lo = None if band.window is None else -((band.window - 1 - gap) // step)
    return Offsets(lo, gap // step)


def split_steps(tq: int, tk: int, band: Band) -> Iterator[tuple[slice, slice, Band]]:
    """Strided slices of rows and of keys that share a step: residues modulo the lcm."""
    common = math.lcm(band.q_step, band.k_step)
    q_stride, k_stride = common // band.q_step, common // band.k_step
    for r in range(min(q_stride, tq)):
        for c in range(min(k_stride, tk)):
            q_start, k_start = band.q_start + r * band.q_step, band.k_start + c * band.k_step
            part = Band(q_start, common, k_start, common, band.window)
            yield slice(r, tq, q_stride), slice(c, tk, k_stride), part


@lru_cache(maxsize=4096)  # every layer of a model asks for the same few
def pieces(tq: int, tk: int, band: Band | None) -> tuple[Piece, ...]:
    """Calls that cover each visible (row, key) of tq x tk exactly once; none is empty.

    A causal band of equal steps takes at most one rectangle, one square and one rectangle for
    rows past the keys; a window takes two squares per `window` rows; unequal steps take
    rectangles for what all rows share and squares per pair of residues for the rest.
    """
    if tq <= 0 or tk <= 0:
        return ()
    if band is None:
        return (_piece(_Block(0, tq, 0, tk, "full")),)
    band = _simplify(tq, tk, band)
    if band.q_step == band.k_step:
        return tuple(_piece(block) for block in _equal(tq, tk, *normalise(band)))
    return tuple(_unequal(tq, tk, band))


def _simplify(tq: int, tk: int, band: Band) -> Band:
    """A single row or key has no step of its own; a window that hides nothing is none."""
    q_last = band.q_start + (tq - 1) * band.q_step
    if band.window is not None and q_last - band.window < band.k_start:
        band = replace(band, window=None)
    if tq == 1:
        return replace(band, q_step=band.k_step)
    return replace(band, k_step=band.q_step) if tk == 1 else band


def _piece(block: _Block, q: slice = slice(0, None, 1), k: slice = slice(0, None, 1)) -> Piece:
    """The block as slices of a whole of which `q` and `k` are the strided part."""
    single = block.q1 - block.q0 == 1 and block.k1 - block.k0 == 1
    return Piece(
        _within(q, block.q0, block.q1),
        _within(k, block.k0, block.k1),
        "full" if single else block.kind,
    )


def _within(outer: slice, start: int, stop: int) -> slice:
    first, step = outer.start, outer.step
    return slice(first + start * step, first + (stop - 1) * step + 1, step)


def _equal(tq: int, tk: int, lo: int | None, hi: int) -> Iterator[_Block]:
    """Three zones of rows: the left limit is off the keys, within them, the right one is off."""
    first, last = max(0, -hi), tq if lo is None else min(tq, tk - lo)
    if lo is None:
        yield from _causal(first, last, tk, hi)
        return
    # Row -lo, which sees from key 0 on, closes the left zone, or opens the next if it is alone.
    left_end = min(last, -lo if first == -lo else 1 - lo)
    yield from _causal(first, left_end, tk, hi)
    first = max(first, left_end)
    right_start = min(max(first, tk - hi), last)
    yield from _windowed(first, right_start, lo, hi)
    # Seen from the last row and key backwards, the right zone is a causal one.
    for q0, q1, k0, k1, kind in _causal(0, last - right_start, tk, tk - last - lo):
        flipped: Kind = "anticausal" if kind == "causal" else kind
        yield _Block(last - q1, last - q0, tk - k1, tk - k0, flipped)


def _causal(first: int, last: int, tk: int, hi: int) -> Iterator[_Block]:
    """Rows first..last of which row i sees the keys 0..i+hi (clipped to tk)."""
    first = max(first, -hi)
    if first >= last:
        return
    shared = min(first + hi + 1, tk)  # keys that the first row, hence every row, sees
    if shared == tk or last - first == 1:
        yield _Block(first, last, 0, shared, "full")
        return
    corner = first + hi
    side = min(last - first, tk - corner)
    if corner > 0:
        yield _Block(first, first + side, 0, corner, "full")
    yield _Block(first, first + side, corner, corner + side, "causal")
    if first + side < last:
        yield _Block(first + side, last, 0, tk, "full")


def _windowed(first: int, last: int, lo: int, hi: int) -> Iterator[_Block]:
    """Rows whose whole window lo..hi lies on the keys, in blocks of as many rows as keys."""
    width = hi - lo + 1
    if width < 1:  # a window that falls between the positions of the keys
        return
    for q0 in range(first, last, width):
        q1 = min(q0 + width, last)
        rows, left, right = q1 - q0, q0 + lo, q0 + hi + 1
        if rows == 1:
            yield _Block(q0, q1, left, right, "full")
            continue
        yield _Block(q0, q1, left, left + rows, "anticausal")
        if left + rows < right:
            yield _Block(q0, q1, left + rows, right, "full")
        yield _Block(q0 + 1, q1, right, right + rows - 1, "causal")


def _unequal(tq: int, tk: int, band: Band) -> Iterator[Piece]:
    rows, shared = tq, 0
    if band.window is None:
        k_last = band.k_start + (tk - 1) * band.k_step
        rows = min(max(-((band.q_start - k_last) // band.q_step), 0), tq)
        shared = min(max((band.q_start - band.k_start) // band.k_step + 1, 0), tk)
    if rows < tq:  # rows that see every key
        yield _piece(_Block(rows, tq, 0, tk, "full"))
    if rows and shared:  # keys that every other row sees
        yield _piece(_Block(0, rows, 0, shared, "full"))
    rest = replace(band, k_start=band.k_start + shared * band.k_step)
    for q, k, part in split_steps(rows, tk - shared, rest):
        n, m = len(range(*q.indices(rows))), len(range(*k.indices(tk - shared)))
        k = slice(k.start + shared, tk, k.step)
        for block in _equal(n, m, *normalise(part)):
            yield _piece(block, q, k)
