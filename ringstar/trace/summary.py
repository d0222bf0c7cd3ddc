"""For people: how long each rank only waited for others, and what of a trace was not kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ringstar.trace.chrome import RankTrace
from ringstar.trace.recorder import Total

# what is no part of the work itself
_ASIDE = ("", "load", "metrics")


def exposed(rank: RankTrace) -> dict[str, tuple[float, float]]:
    """Seconds of waiting for others, and seconds in all, in each phase in which a rank worked."""
    totals = rank.record.totals
    return {
        phase: (totals.get((phase, "wait"), Total()).nanoseconds / 1e9, total.nanoseconds / 1e9)
        for (phase, kind), total in totals.items()
        if kind == "phase" and phase not in _ASIDE
    }


def summary_lines(ranks: Sequence[RankTrace], limit: int) -> Iterator[str]:
    """A small table: a line for each rank, a column for each phase and for all of them."""
    rows = {str(rank.rank): exposed(rank) for rank in ranks}
    phases = list(dict.fromkeys(phase for row in rows.values() for phase in row))
    table = {"rank": [*phases, "all"]}
    for name, row in rows.items():
        cells = [row.get(phase, (0.0, 0.0)) for phase in phases]
        waited, worked = (sum(part) for part in zip(*cells, strict=True)) if cells else (0.0, 0.0)
        table[name] = [_share(*cell) for cell in (*cells, (waited, worked))]
    width = 2 + max(len(cell) for row in table.values() for cell in row)
    yield "exposed communication, seconds of waiting for others of seconds at work:"
    for name, line in table.items():
        yield f"{name:>4}" + "".join(f"{cell:>{width}}" for cell in line)
    dropped = sum((Counter(rank.record.dropped) for rank in ranks), Counter())
    if dropped:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in dropped.most_common())
        yield (
            f"in the totals but not in the trace, beyond profile.max_events={limit} of a rank:"
            f" {kinds}"
        )


def _share(waited: float, worked: float) -> str:
    share = f"({waited / worked:.1%})" if worked else ""
    return f"{waited:.2f} of {worked:.2f} {share:>7}"
