"""A benchmark as a picture: times and throughput against length, with their ceilings."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from launch.bench.result import REFERENCES, Row, by_key

# Okabe and Ito's colours, told apart without red and green
_OURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_PEERS = ("#000000", "#777777", "#E69F00", "#56B4E9")
_MARKERS = "osD^vPX*"
_PANELS: dict[str, tuple[str, str, Callable[[Row], float]]] = {
    "ttft": ("time to first token, s", "floor", lambda row: row["median_ttft_ms"] / 1e3),
    "tpot": ("time per output token, ms", "floor", lambda row: row["median_tpot_ms"]),
    "tokens": (
        "prompt tokens a second",
        "ceiling",
        lambda row: row["batch"] * row["length"] / row["median_prompts_ms"] * 1e3,
    ),
}


def draw(result: dict[str, Any]) -> bytes:
    """The picture, as PNG: a row for each batch, a panel for each quantity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(by_key(result).values())
    batches = sorted({row["batch"] for row in rows}) or [1]
    figure, axes = pyplot.subplots(
        len(batches),
        len(_PANELS),
        figsize=(4.6 * len(_PANELS), 3.6 * len(batches) + 0.8),
        layout="constrained",
        squeeze=False,
    )
    styles = _styles(rows)
    shown: dict[str, Any] = {}
    for line, batch in zip(axes, batches, strict=True):
        here = [row for row in rows if row["batch"] == batch]
        for axis, name in zip(line, _PANELS, strict=True):
            _draw(axis, name, here, styles)
            axis.set_title(_PANELS[name][0] + f", batch {batch}" * (len(batches) > 1))
            handles, labels = axis.get_legend_handles_labels()
            shown |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(shown.values()), list(shown), loc="outside lower center", ncols=4, frameon=False
    )
    where = f"{result['model']}, {result['dtype']}, {result['circumstances']['hardware']}"
    figure.suptitle(where if result["device"] == "cpu" else f"{where}, {result['device']}")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    pyplot.close(figure)
    return content.getvalue()


def _styles(rows: list[Row]) -> dict[tuple[str, int], dict[str, str]]:
    """How each contender is drawn, in all panels alike."""
    lines = list(dict.fromkeys((row["contender"], row["world"]) for row in rows))
    peers = sorted({who for who, _ in lines if who in REFERENCES})
    ours = sorted({who for who, _ in lines if who not in REFERENCES})
    found = {}
    for number, (who, world) in enumerate(lines):
        is_peer = who in REFERENCES
        colours, place = (_PEERS, peers.index(who)) if is_peer else (_OURS, ours.index(who))
        found[who, world] = {
            "color": colours[place % len(colours)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linestyle": "--" if is_peer else "-",
            "label": who if is_peer else f"{who}, {world} rank" + "s" * (world > 1),
        }
    return found


def _draw(
    axis: Any, name: str, rows: list[Row], styles: dict[tuple[str, int], dict[str, str]]
) -> None:
    _, ceiling, value = _PANELS[name]
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["contender"], row["world"]), []).append(row)
    for key, points in lines.items():
        points.sort(key=lambda row: row["length"])
        lengths = [row["length"] for row in points]
        axis.plot(lengths, [value(row) for row in points], **styles[key])
    _draw_ceiling(axis, name, rows, ceiling)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sorted({row["length"] for row in rows}), minor=False)
    axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axis.set_xlabel("tokens of the prompt")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_ceiling(axis: Any, name: str, rows: list[Row], label: str) -> None:
    """What no exact contender can pass, on the most devices that were measured."""
    timed = "tpot" if name == "tpot" else "ttft"
    floors = {(row["length"], row.get(f"floor_{timed}_ms")) for row in rows}
    least: dict[int, float] = {}
    for length, floor in floors:
        if floor:
            least[length] = min(floor, least.get(length, floor))
    if not least:
        return
    lengths = sorted(least)
    shown = {
        "ttft": lambda length: least[length] / 1e3,
        "tpot": lambda length: least[length],
        "tokens": lambda length: rows[0]["batch"] * length / least[length] * 1e3,
    }[name]
    axis.plot(lengths, [shown(n) for n in lengths], color="#999999", linestyle=":", linewidth=2)
    middle = lengths[len(lengths) // 2]
    axis.annotate(
        f"the machine's {label}",
        (middle, shown(middle)),
        color="#666666",
        textcoords="offset points",
        xytext=(0, -12),
        ha="center",
        fontsize=8,
    )
