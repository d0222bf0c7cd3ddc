"""What the needle trials say: rates with intervals, paired with exact attention, and a picture."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.stats import binomtest

from launch.circumstances import circumstances

if TYPE_CHECKING:
    from benchmarks.needles import Trial

Cell = tuple[int, int]
EXACT = "exact"
# Star Attention, arXiv 2411.17116, table 4: RULER's needle tasks, Llama-3.1-8B-Instruct, 128K
# tokens in blocks of 32K, per cent. Other model, other tasks: for the order of methods only.
PUBLISHED = {
    "exact": 98.49,
    "first block": 97.54,
    "no anchor": 73.75,
    "first block, random positions": 97.16,
    "first block, previous block's positions": 96.80,
    "constant token": 0.0,
    "random tokens": 82.63,
    "shuffled first block": 90.76,
    "previous block": 96.13,
}
COLOURS = {"exact": "#000000", "first block": "#0072B2", "no anchor": "#D55E00"}


def interval(found: int, trials: int) -> tuple[float, float]:
    """Wilson's 95% interval of a rate."""
    between = binomtest(found, trials).proportion_ci(method="wilson")
    return float(between.low), float(between.high)


def paired(method: Iterable[Trial], exact: Iterable[Trial]) -> dict[str, Any]:
    """The trials in which only one of the two found the needle, and McNemar's exact p."""
    mine = {(t.document, t.depth): t.found for t in method}
    other = {(t.document, t.depth): t.found for t in exact}
    both = mine.keys() & other.keys()
    lost = sum(other[key] and not mine[key] for key in both)
    won = sum(mine[key] and not other[key] for key in both)
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return {"pairs": len(both), "only_exact": lost, "only_this": won, "p": p}


def summary(trials: Iterable[Trial]) -> dict[Cell, dict[str, dict[str, Any]]]:
    """For each cell and method: counts, rate, interval, the pairing, and counts by depth."""
    grouped: dict[Cell, dict[str, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        grouped[trial.tokens, trial.keys][trial.method].append(trial)
    return {
        cell: {
            name: _row(methods[name], methods.get(EXACT, []))
            for name in sorted(methods, key=list(PUBLISHED).index)
        }
        for cell, methods in sorted(grouped.items())
    }


def _row(own: list[Trial], exact: list[Trial]) -> dict[str, Any]:
    found = sum(trial.found for trial in own)
    low, high = interval(found, len(own))
    depths = {
        depth: [sum(t.found for t in own if t.depth == depth), sum(t.depth == depth for t in own)]
        for depth in sorted({trial.depth for trial in own})
    }
    return {
        "trials": len(own),
        "found": found,
        "rate": found / len(own),
        "interval": [low, high],
        "against_exact": paired(own, exact),
        "by_depth": depths,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One cell as Markdown."""
    lines = [
        "| anchor | found | rate | 95% interval | only exact found | only this found | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        low, high = row["interval"]
        pair = row["against_exact"]
        beside = f"{pair['only_exact']} | {pair['only_this']} | {pair['p']:.2g}"
        counts = f"{row['found']}/{row['trials']} | {row['rate']:.0%} | {low:.0%} to {high:.0%}"
        lines.append(f"| {name} | {counts} | {'| | ' if name == EXACT else beside} |")
    return "\n".join(lines)


def document(found: dict[Cell, dict[str, dict[str, Any]]], where: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    parts = [
        f"# Needles found by SmolLM2-135M-Instruct, {where['date']}",
        f"`{where['command']}` at {where['commit']} on {where['hardware']}; {versions}; bfloat16.",
        _HOW,
        f"![found by method, beside the paper's table, and by depth]({where['date']}-needles.png)",
    ]
    for (tokens, keys), rows in found.items():
        parts += [f"## {tokens:,} tokens, {keys} key{'s' * (keys > 1)}", table(rows)]
    return "\n\n".join([*parts, _PUBLISHED_NOTE]) + "\n"


_HOW = """A document is one noise line again and again, with a fact for each key, at depths that are
spread evenly over it: "One of the special magic numbers for KEY is: NUMBER." The model is asked for
one number, and its answer is made to begin with all but the number. Found means that the seven
digits are in the greedy answer. Every method got the same documents. Star has four blocks, and
anchors as long as a block; "exact" is dense attention. All run on one simulated rank, which
computes the same as several. Intervals are Wilson's; p is McNemar's exact test, two-sided, against
exact on the same questions; the four questions about one document count as independent. Among four
keys this small model often names another key's number, with exact attention too."""

_PUBLISHED_NOTE = """The picture's circles are what the paper prints in its table 4
(Llama-3.1-8B-Instruct, RULER's needle tasks, 128K tokens in blocks of 32K). They were not measured
here, and model, tasks and lengths differ: only the order of methods can be compared. Where the
order here is another one, the text may be why: noise that repeats one line is easy to tell from a
fact whatever the anchor holds. That was not tested."""


def write_report(trials: list[Trial], folder: Path) -> None:
    """`DATE-needles.json`, `.md` and `.png` in `folder`."""
    found = summary(trials)
    where = circumstances("python -m benchmarks.needles")
    name = f"{where['date']}-needles"
    cells = {f"{tokens}/{keys}": rows for (tokens, keys), rows in found.items()}
    content = {"circumstances": where, "cells": cells}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{name}.md").write_text(document(found, where))
    draw(found, folder / f"{name}.png")
    for (tokens, keys), rows in found.items():
        print(f"\n{tokens} tokens, {keys} keys\n{table(rows)}")


def draw(found: dict[Cell, dict[str, dict[str, Any]]], target: Path) -> None:
    """Left: the cell with most methods beside the paper's table. Right: each cell by depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 2.2 + 1.55 * len(found)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1))
    cell = max(found, key=lambda cell: len(found[cell]))
    _draw_methods(left.subplots(), cell, found[cell])
    panels = right.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (own, rows) in zip(panels, found.items(), strict=True):
        _draw_depths(axes, own, rows)
    panels[-1].set_xlabel("depth of the needle, % of the document")
    panels[0].legend(loc="lower right", fontsize=9)
    figure.savefig(target, dpi=100, facecolor="white")


def _draw_methods(axes: Any, cell: Cell, rows: dict[str, dict[str, Any]]) -> None:
    names = [name for name in PUBLISHED if name in rows]
    for place, name in enumerate(reversed(names)):
        row = rows[name]
        rate, (low, high) = 100 * row["rate"], (100 * edge for edge in row["interval"])
        axes.barh(place, rate, color="#56B4E9", height=0.6)
        axes.plot([low, high], [place, place], color="black", linewidth=1.5)
        axes.plot(PUBLISHED[name], place, "o", markerfacecolor="white", color="#D55E00")
    axes.set_yticks(range(len(names)), reversed(names))
    axes.set(xlim=(-2, 104), xlabel="needles found, %")
    axes.set_title(
        f"bars: SmolLM2, {cell[0]:,} tokens, 4 blocks, 95% intervals\n"
        "circles: the paper's table 4\n(Llama-3.1-8B, 128K; not measured here)",
        fontsize=10,
    )


def _draw_depths(axes: Any, cell: Cell, rows: dict[str, dict[str, Any]]) -> None:
    for name, colour in COLOURS.items():
        if name in rows:
            depths = {float(d): 100 * f / n for d, (f, n) in rows[name]["by_depth"].items()}
            across = [100 * depth for depth in depths]
            dashes = "--" if name == EXACT else "-"
            axes.plot(across, list(depths.values()), dashes, marker="o", color=colour, label=name)
    axes.set(ylim=(-5, 105), ylabel="found, %")
    axes.set_title(f"{cell[0]:,} tokens, {cell[1]} key{'s' * (cell[1] > 1)}", fontsize=10)
