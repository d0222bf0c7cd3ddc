"""RULER's tasks on SmolLM2: exact, and Star Attention by quarters and eighths of the document.

    python -m benchmarks.ruler                       # goes on where it was left
    python -m benchmarks.ruler evaluate.samples=12   # any option of launch.evaluate
    python -m benchmarks.ruler report                # from the samples that are there

It runs the tasks that need no text from outside with `launch.evaluate`, whose samples are lines of
`benchmarks/results/ruler.samples.jsonl` as soon as they are scored, and then writes
`benchmarks/results/DATE-ruler.json`, `.md` and `.png`.  All 40 samples of a cell take more than a
night of two cores; `report` with fewer uses those that every setting has had.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from os.path import relpath
from pathlib import Path
from typing import Any

import torch

from launch import evaluate
from launch.circumstances import circumstances
from launch.evaluate_log import scored_before
from launch.evaluate_picture import draw
from launch.evaluate_plan import Plan, make_plan
from launch.evaluate_result import CellResult, cannot, result_of, results
from launch.faults import Reporter, exit_status
from launch.options import EVALUATE
from ringstar.errors import UserError
from ringstar.evaluation import BY_DEPTH
from ringstar.models import find_model, quiet_transformers

RESULTS = Path(__file__).parent / "results"
REPORT = "report"
OPTIONS = {
    "model": "smollm2",
    "launch.nproc": "2",
    "evaluate.tasks": "niah_single_1,niah_multikey_2,niah_multikey_3,vt,cwe,fwe",
    "evaluate.lengths": "1K,2K,4K,7K",
    "evaluate.samples": "40",
    "evaluate.star": "block_size=1/4",
    "output.path": relpath(RESULTS / "ruler.json"),
}
_PACKAGES = ("torch", "transformers", "wonderwords", "scipy", "ringstar")
_HOW = """Every setting got the same samples. Exact is Ring Attention, on one rank dense attention;
star has blocks of the size that is named behind anchors: shares are of the document, and an
anchor is as long as a block if nothing else is said.
Scores in per cent with Wilson's 95% intervals; *of exact's* is star's mean over exact's with its
95% interval, p that of a paired test on the same samples, for each row alone
([how](../../docs/evaluate.md#what-is-computed)). Word lists and prompt format are not those of
published runs: put no score beside a published one."""


def main(arguments: list[str]) -> int:
    """Run what is left, then report; returns the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nIts options are those of `python -m launch.evaluate --help`.")
        return 0
    given = [argument for argument in arguments if argument != REPORT]
    options = command_options(given)
    if REPORT not in arguments and (status := evaluate.main(options)) != 0:
        return status
    return exit_status(lambda: _report(options, given), Reporter())


def _report(options: Sequence[str], given: Sequence[str]) -> int:
    quiet_transformers()
    report(options, " ".join(["python -m benchmarks.ruler", *given]), RESULTS)
    return 0


def command_options(given: Sequence[str]) -> list[str]:
    """Those of `launch.evaluate`: ours, unless others are given."""
    keys = {argument.partition("=")[0] for argument in given}
    ours = [f"{key}={value}" for key, value in OPTIONS.items() if key not in keys]
    if "evaluate.star" not in keys:
        ours.append("evaluate.star=block_size=1/8")
    return [*ours, *given]


def report(options: Sequence[str], command: str, folder: Path) -> None:
    """`DATE-ruler.json`, `.md` and `.png` of the samples that are there."""
    config = EVALUATE.parse(options)
    files = find_model(config.model, config.rope)
    plan = make_plan(config, files)
    lines = scored_before(config, plan)
    found = results(plan, lines)
    of_tasks = [row for row in found if row.task != BY_DEPTH]
    if not of_tasks:
        why = "no cell of a task has a sample that all settings have had"
        raise UserError("output.path", config.output.path, why)
    where = circumstances(command, _PACKAGES)
    where["settings"] = _settings(lines)
    path = folder / f"{where['date']}-ruler"
    content = {"circumstances": where, **result_of(config, files, plan, found)}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(document(plan, found, where, files.name))
    path.with_suffix(".png").write_bytes(draw(plan, of_tasks, files.name))
    print(f"written: {path}.json, .md and .png")


def _settings(lines: Sequence[Any]) -> list[dict[str, Any]]:
    """What ranks, dtype and kernel the samples were scored with, each once."""
    names = ("world_size", "transport", "kernel", "dtype", "device")
    seen = {tuple(asdict(line)[name] for name in names) for line in lines}
    return [dict(zip(names, values, strict=True)) for values in sorted(seen)]


def document(plan: Plan, found: Sequence[CellResult], where: dict[str, Any], model: str) -> str:
    """The whole report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    ranks = "; ".join(
        f"{s['world_size']} ranks over {s['transport']}, {s['dtype']}" for s in where["settings"]
    )
    title = f"# RULER's tasks, {model}, {where['date']}"
    made = f"`{where['command']}` at {where['commit']} on {where['hardware']}; {versions}; {ranks}."
    parts = [title, made, _HOW, f"![scores]({where['date']}-ruler.png)"]
    for length in sorted({row.length for row in found}):
        rows = [row for row in found if row.length == length]
        parts += [f"## {length:,} tokens", table(plan, rows)]
    failed = [f"{row.task} at {row.length:,}" for row in cannot(found)]
    if failed:
        parts.append(f"Exact scores next to nothing, the model cannot do: {', '.join(failed)}.")
    return "\n\n".join(parts) + "\n"


def table(plan: Plan, rows: Sequence[CellResult]) -> str:
    """One length as Markdown."""
    exact, *stars = [star.label for star in plan.contenders]
    head = ["task", "samples", exact, *(h for label in stars for h in (label, "of exact's", "p"))]
    by_task: dict[tuple[str, float | None], list[CellResult]] = {}
    for row in rows:
        by_task.setdefault((row.task, row.depth), []).append(row)
    body = [
        [task if depth is None else f"{task}, {100 * depth:.4g}%", str(cells[0].samples)]
        + [text for cell in cells for text in _cells(cell)]
        for (task, depth), cells in by_task.items()
    ]
    return "\n".join(f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *body))


def _cells(row: CellResult) -> list[str]:
    score = f"{row.mean:.0%} ({row.low:.0%} to {row.high:.0%})"
    if row.retention is None or not row.can:
        return [score] if row.worse is None else [score, "exact near 0", ""]
    high = "" if row.retention_high is None else f"{row.retention_high:.0%}"
    return [score, f"{row.retention:.0%} ({row.retention_low:.0%} to {high})", f"{row.p:.2g}"]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main(sys.argv[1:]))
