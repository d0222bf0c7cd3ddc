"""A comparison for people: tables, answers side by side, and what the figures say in words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.compare_measure import Measured
from launch.compare_plan import Plan
from launch.compare_result import Summary, mean, recall_by_depth, summarize

MIB = 1024**2
_NOTHING = "-"
_WIDTH = 140  # where standard output is no terminal


def tables(plan: Plan, found: Sequence[Measured]) -> str:
    """Everything, as wide as standard output."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    summaries = [summarize(seen, found[0]) for seen in found]
    with console.capture() as capture:
        console.print(_summary_table(plan, summaries))
        console.print(_answer_table(plan, found))
        console.print(*_depth_tables(plan, found), sep="\n")
        console.print(Text("\n".join(verdict(plan, summaries))))
    return capture.get()


def verdict(plan: Plan, summaries: Sequence[Summary]) -> list[str]:
    """A sentence for each setting of star, of figures alone."""
    exact, *stars = summaries
    lines = [f"{star.label}: {', '.join(_said(plan, star, exact))}." for star in stars]
    return [*lines, "These are figures of this document and these questions, not of others."]


def _said(plan: Plan, star: Summary, exact: Summary) -> Iterator[str]:
    yield f"encoded in {star.encode_ratio:.2f} of exact's time"
    yield f"gave {star.same_answers} of {len(plan.questions)} answers word for word"
    both = f"had the same first choice at {_share(star.answer_same_top)} of exact's answer tokens"
    if star.passage_same_top is not None:
        both += f" and at {_share(star.passage_same_top)} of the passages' tokens"
    yield both
    if star.needles_found is not None:
        asked = needles_asked(plan)
        yield f"found {star.needles_found} of {asked} needles (exact: {exact.needles_found})"


def needles_asked(plan: Plan) -> int:
    return sum(len(haystack.needles) for haystack in plan.haystacks)


def _summary_table(plan: Plan, summaries: Sequence[Summary]) -> Table:
    table = Table(title=f"exact and star, {len(plan.document):,} tokens", title_justify="left")
    table.add_column("", no_wrap=True)
    for row in summaries:
        table.add_column(Text(row.label), justify="right")
    for name, cell in _figures(needles_asked(plan)):
        table.add_row(name, *map(cell, summaries))
    return table


def _figures(needles: int) -> Iterator[tuple[str, Callable[[Summary], str]]]:
    """A line of the table: its name, and what it says of a setting."""
    yield "encode, s", lambda row: f"{row.encode_s:.2f}"
    yield "encode, of exact's time", lambda row: f"{row.encode_ratio:.2f}"
    yield "KV a rank, MiB", lambda row: f"{row.kv_bytes / MIB:.1f}"
    yield "sent a rank, MiB", lambda row: f"{row.bytes_sent / MIB:.1f}"
    yield "KL at first tokens, mean", lambda row: _kl(row.first_kl_mean)
    yield "KL at first tokens, max", lambda row: _kl(row.first_kl_max)
    yield "KL in answers, mean", lambda row: _kl(row.answer_kl_mean)
    yield "top-1 the same in answers", lambda row: _share(row.answer_same_top)
    yield "KL in passages, mean", lambda row: _kl(row.passage_kl_mean)
    yield "top-1 the same in passages", lambda row: _share(row.passage_same_top)
    yield "passages quoted right", lambda row: _share(row.quoted)
    yield "needles found", lambda row: _of(row.needles_found, needles)


def _answer_table(plan: Plan, found: Sequence[Measured]) -> Table:
    table = Table(title="answers side by side", title_justify="left", show_lines=True)
    table.add_column("question", ratio=2, overflow="fold")
    for seen in found:
        table.add_column(Text(seen.setting.label), ratio=3, overflow="fold")
    for number, question in enumerate(plan.questions):
        exact, *others = (seen.answers[number] for seen in found)
        asked = f"{len(question.ids)} token ids" if question.text is None else question.text
        told = [exact, *(None if answer.ids == exact.ids else answer for answer in others)]
        cells = ["the same" if a is None else a.text.strip() or str(a.ids) for a in told]
        table.add_row(Text(asked), *map(Text, cells))
    return table


def _depth_tables(plan: Plan, found: Sequence[Measured]) -> Iterator[Table]:
    if plan.passages:
        depths = [passage.depth for passage in plan.passages]
        kl = [[_kl(mean(of.kl)) for of in seen.of_passages] for seen in found[1:]]
        yield _depth_table("KL in passages quoted from the document", depths, found[1:], kl)
    if plan.haystacks:
        depths = [needle.depth for needle in plan.haystacks[0].needles]
        recall = [[_share(share) for share in recall_by_depth(seen)] for seen in found]
        yield _depth_table("needles found", depths, found, recall)


def _depth_table(
    title: str, depths: Sequence[float], found: Sequence[Measured], cells: Sequence[Sequence[str]]
) -> Table:
    table = Table(title=f"{title}, by depth", title_justify="left")
    table.add_column("depth", justify="right")
    for seen in found:
        table.add_column(Text(seen.setting.label), justify="right")
    for depth, *row in zip(depths, *cells, strict=True):
        table.add_row(f"{depth:.2f}", *row)
    return table


def _of(found: int | None, asked: int) -> str:
    return _NOTHING if found is None else f"{found} of {asked}"


def _kl(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.2g}"


def _share(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.0%}"
