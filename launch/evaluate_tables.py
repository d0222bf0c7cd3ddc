"""An evaluation for people: a table for each length, and what the figures say in words."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.evaluate_plan import Plan
from launch.evaluate_result import CANNOT, CellResult, cannot, ruler_mean
from launch.evaluate_star import EXACT
from ringstar.evaluation import BY_DEPTH

_WIDTH = 140  # where standard output is no terminal


def tables(plan: Plan, found: Sequence[CellResult]) -> str:
    """Everything, as wide as standard output."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    with console.capture() as capture:
        for length in sorted({row.length for row in found}):
            here = [row for row in found if row.length == length]
            for rows in (
                [row for row in here if row.task != BY_DEPTH],
                [row for row in here if row.task == BY_DEPTH],
            ):
                if rows:
                    console.print(_table(plan, rows, length))
        console.print(Text("\n".join(_said(plan, found))))
    return capture.get()


def name_of(row: CellResult) -> str:
    """A row's name: the task, or the depth of its needle."""
    return row.task if row.depth is None else f"depth {100 * row.depth:.4g}%"


def _table(plan: Plan, rows: Sequence[CellResult], length: int) -> Table:
    counts = sorted({row.samples for row in rows})
    of_what = "tasks" if rows[0].depth is None else "one needle by depth"
    title = (
        f"{of_what}, {length:,} tokens, {' or '.join(map(str, counts))} samples each, scores in %"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for star in plan.contenders:
        table.add_column(Text(star.label), justify="right")
        if star.label != EXACT:
            table.add_column("of exact's", justify="right")
            table.add_column("p", justify="right")
    by_name: dict[str, list[CellResult]] = {}
    for row in rows:
        by_name.setdefault(name_of(row), []).append(row)
    for name, cells in by_name.items():
        table.add_row(name, *(text for cell in cells for text in _cells(cell)))
    means = [ruler_mean(rows, length, star.label) for star in plan.contenders]
    if means[0] and means[0][1] > 1:
        table.add_section()
        shown = [f"{100 * mean[0]:.1f}" for mean in means if mean]
        beside = [text for mean in shown[1:] for text in (mean, "", "")]
        table.add_row(f"mean of {means[0][1]}", shown[0], *beside)
    return table


def _cells(row: CellResult) -> Iterator[str]:
    """The score with its interval; of star also what it keeps of exact's, and p."""
    yield f"{100 * row.mean:.0f} ({100 * row.low:.0f}-{100 * row.high:.0f})"
    if row.strategy == EXACT:
        return
    if not row.can:
        yield from ("exact near 0", "")
    else:
        low, high = _percent(row.retention_low), _percent(row.retention_high)
        yield f"{_percent(row.retention)} ({low}-{high})"
        yield f"{row.p:.2g}"


def _percent(value: float | None) -> str:
    """None is without end; a few samples bound a share hardly better."""
    return ">999" if value is None or value >= 10 else f"{100 * value:.0f}"


def _said(plan: Plan, found: Sequence[CellResult]) -> Iterator[str]:
    failed, with_star = cannot(found), len(plan.contenders) > 1
    if failed:
        where = ", ".join(f"{name_of(row)} at {row.length:,}" for row in failed)
        kept = ", and what star keeps of it cannot be told" if with_star else ""
        yield (
            f"Exact scores below {CANNOT:.0%} in these samples: the model cannot do the"
            f" task{kept}: {where}."
        )
    if with_star:
        yield (
            "In parentheses 95% intervals (Wilson's; of shares MOVER-R). p: paired with exact on"
            " the same samples, for each row alone; of many rows some fall below 0.05 by chance."
        )
    else:
        yield "In parentheses Wilson's 95% intervals."
    for name, made in plan.material.sources().items():
        yield f"{name}: {made['source']}"
    yield "Texts and words are not RULER's own: put these scores beside no published ones."
