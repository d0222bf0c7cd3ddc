"""Draw which rank holds which tokens, and how much each rank computes at each ring step.

    python docs/draw_layouts.py [FILE.png]

Everything comes from the layouts and schedules that the runtime itself uses.  Work is counted in
query-key pairs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from seqpar import Layout, LayoutKind, pairs, positions, ring_steps

KINDS: tuple[LayoutKind, ...] = ("contiguous", "striped", "zigzag")
WORLD, TOKENS = 4, 32
# Okabe and Ito's colours, told apart without red and green; each with a text colour that it bears
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
TEXT = ("white", "black", "black", "black")


def work(kind: LayoutKind) -> list[list[int]]:
    """Pairs that each rank computes at each step."""
    runs = [Layout(kind, 0, TOKENS, WORLD).runs(rank) for rank in range(WORLD)]
    return [
        [sum(map(pairs, step.tiles)) for step in ring_steps(rank, runs, runs)]
        for rank in range(WORLD)
    ]


def draw(target: Path) -> None:
    """Write the picture."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("drawing needs matplotlib: pip install -e '.[plots]'")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(KINDS), 2, figsize=(10, 5.4), width_ratios=(1.75, 1), layout="constrained"
    )
    most = max(amount for kind in KINDS for steps in work(kind) for amount in steps)
    for (tokens, steps), kind in zip(rows, KINDS, strict=True):
        _draw_tokens(tokens, kind)
        _draw_steps(steps, work(kind), most)
    figure.text(0.005, 0.96, f"The rank that holds each of {TOKENS} tokens", fontsize=13)
    figure.text(0.665, 0.96, "Query-key pairs, rank by step", fontsize=13)
    figure.get_layout_engine().set(wspace=0.05, hspace=0.06, rect=(0, 0, 1, 0.94))
    figure.savefig(target, dpi=110, facecolor="white")


def _draw_tokens(axes: Any, kind: LayoutKind) -> None:
    layout = Layout(kind, 0, TOKENS, WORLD)
    for rank in range(WORLD):
        for position in positions(layout.runs(rank)):
            _cell(axes, position, 0, COLOURS[rank], 1.0)
            _label(axes, position, 0, rank, color=TEXT[rank])
    axes.set(xlim=(0, TOKENS), ylim=(0, 1), yticks=[])
    axes.set_xticks([x + 0.5 for x in range(0, TOKENS, 8)], range(0, TOKENS, 8))
    axes.text(0, 1.35, kind, fontsize=13, fontweight="bold")
    axes.set_aspect(1.8)
    _bare(axes)


def _draw_steps(axes: Any, amounts: list[list[int]], most: int) -> None:
    for rank, steps in enumerate(amounts):
        row = WORLD - 1 - rank
        for step, amount in enumerate(steps):
            _cell(axes, step, row, COLOURS[rank], 0.06 + 0.54 * amount / most)
            _label(axes, step, row, amount)
        _label(axes, WORLD + 0.15, row, sum(steps), fontweight="bold")
    axes.set(xlim=(0, WORLD + 1.15), ylim=(0, WORLD))
    axes.set_xticks(
        [*(step + 0.5 for step in range(WORLD)), WORLD + 0.65],
        [*(f"step {step}" for step in range(WORLD)), "all"],
    )
    axes.set_yticks(
        [WORLD - 0.5 - rank for rank in range(WORLD)], [f"rank {rank}" for rank in range(WORLD)]
    )
    _bare(axes)


def _cell(axes: Any, x: float, y: float, colour: str, opacity: float) -> None:
    from matplotlib.patches import Rectangle

    edges = {"edgecolor": "white", "linewidth": 1.5}
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=(colour, opacity), **edges))


def _label(axes: Any, x: float, y: float, text: int, **style: Any) -> None:
    middle = (x + 0.5, y + 0.48)
    axes.annotate(str(text), middle, ha="center", va="center", fontsize=11, **style)


def _bare(axes: Any) -> None:
    axes.tick_params(length=0, labelsize=11)
    for side in axes.spines.values():
        side.set_visible(False)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("layouts.png"))
