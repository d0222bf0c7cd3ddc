"""Draw which keys each query sees in an exact encode and in Star Attention's phase 1.

    python docs/draw_star.py [FILE.png]

Everything comes from the plans that the runtime itself uses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from draw_layouts import COLOURS

from localflash import pieces
from seqpar import Layout, Tile, positions, ring_steps
from starattn import Blocks, make_blocks, plan_passes

WORLD, TOKENS = 4, 32
Pair = tuple[int, int]


def exact_pairs(rank: int) -> Iterator[Pair]:
    """Positions (query, key) that `rank` of a ring computes."""
    runs = [Layout("contiguous", 0, TOKENS, WORLD).runs(other) for other in range(WORLD)]
    for step in ring_steps(rank, runs, runs):
        yield from _pairs(step.tiles, positions(runs[rank]), positions(runs[step.source]))


def star_pairs(blocks: Blocks, rank: int) -> Iterator[Pair]:
    """Positions (query, key) that `rank` computes in phase 1, its anchor shared."""
    anchor = list(range(blocks.anchor))
    for step in plan_passes(blocks, rank, "world", anchor_is_head=True, chunk_tokens=TOKENS):
        own = positions(step.kept)
        yield from _pairs(step.new, own, own)
        yield from _pairs(step.anchor, own, anchor)


def _pairs(tiles: tuple[Tile, ...], queries: list[int], keys: list[int]) -> Iterator[Pair]:
    for tile in tiles:
        q, k = queries[tile.q], keys[tile.k]
        for piece in pieces(len(q), len(k), tile.band):
            for row, query in enumerate(q[piece.q]):
                seen = k[piece.k]
                for key in seen if piece.kind == "full" else seen[: row + 1]:
                    yield query, key


def draw(target: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(10, 3.7), layout="constrained")
    wide, narrow = make_blocks(TOKENS, WORLD), make_blocks(TOKENS, WORLD, 4, 4)
    _panel(panels[0], "exact (ring)", [list(exact_pairs(rank)) for rank in range(WORLD)])
    _panel(panels[1], "star, 4 blocks", [list(star_pairs(wide, rank)) for rank in range(WORLD)])
    _panel(panels[2], "star, 8 blocks", [list(star_pairs(narrow, rank)) for rank in range(WORLD)])
    panels[0].set_ylabel("query", fontsize=11)
    figure.savefig(target, dpi=110, facecolor="white")


def _panel(axes: Any, title: str, ranks: list[list[Pair]]) -> None:
    from matplotlib.patches import Rectangle

    for rank, seen in enumerate(ranks):
        for query, key in seen:
            axes.add_patch(Rectangle((key, query), 1, 1, facecolor=COLOURS[rank], linewidth=0))
    axes.set(xlim=(0, TOKENS), ylim=(TOKENS, 0), aspect=1)
    axes.set_xticks(range(0, TOKENS + 1, 8))
    axes.set_yticks(range(0, TOKENS + 1, 8))
    total = sum(map(len, ranks))
    axes.set_title(f"{title}: {total} pairs", fontsize=12, fontweight="bold")
    axes.set_xlabel("key", fontsize=11)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("star.png"))
