"""The records of all ranks as one file in Chrome's trace event format, which Perfetto opens too.

A process for each rank; its threads are tracks: phases, compute, waits, and as many for transfers
as were under way at once.  Format: "Trace Event Format", sections on complete and metadata events.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ringstar.trace.recorder import RankRecord, Span

PHASES, COMPUTE, WAITS, TRANSFERS = range(4)
_TRACK = {
    "phase": PHASES,
    "forward": COMPUTE,
    "head": COMPUTE,
    "layer": COMPUTE,
    "attention": COMPUTE,
    "kernel": COMPUTE,
    "wait": WAITS,
}
_NAMES = {PHASES: "phases", COMPUTE: "compute", WAITS: "waits (exposed communication)"}


@dataclass(frozen=True, slots=True)
class RankTrace:
    """What a rank recorded, on rank 0's clock, and where it ran."""

    rank: int
    where: str
    record: RankRecord


def trace_file(ranks: Sequence[RankTrace], about: dict[str, Any]) -> bytes:
    """The whole file; `about` is what is known of the run."""
    first = min((s.began for rank in ranks for s in rank.record.spans), default=0)
    events = [event for rank in ranks for event in _events(rank, first)]
    content = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {**about, "ranks": [_figures(rank) for rank in ranks]},
    }
    return json.dumps(content, separators=(",", ":")).encode()


def _events(rank: RankTrace, first: int) -> Iterator[dict[str, Any]]:
    """Names of the rank and of its tracks, then its spans, track by track in order of time."""
    placed = list(_placed(rank.record.spans))
    yield from _metadata(rank, sorted({track for track, _ in placed}))
    # of two that begin together the longer one is around the other
    placed.sort(key=lambda item: (item[0], item[1].began, -item[1].ended))
    for track, span in placed:
        yield {
            "ph": "X",
            "pid": rank.rank,
            "tid": track,
            "cat": span.kind,
            "name": span.name,
            "ts": (span.began - first) / 1000,
            "dur": (span.ended - span.began) / 1000,
            "args": {"phase": span.phase, **span.details},
        }


def _placed(spans: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Each span with its track; transfers go to the first track that is free."""
    free_at: list[int] = []
    for span in sorted(spans, key=lambda span: span.began):
        if span.kind != "transfer":
            yield _TRACK[span.kind], span
            continue
        lane = next((i for i, at in enumerate(free_at) if at <= span.began), len(free_at))
        free_at[lane : lane + 1] = [span.ended]
        yield TRANSFERS + lane, span


def _metadata(rank: RankTrace, tracks: Sequence[int]) -> Iterator[dict[str, Any]]:
    yield _named(rank, 0, "process_name", {"name": f"rank {rank.rank}"})
    yield _named(rank, 0, "process_labels", {"labels": rank.where})
    yield _named(rank, 0, "process_sort_index", {"sort_index": rank.rank})
    for track in tracks:
        lane = track - TRANSFERS + 1
        label = _NAMES.get(track, "transfers" if lane == 1 else f"transfers {lane}")
        yield _named(rank, track, "thread_name", {"name": label})
        yield _named(rank, track, "thread_sort_index", {"sort_index": track})


def _named(rank: RankTrace, track: int, name: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "pid": rank.rank, "tid": track, "ts": 0, "name": name, "args": args}


def _figures(rank: RankTrace) -> dict[str, Any]:
    """Totals by phase and kind, those of dropped spans among them; seconds and bytes."""
    totals: dict[str, dict[str, Any]] = {}
    for (phase, kind), total in rank.record.totals.items():
        figures: dict[str, Any] = {"count": total.count, "seconds": total.nanoseconds / 1e9}
        if kind == "transfer":
            figures["bytes_sent"] = total.sent
        totals.setdefault(phase, {})[kind] = figures
    return {
        "rank": rank.rank,
        "where": rank.where,
        "totals": totals,
        "dropped": rank.record.dropped,
    }
