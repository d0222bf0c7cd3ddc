"""An evaluation as heat maps: tasks by length, and needles by depth and length."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from launch.evaluate_plan import Plan
from launch.evaluate_result import CellResult
from launch.evaluate_star import EXACT
from launch.evaluate_tables import name_of


def draw(plan: Plan, rows: Sequence[CellResult], title: str) -> bytes:
    """A panel for each contender: rows down, lengths across; as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name_of(row) for row in rows))
    lengths = sorted({row.length for row in rows})
    panels = len(plan.contenders)
    width = max(2.6, 0.9 * len(lengths) + 0.4)
    figure, axes = pyplot.subplots(
        1,
        panels,
        figsize=(1.6 + width * panels + 0.8, 1.5 + 0.42 * len(names)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis, star in zip(axes[0], plan.contenders, strict=True):
        drawn = _draw_panel(
            axis, [row for row in rows if row.strategy == star.label], names, lengths
        )
        axis.set_title(star.label)
    figure.colorbar(drawn, ax=axes, label="score, %", shrink=0.9)
    figure.supxlabel("tokens of prompt and answer")
    figure.suptitle(title)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    pyplot.close(figure)
    return content.getvalue()


def _draw_panel(
    axis: Any, rows: Sequence[CellResult], names: Sequence[str], lengths: Sequence[int]
) -> Any:
    """Scores as colours and figures; a word where exact scores next to nothing."""
    scores = {(name_of(row), row.length): row for row in rows}
    grid = [
        [
            100 * scores[at].mean if (at := (name, length)) in scores else math.nan
            for length in lengths
        ]
        for name in names
    ]
    mesh = axis.pcolormesh(grid, cmap="viridis", vmin=0, vmax=100, edgecolors="white", linewidth=2)
    for y, name in enumerate(names):
        for x, length in enumerate(lengths):
            row = scores.get((name, length))
            if row is None:  # no sample yet
                continue
            dark = row.mean < 0.6
            text = f"{100 * row.mean:.0f}" if row.can or row.strategy != EXACT else "cannot"
            axis.text(
                x + 0.5,
                y + 0.5,
                text,
                ha="center",
                va="center",
                color="white" if dark else "black",
                fontsize=9,
            )
    axis.set_yticks([y + 0.5 for y in range(len(names))], names)
    axis.set_xticks([x + 0.5 for x in range(len(lengths))], [f"{n:,}" for n in lengths])
    if not axis.yaxis_inverted():
        axis.invert_yaxis()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return mesh
