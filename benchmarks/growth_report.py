"""What the growth of cost says: fitted exponents beside those of the plans, and a picture.

An exponent is the slope of a least-squares line through logarithms.  Theory is the slope of the
same fit through what the plans say at the same points: a cost with a part that does not grow has
no whole number, and nobody has to guess where that part stops to matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = {"ring": "#0072B2", "star": "#D55E00"}
MARKERS = {"attention": "o", "model": "s"}
QUANTITIES = {"cpu": "CPU seconds, all ranks", "peak": "peak bytes", "sent": "sent bytes"}
# how far an exponent may be from theory
ALLOWED = {"cpu": 0.10, "peak": 0.05, "sent": 0.05}

Point = dict[str, Any]


def exponent(grows: list[int], values: list[float]) -> float | None:
    """The slope of log(values) over log(grows); None if something is 0."""
    if min(values) <= 0:
        return None
    return float(np.polyfit(np.log(grows), np.log(values), 1)[0])


def grown(name: str, points: list[Point]) -> list[int]:
    """What grows in a sweep: tokens, or ranks."""
    return [point["tokens" if name.startswith("length") else "world"] for point in points]


def measured(quantity: str, point: Point) -> float:
    """CPU of all ranks together; bytes of the rank that has most."""
    return {
        "cpu": lambda: point["cpu_s"],
        "peak": lambda: point["peak_bytes"],
        "sent": lambda: max(point["sent_bytes"]),
    }[quantity]()


def theory(quantity: str, point: Point) -> float:
    """The same of the plan: operations stand for CPU time."""
    plan = point["planned"]
    return {
        "cpu": lambda: plan["flops"],
        "peak": lambda: point["planned_peak_bytes"],
        "sent": lambda: max(plan["sent"]),
    }[quantity]()


def fits(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each sweep and quantity: fitted and planned exponents, and the range over repeats of CPU."""
    for name, points in part["sweeps"].items():
        for quantity in QUANTITIES:
            kept = [p for p in points if theory(quantity, p)]  # one rank sends nothing
            if len(kept) < 2:
                continue
            yield _fit(name, quantity, kept)


def _fit(name: str, quantity: str, points: list[Point]) -> dict[str, Any]:
    grows = grown(name, points)
    found, planned = (
        exponent(grows, [value(quantity, point) for point in points])
        for value in (measured, theory)
    )
    assert found is not None and planned is not None
    # of an exponent of 0 no share can be taken
    far = abs(found - planned) / max(1.0, abs(planned))
    row: dict[str, Any] = {"sweep": name, "quantity": quantity, "fitted": found, "theory": planned}
    row |= {"within": far <= ALLOWED[quantity], "difference": far}
    if quantity == "cpu":
        repeats = zip(*(point["cpu_s_repeats"] for point in points), strict=True)
        each = [exponent(grows, list(times)) for times in repeats]
        row["range"] = [min(each), max(each)]  # type: ignore[type-var]
    return row


def to_the_byte(part: dict[str, Any]) -> bool:
    """Whether every rank of every job sent and kept exactly what its plan says."""
    points = [point for line in part["sweeps"].values() for point in line]
    return all(
        point["sent_bytes"] == point["planned"]["sent"]
        and point["kv_bytes"] == point["planned"]["kv"]
        for point in points
    )


def table(part: dict[str, Any]) -> str:
    """Markdown: exponents, then what they were fitted through."""
    lines = [
        f"## growth: {part['what']}",
        "",
        "| grows | of | by | quantity | exponent | theory | difference | repeats |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in fits(part):
        grows, work, strategy = row["sweep"].split(", ")
        low, high = row.get("range", (None, None))
        spread = f"{low:.2f} to {high:.2f}" if low is not None else ""
        mark = "" if row["within"] else " (!)"
        lines.append(
            f"| {grows} | {work} | {strategy} | {QUANTITIES[row['quantity']]} |"
            f" **{shown(row['fitted'], 3)}** | {shown(row['theory'], 3)} |"
            f" {row['difference']:.1%}{mark} |"
            f" {spread} |"
        )
    exact = "every one" if to_the_byte(part) else "NOT every one"
    lines += ["", f"Sent and kept bytes of each rank and job, as planned to the byte: {exact}.", ""]
    lines += ["| | tokens | ranks | CPU s | peak bytes | sent bytes | Gflop of the plan |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, points in part["sweeps"].items():
        for point in points:
            values = [measured(quantity, point) for quantity in QUANTITIES]
            lines.append(
                f"| {name} | {point['tokens']:,} | {point['world']} | {values[0]:.3f} |"
                f" {values[1]:,} | {values[2]:,} | {point['planned']['flops'] / 1e9:.1f} |"
            )
    return "\n".join([*lines, ""])


def shown(value: float, digits: int) -> str:
    """A number for people, who do not write −0."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def draw(part: dict[str, Any], target: Path) -> None:
    """A column for each quantity, a row for what grows; lines are the plan's, scaled to fit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        2, len(QUANTITIES), figsize=(13, 7.5), layout="constrained", squeeze=False
    )
    for panels, grows in zip(rows, ("length", "ranks"), strict=True):
        lines = {n: p for n, p in part["sweeps"].items() if n.startswith(grows)}
        for axes, quantity in zip(panels, QUANTITIES, strict=True):
            _panel(axes, quantity, lines)
            label = "tokens of the document" if grows == "length" else "ranks, each with its share"
            axes.set(xscale="log", yscale="log", xlabel=label, title=QUANTITIES[quantity])
            axes.set_xticks(*_ticks(lines))
            axes.minorticks_off()
            axes.legend(fontsize=7)
    figure.suptitle("Cost of an encode: marks are measured, lines are the plan's", fontsize=11)
    figure.savefig(target, dpi=80, facecolor="white")


def _ticks(lines: dict[str, list[Point]]) -> tuple[list[int], list[str]]:
    places = sorted({place for name, points in lines.items() for place in grown(name, points)})
    return places, [f"{p // 1024}K" if p >= 1024 else str(p) for p in places]


def _panel(axes: Any, quantity: str, lines: dict[str, list[Point]]) -> None:
    for name, points in lines.items():
        _, work, strategy = name.split(", ")
        kept = [point for point in points if theory(quantity, point)]
        if not kept:
            continue
        grows, scale = grown(name, kept), _scale(quantity, kept)
        found, planned = ([value(quantity, p) for p in kept] for value in (measured, theory))
        slope = exponent(grows, found)
        label = f"{strategy}, {work}: {shown(slope or 0.0, 2)}"
        axes.plot(grows, [scale * value for value in planned], "-", color=COLOURS[strategy], lw=1)
        axes.plot(grows, found, MARKERS[work], color=COLOURS[strategy], label=label, mfc="white")


def _scale(quantity: str, points: list[Point]) -> float:
    """From the plan's unit to the measured one: the geometric mean of their ratios."""
    ratios = [measured(quantity, point) / theory(quantity, point) for point in points]
    return float(np.exp(np.mean(np.log(ratios))))
