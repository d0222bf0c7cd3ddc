"""What one rank did, as spans of time: the first ones whole, of the others the totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ringstar.trace.clocks import Clock

Kind = Literal["phase", "forward", "head", "layer", "attention", "kernel", "transfer", "wait"]
# spans beyond the limit are added up so many at a time: on CUDA that waits for the device
_ADDED_UP_TOGETHER = 4096


class Span(NamedTuple):
    """`kind`, what it was, when on this rank's clock (ns), and details; `phase`: during which."""

    kind: Kind
    name: str
    phase: str
    began: int
    ended: int
    details: Mapping[str, Any]


@dataclass(slots=True)
class Total:
    """Of all spans of a kind in a phase: how many, nanoseconds, and counted bytes sent."""

    count: int = 0
    nanoseconds: int = 0
    sent: int = 0


@dataclass(slots=True)
class RankRecord:
    """All that one rank recorded; `dropped` counts, by kind, spans of which only totals are left.

    `totals` are by phase and kind; chunks of an encode are one phase here.
    """

    spans: list[Span]
    totals: dict[tuple[str, Kind], Total]
    dropped: dict[str, int]


@dataclass
class Recorder:
    """Takes the spans of one rank: `began = begin(name)`, then `end(kind, name, began, ...)`.

    The first `limit` phases and the first `limit` other spans are kept.  `about` is what the next
    kernels are about, for people.
    """

    clock: Clock
    limit: int
    about: Mapping[str, Any] = field(default_factory=dict)
    _phases: list[tuple] = field(default_factory=list)
    _kept: list[tuple] = field(default_factory=list)
    _beyond: list[tuple] = field(default_factory=list)
    _totals: dict[tuple[str, Kind], Total] = field(default_factory=dict)
    _dropped: Counter[str] = field(default_factory=Counter)
    _phase: str | None = None
    _phase_began: Any = None

    def begin(self, name: str) -> Any:
        """A stamp for `end`; what begins later must end earlier."""
        self.clock.enter(name)
        return self.clock.stamp()

    def end(self, kind: Kind, name: str, began: Any, details: Mapping[str, Any]) -> None:
        """What began at `began` is over."""
        ended = self.clock.stamp()
        self.clock.leave()
        self.add(kind, name, began, ended, details)

    def add(
        self, kind: Kind, name: str, began: Any, ended: Any, details: Mapping[str, Any]
    ) -> None:
        """A span that may overlap others of its kind."""
        span = (kind, name, self._phase or "", began, ended, details)
        kept = self._phases if kind == "phase" else self._kept
        if len(kept) < self.limit:
            kept.append(span)
            return
        self._dropped[kind] += 1
        self._beyond.append(span)
        if len(self._beyond) == _ADDED_UP_TOGETHER:
            self._add_up()

    def enter_phase(self, phase: str | None) -> None:
        """The phase that begins now and ends the one before; None: none that is worth a name."""
        if phase == self._phase:
            return
        now = self.clock.stamp()
        if self._phase is not None:
            self.add("phase", self._phase, self._phase_began, now, {})
        self._phase, self._phase_began = phase, now

    @property
    def phase(self) -> str:
        """What this rank is doing now."""
        return self._phase or ""

    def record(self) -> RankRecord:
        """All of it, once; the recorder begins anew."""
        self.enter_phase(None)
        spans = [self._resolved(span) for span in (*self._phases, *self._kept)]
        for span in spans:
            self._count(span)
        self._add_up()
        made = RankRecord(spans, self._totals, dict(self._dropped))
        self._phases, self._kept, self._totals, self._dropped = [], [], {}, Counter()
        return made

    def _add_up(self) -> None:
        for span in self._beyond:
            self._count(self._resolved(span))
        self._beyond.clear()

    def _resolved(self, span: tuple) -> Span:
        kind, name, phase, began, ended, details = span
        when = self.clock.nanoseconds
        return Span(kind, name, phase, when(began), when(ended), details)

    def _count(self, span: Span) -> None:
        total = self._totals.setdefault((group_of(span.phase), span.kind), Total())
        total.count += 1
        total.nanoseconds += span.ended - span.began
        total.sent += span.details.get("sent", 0) if span.details.get("counted") else 0


def group_of(phase: str) -> str:
    """`encode chunk 2 of 5` and its like are all `encode`."""
    return "encode" if phase.startswith("encode chunk ") else phase
