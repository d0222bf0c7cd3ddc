"""The results of a run: a compact table for people, and everything as JSON."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.timing import Row, Section
from launch.circumstances import circumstances

PACKAGES = (
    *("torch", "triton", "transformers", "ringstar", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
    *("flash-attn", "flash-attn-4", "fa3-fwd", "flashinfer-python"),
)
MOST_CHARACTERS = 9_900
_NOTE_CHARACTERS = 220


def where(command: str) -> Row:
    """Command, versions, hardware, commit and date, the card and its driver among them."""
    found = circumstances(command, PACKAGES)
    found["hardware"] = f"{card()}, driver {driver()}; {found['hardware']}"
    found["versions"] |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    found["system"] = platform.platform()
    return found


def card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def driver() -> str:
    """The driver's version, as nvidia-smi says it."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().partition("\n")[0] or "unknown"


def write(path: Path, results: Row, sections: Sequence[Section]) -> None:
    """`path`.json and `path`.md, as far as the run has come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = results | {"sections": {s.name: as_dict(s) for s in sections}}
    path.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    path.with_suffix(".md").write_text(document(results, sections))


def as_dict(section: Section) -> Row:
    return {
        "what": section.what,
        "facts": section.facts,
        "rows": section.rows,
        "failed": section.failed,
        "skipped": section.skipped,
    }


def document(results: Row, sections: Sequence[Section]) -> str:
    """The whole run as Markdown."""
    at = results["circumstances"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    return (
        f"# GPU benchmarks, {at['date']}\n\n`{at['command']}` at {at['commit']} on"
        f" {at['hardware']}; {versions}. {results['seconds']:.0f} s in all.\n\n"
        "Medians of CUDA events after warm-up, random data, inputs rotated past the L2.\n\n"
        + table(sections, MOST_CHARACTERS)
    )


def table(sections: Sequence[Section], most: int = MOST_CHARACTERS) -> str:
    """Every section in few characters; notes are cut before figures are."""
    text = "\n".join(_section(section, _NOTE_CHARACTERS) for section in sections)
    if len(text) > most:
        text = "\n".join(_section(section, 90) for section in sections)
    return text if len(text) <= most else text[: most - 40].rpartition("\n")[0] + "\n(cut)\n"


def _section(section: Section, note_characters: int) -> str:
    show = _TABLES.get(section.name, _plain)
    lines = [f"## {section.name}: {section.what}", "", *show(section)]
    for why, cells in section.failed.items():
        lines.append(_cut(f"- {len(cells)} failed ({why}): {'; '.join(cells)}", note_characters))
    if section.skipped:
        skipped = f"- {len(section.skipped)} skipped: {'; '.join(section.skipped)}"
        lines.append(_cut(skipped, note_characters))
    return "\n".join([*lines, ""])


def _cut(line: str, most: int) -> str:
    return line if len(line) <= most else line[: most - 1] + "…"


# -- tables ------------------------------------------------------------------------------


def _markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return [f"|{'|'.join(line)}|" for line in lines] + [""]


def _plain(section: Section) -> list[str]:
    """Rows as they are, numbers to three digits."""
    if not section.rows:
        return ["(nothing measured)", ""]
    head = list(dict.fromkeys(key for row in section.rows for key in row))
    return _markdown(head, ([number(row.get(key)) for key in head] for row in section.rows))


def number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def pivot(rows: Sequence[Row], cell: Callable[[Row], str]) -> list[str]:
    """A line for each case, a column for each back end."""
    names = list(dict.fromkeys(row["backend"] for row in rows))
    cases: dict[str, dict[str, str]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["backend"]] = cell(row)
    lines = ([case, *(of.get(name, "") for name in names)] for case, of in cases.items())
    return _markdown(["", *names], lines)


def _encode(section: Section) -> list[str]:
    """TFLOP/s by case; then each back end over its cases of head dim 128, if there are any."""
    rows = [row for row in section.rows if row["case"].startswith("d128 ")] or section.rows
    return [
        *pivot(section.rows, lambda row: f"{row['TFLOP/s']:.0f}"),
        *_markdown(
            ["d128, median (range)", "of matmul", "of best other", "worst error", "of best error"],
            ([name, *_summary(of)] for name, of in _by_backend(rows).items()),
        ),
    ]


def _summary(rows: list[Row]) -> list[str]:
    """Medians and extremes over the cases of one back end."""
    others = [row["of best other"] for row in rows if row["of best other"]]
    errors = [row["error"] / row["best other error"] for row in rows if row["best other error"]]
    return [
        spread([row["of matmul"] for row in rows]),
        spread(others),
        f"{max(row['error'] for row in rows):.1e}",
        f"{max(errors):.2f}" if errors else "",
    ]


def spread(values: Sequence[float]) -> str:
    """Median, least and most."""
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _by_backend(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["backend"], []).append(row)
    return found


def _decode(section: Section) -> list[str]:
    """The share of the copy's GB/s, and for one-row errors the worst of each back end."""
    errors = (
        f"{name} {max(found):.1e}"
        for name, rows in _by_backend(section.rows).items()
        if (found := [row["error"] for row in rows if row["error"] is not None])
    )
    lines = pivot(section.rows, lambda row: f"{row['of copy']:.2f}")
    return [*lines, f"Share of the copy's GB/s. Worst error: {', '.join(errors)}.", ""]


def _ratios(section: Section) -> list[str]:
    return pivot(section.rows, lambda row: f"{row['ratio']:.2f}")


_TABLES: dict[str, Callable[[Section], list[str]]] = {
    "encode": _encode,
    "decode": _decode,
    "into": _ratios,
    "questions": _ratios,
}
