"""Which rank owns which positions: pure integers.

A layout deals the positions [start, stop) of one extension of a document over `world` ranks,
at any length: ranks may own shares that differ by one token or more, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

LayoutKind = Literal["zigzag", "striped", "contiguous"]


@dataclass(frozen=True, slots=True)
class Run:
    """Evenly spaced positions start, start + step, … below `stop`; never empty in a plan."""

    start: int
    stop: int
    step: int = 1

    def __len__(self) -> int:
        return max(0, -(-(self.stop - self.start) // self.step))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop, self.step))

    @property
    def last(self) -> int:
        return self.start + (len(self) - 1) * self.step


Runs = tuple[Run, ...]


def token_count(runs: Runs) -> int:
    return sum(len(run) for run in runs)


def positions(runs: Runs) -> list[int]:
    """The positions in memory order."""
    return [position for run in runs for position in run]


def clip(runs: Runs, start: int) -> Runs:
    """The positions from `start` on, in the same order."""
    return tuple(
        Run(run.start + gone * run.step, run.stop, run.step)
        for run in runs
        for gone in (max(0, -(-(start - run.start) // run.step)),)
        if gone < len(run)
    )


def before(runs: Runs, stop: int) -> Runs:
    """The positions below `stop`, in the same order."""
    return tuple(Run(run.start, min(run.stop, stop), run.step) for run in runs if run.start < stop)


def joined(runs: Runs, run: Run) -> Runs:
    """`runs` and then `run`, as one run where the spacing goes on: lists stay short."""
    if not runs:
        return (run,)
    last = runs[-1]
    gap = run.start - last.last
    step = last.step if len(last) > 1 else gap
    even = gap == step > 0 and (len(run) == 1 or run.step == step)
    return (*runs[:-1], Run(last.start, run.last + 1, step)) if even else (*runs, run)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the positions [start, stop) are dealt over `world` ranks.

    - contiguous: rank r holds the r-th of `world` equal pieces. Causal work is unbalanced.
    - striped: rank r holds start + r, start + r + world, …
    - zigzag: of 2·world equal pieces rank r holds pieces r and 2·world − 1 − r, so that every
      rank has the same causal work.
    """

    kind: LayoutKind
    start: int
    stop: int
    world: int

    def __post_init__(self) -> None:
        if self.kind not in _RUNS:
            raise ValueError(f"layout={self.kind!r}: allowed are {', '.join(get_args(LayoutKind))}")
        if not 0 <= self.start <= self.stop or self.world < 1:
            raise ValueError(f"cannot deal [{self.start}, {self.stop}) over {self.world} ranks")

    def runs(self, rank: int) -> Runs:
        """What `rank` owns, in the order in which it keeps it."""
        return tuple(run for run in _RUNS[self.kind](self, rank) if len(run))

    def count(self, rank: int) -> int:
        return token_count(self.runs(rank))

    def owner(self, position: int) -> tuple[int, int]:
        """The rank that owns `position`, and its index in that rank's memory order."""
        if not self.start <= position < self.stop:
            raise ValueError(f"position {position} is outside [{self.start}, {self.stop})")
        for rank in range(self.world):
            offset = 0
            for run in self.runs(rank):
                ahead = position - run.start
                if ahead >= 0 and position < run.stop and ahead % run.step == 0:
                    return rank, offset + ahead // run.step
                offset += len(run)
        raise AssertionError("a layout covers every position")


def _piece(layout: Layout, index: int, pieces: int) -> Run:
    length = layout.stop - layout.start
    edge = [layout.start + i * length // pieces for i in (index, index + 1)]
    return Run(edge[0], edge[1])


def _contiguous(layout: Layout, rank: int) -> list[Run]:
    return [_piece(layout, rank, layout.world)]


def _striped(layout: Layout, rank: int) -> list[Run]:
    return [Run(layout.start + rank, layout.stop, layout.world)]


def _zigzag(layout: Layout, rank: int) -> list[Run]:
    pieces = 2 * layout.world
    early, late = _piece(layout, rank, pieces), _piece(layout, pieces - 1 - rank, pieces)
    return [Run(early.start, late.stop)] if early.stop == late.start else [early, late]


_RUNS: dict[str, Callable[[Layout, int], list[Run]]] = {
    "zigzag": _zigzag,
    "striped": _striped,
    "contiguous": _contiguous,
}
