"""CPU benchmarks, as ratios in one run.

    python -m benchmarks.run [attention] [encode] [decode] [star] [documents] [trace] [growth]

Prints a table and writes `benchmarks/results/DATE-cpu.json` and `.md`, with the names behind
`cpu` if some are given; growth has a picture too.  Takes about 35 minutes on two cores for all.
Leave the machine alone meanwhile.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import attention, documents, growth, growth_report, model, star, trace
from launch.circumstances import circumstances
from ringstar.config import ModelConfig
from ringstar.models import find_model, quiet_transformers

RESULTS = Path(__file__).parent / "results"
TOKENS = 4096


def main(names: list[str]) -> None:
    quiet_transformers()
    folder = str(find_model(ModelConfig(name="smollm2")).folder)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "attention": attention.run,
        "decode": lambda: model.decode(folder, "float32", TOKENS, (2, 4)),
        "encode": lambda: model.encode(folder, "float32", TOKENS, (2, 4)),
        "star": lambda: star.run(folder),
        "documents": lambda: documents.run(folder),
        "trace": lambda: trace.run(folder),
        "growth": growth.run,
    }
    command = " ".join(["python", "-m", "benchmarks.run", *names])
    results: dict[str, Any] = {"circumstances": circumstances(command)}
    for name in names or list(parts):
        results[name] = parts[name]()
        print(table({name: results[name]}), flush=True)
    path = RESULTS / "-".join([results["circumstances"]["date"], "cpu", *names])
    RESULTS.mkdir(exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(document(results))
    if "growth" in results:
        growth_report.draw(results["growth"], path.with_suffix(".png"))
    print(f"written: {path}.json and .md")


def document(results: dict[str, Any]) -> str:
    """The whole run as Markdown."""
    where = results["circumstances"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"# CPU benchmarks, {where['date']}\n\n`{where['command']}` at {where['commit']} on"
        f" {where['hardware']}; {versions}.\n\n"
        + table({name: part for name, part in results.items() if name != "circumstances"})
    )


def table(parts: dict[str, Any]) -> str:
    lines = []
    for name, part in parts.items():
        if name == "growth":
            lines.append(growth_report.table(part))
            continue
        lines += [f"## {name}: {part['what']}", "", "| | CPU s | wall s |", "|---|---|---|"]
        for row, value in part.items():
            if isinstance(value, dict):
                cpu, wall = value.values()
                lines.append(f"| {row} | {cpu:.4g} | {wall:.4g} |")
            elif row != "what":
                lines.append(f"| **{row}** | **{value:.2f}** | |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
