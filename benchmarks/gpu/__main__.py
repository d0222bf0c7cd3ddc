"""python -m benchmarks.gpu: what one NVIDIA GPU does with this code, in minutes."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import ceilings, decode, encode, merging, model, report, ring
from benchmarks.gpu.timing import Bench, Budget, DeviceLost, EventTimer, Row, Section

Parts = Mapping[str, tuple[float, Callable[[Bench], Section]]]
RESULTS = Path(__file__).parent.parent / "results"
RESERVED_S = 20.0  # imports before the first measurement, and the cell that runs late
NEEDS_GPU = "benchmarks.gpu: needs an NVIDIA GPU, and PyTorch sees none here"
# in the order in which they run, each with its part of the minutes: what one leaves, others have
SHARES: Parts = {
    "merge": (0.05, merging.run),
    "encode": (0.34, encode.run),
    "into": (0.05, encode.run_into),
    "decode": (0.24, decode.run),
    "questions": (0.06, decode.run_questions),
    "ring": (0.10, ring.run),
    "model": (0.35, model.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    given = parser().parse_args(words)
    if not torch.cuda.is_available():
        print(NEEDS_GPU)
        return 2
    command = shlex.join(["python", "-m", "benchmarks.gpu", *words])
    bench = Bench("cuda", EventTimer(), Budget(60 * given.minutes - RESERVED_S))
    parts = {name: SHARES[name] for name in SHARES if name in (given.only or SHARES)}
    return measure(bench, parts, 60 * given.minutes, command, given.out)


def measure(
    bench: Bench,
    parts: Parts,
    seconds: float,
    command: str,
    folder: Path,
    ceilings_of: Callable[[Bench], Section] = ceilings.run,
) -> int:
    """The ceilings and then all `parts` of `seconds`; writes what there is after each of them."""
    started = time.monotonic()
    results: Row = {"circumstances": report.where(command), "seconds": 0.0}
    path = folder / f"{results['circumstances']['date']}-gpu"
    sections: list[Section] = []

    def keep(section: Section) -> Section:
        sections.append(section)
        results["seconds"] = time.monotonic() - started
        report.write(path, results, sections)
        print(f"{section.name}: at {results['seconds']:.0f} s", flush=True)
        return section

    lost: DeviceLost | None = None
    try:
        found = keep(ceilings_of(bench)).facts
        bench = replace(bench, copy=found["copy"], matmul=found["matmul"])
        for name, (share, run) in parts.items():
            part = replace(bench, budget=bench.budget.part(share * seconds))
            keep(guarded(name, partial(run, part)))
    except DeviceLost as error:
        lost = error
        keep(error.section)
    print(report.document(results, sections))
    print(f"written: {path}.json and .md")
    if lost:
        print(f"the device was lost, and what had not run was left out: {lost}")
    return 1 if lost else 0


def guarded(name: str, run: Callable[[], Section]) -> Section:
    """A section that fails as a whole is one that says why."""
    section = Section(name, "failed")
    return section.attempt(name, run) or section


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Measure attention kernels, the merge, a simulated ring and a whole model on"
        " one NVIDIA GPU, as shares of what the card can do. Prints a table and writes"
        " DATE-gpu.json and DATE-gpu.md.",
        epilog="Both ceilings (copy, matmul) are always measured first. Sections, in order: "
        + ", ".join(SHARES),
    )
    made.add_argument(
        "--only",
        nargs="+",
        choices=list(SHARES),
        metavar="NAME",
        help="run only these sections: " + ", ".join(SHARES),
    )
    made.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="start nothing that would not end within so many minutes (default: %(default)g)",
    )
    made.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="folder of the two files (default: benchmarks/results)",
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
