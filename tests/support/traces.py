"""Reading a trace, and what the trace event format asks of it."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

Event = dict[str, Any]


def read(path) -> dict:
    return json.loads((path / "trace.json").read_text())


def check_format(trace) -> dict[tuple[int, int], list[dict]]:
    """What the trace event format asks for; complete events by (rank, track), in order."""
    tracks = defaultdict(list)
    names = defaultdict(set)
    for event in trace["traceEvents"]:
        assert {"ph", "ts", "pid", "tid", "name"} <= set(event)
        assert type(event["pid"]) is int and type(event["tid"]) is int
        assert isinstance(event["args"], dict) and event["ts"] >= 0
        if event["ph"] == "M":
            names[event["name"]].add((event["pid"], event["tid"]))
        else:
            assert event["ph"] == "X" and event["dur"] >= 0 and event["cat"]
            tracks[event["pid"], event["tid"]].append(event)
    assert set(tracks) <= names["thread_name"]
    assert {(rank, 0) for rank, _ in tracks} <= names["process_name"]
    for events in tracks.values():
        check_nesting(events)
    return tracks


def check_nesting(events) -> None:
    """In order of time, and each within those that are open when it begins; whole nanoseconds."""
    open_until: list[int] = []
    for before, event in pairwise([None, *events]):
        began = round(event["ts"] * 1000)
        ended = began + round(event["dur"] * 1000)
        assert before is None or round(before["ts"] * 1000) <= began
        while open_until and open_until[-1] <= began:
            open_until.pop()
        assert not open_until or ended <= open_until[-1], event
        open_until.append(ended)


def of_kind(trace, kind, rank=None):
    return [
        event
        for event in trace["traceEvents"]
        if event.get("cat") == kind and rank in (None, event["pid"])
    ]


def seconds(events) -> float:
    return sum(event["dur"] for event in events) / 1e6


def bytes_sent(trace, world) -> list[int]:
    moved = [event for event in of_kind(trace, "transfer") if event["args"]["counted"]]
    return [sum(e["args"]["sent"] for e in moved if e["pid"] == rank) for rank in range(world)]
