"""A comparison as a picture: needles and passages by depth, and the time of an encode."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from launch.compare_measure import Measured
from launch.compare_plan import Plan
from launch.compare_result import mean, recall_by_depth

# Okabe and Ito's colours, told apart without red and green; black is exact
_COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS, _LINES = "osD^vPX", ("-", "--", "-.", ":")
_LEAST_KL = 1e-9  # a logarithmic axis has no 0; rounding alone is about as much


def draw(plan: Plan, found: Sequence[Measured]) -> bytes:
    """The picture, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[Callable[[Any, Plan, Sequence[Measured]], None]] = []
    panels += [_draw_recall] if plan.haystacks else []
    panels += [_draw_kl] if plan.passages else []
    panels += [_draw_time]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 4.4), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        panel(axis, plan, found)
        axis.spines[["top", "right"]].set_visible(False)
    _draw_legend(figure, found)
    figure.suptitle(f"exact and star on the same document, {len(plan.document):,} tokens")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    pyplot.close(figure)
    return content.getvalue()


def _look(number: int) -> dict[str, Any]:
    """How a setting is drawn everywhere: colour, marker and line tell it apart."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _LINES[number % len(_LINES)],
    }


def _draw_recall(axis: Any, plan: Plan, found: Sequence[Measured]) -> None:
    """A square for each setting and depth: the darker, the more trials found the needle."""
    trials, depths = len(plan.haystacks), [needle.depth for needle in plan.haystacks[0].needles]
    recall = [recall_by_depth(seen) for seen in found]
    # 2: so light that black text stays legible
    axis.pcolormesh(recall, cmap="Blues", vmin=0, vmax=2, edgecolors="white", linewidth=2)
    axis.invert_yaxis()
    for row, shares in enumerate(recall):
        for column, share in enumerate(shares):
            axis.text(column + 0.5, row + 0.5, f"{share:.0%}", ha="center", va="center")
    axis.set_title("planted needles that are found" + f" ({trials} trials)" * (trials > 1))
    axis.set_yticks(
        [row + 0.5 for row in range(len(found))], [seen.setting.label for seen in found]
    )
    axis.set_xticks([n + 0.5 for n in range(len(depths))], [f"{100 * d:.0f}" for d in depths])
    axis.set_xlabel("depth in the document, %")


def _draw_kl(axis: Any, plan: Plan, found: Sequence[Measured]) -> None:
    depths = [100 * passage.depth for passage in plan.passages]
    for number, seen in enumerate(found[1:], 1):
        values = [max(mean(of.kl) or 0.0, _LEAST_KL) for of in seen.of_passages]
        axis.plot(depths, values, **_look(number))
    axis.set_title("passages of the document, quoted")
    axis.set_xlim(0, 100)
    axis.set_xlabel("depth in the document, %")
    axis.set_yscale("log")
    axis.set_ylabel(f"KL(exact ‖ star), nats a token (at least {_LEAST_KL:g})")
    axis.grid(axis="y", alpha=0.3)


def _draw_time(axis: Any, plan: Plan, found: Sequence[Measured]) -> None:
    times = [seen.encode_s for seen in found]
    bars = axis.bar(range(len(found)), times, color=[_look(n)["color"] for n in range(len(found))])
    axis.bar_label(bars, [f"{seconds:.2f}\n({seconds / times[0]:.2f})" for seconds in times])
    axis.margins(y=0.12)
    axis.set_title("time to encode the document")
    axis.set_xticks([])
    axis.set_xlabel("settings, in the order of the legend")
    axis.set_ylabel("seconds (share of exact's)")


def _draw_legend(figure: Any, found: Sequence[Measured]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], **_look(number)) for number in range(len(found))]
    names = [seen.setting.label for seen in found]
    figure.legend(lines, names, loc="outside lower center", ncols=min(4, len(found)), frameon=False)
