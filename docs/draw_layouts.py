"""Draw which rank holds which tokens, and how much each rank computes at each ring step.

    python docs/draw_layouts.py [FILE.png]

Everything comes from the layouts and schedules that the runtime itself uses.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from localflash import Band
from seqpar import Layout, LayoutKind, Tile, positions, ring_steps

KINDS: tuple[LayoutKind, ...] = ("contiguous", "striped", "zigzag")
WORLD, TOKENS = 4, 32
# Okabe and Ito's colours, told apart without red and green
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


def pairs(tile: Tile) -> int:
    """Query-key pairs that one kernel call computes."""
    rows, keys = tile.q.stop - tile.q.start, tile.k.stop - tile.k.start
    if tile.band is None:
        return rows * keys
    return sum(_sees(tile.band, i, j) for i in range(rows) for j in range(keys))


def _sees(band: Band, row: int, column: int) -> bool:
    return band.k_start + column * band.k_step <= band.q_start + row * band.q_step


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
        sys.exit("drawing needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(KINDS), 2, figsize=(10, 4.6), width_ratios=(2.3, 1), layout="constrained"
    )
    most = max(max(step for rank in work(kind) for step in rank) for kind in KINDS)
    for (tokens, steps), kind in zip(rows, KINDS, strict=True):
        _draw_tokens(tokens, kind)
        _draw_steps(steps, kind, most)
    rows[0][0].set_title(f"{TOKENS} tokens on {WORLD} ranks", fontsize=11)
    rows[0][1].set_title("work at each ring step", fontsize=11)
    figure.savefig(target, dpi=110)


def _draw_tokens(axes: Any, kind: LayoutKind) -> None:
    layout = Layout(kind, 0, TOKENS, WORLD)
    for rank in range(WORLD):
        for position in positions(layout.runs(rank)):
            axes.add_patch(_cell(position, 0, COLOURS[rank], 1.0))
            middle = (position + 0.5, 0.5)
            axes.annotate(str(rank), middle, ha="center", va="center", color="white", fontsize=9)
    axes.set(xlim=(0, TOKENS), ylim=(0, 1), yticks=[], xticks=range(0, TOKENS + 1, 8))
    axes.set_ylabel(kind, rotation=0, ha="right", va="center", fontsize=11)
    axes.set_aspect(1.6)
    _bare(axes)


def _draw_steps(axes: Any, kind: LayoutKind, most: int) -> None:
    for rank, steps in enumerate(work(kind)):
        for step, amount in enumerate(steps):
            axes.add_patch(_cell(step, WORLD - 1 - rank, COLOURS[rank], amount / most))
            middle = (step + 0.5, WORLD - 0.5 - rank)
            axes.annotate(str(amount), middle, ha="center", va="center", fontsize=9)
    axes.set(xlim=(0, WORLD), ylim=(0, WORLD), xticks=[], yticks=[])
    axes.set_ylabel("ranks", fontsize=9)
    axes.set_xlabel(f"slowest rank {max(map(sum, work(kind)))} pairs", fontsize=9)
    _bare(axes)


def _cell(x: float, y: float, colour: str, share: float) -> Any:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    face = to_rgba(colour, 1.0 if share == 1.0 else 0.08 + 0.8 * share)
    return Rectangle((x, y), 1, 1, facecolor=face, edgecolor="white", linewidth=1.5)


def _bare(axes: Any) -> None:
    axes.tick_params(length=0, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("layouts.png"))
