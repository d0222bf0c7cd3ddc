"""What every benchmark shares: repeated CPU timing, and where and with what it was done."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

WARM_UPS, REPEATS = 2, 5
MEDIANS = f"medians of {REPEATS} after {WARM_UPS} warm-ups"
_PACKAGES = ("torch", "transformers", "ring-attention-pytorch", "ringstar")


def cpu_seconds(
    work: Callable[[], Any],
    before: Callable[[], Any] = lambda: None,
    *,
    warm_ups: int = WARM_UPS,
    repeats: int = REPEATS,
) -> dict[str, list[float]]:
    """CPU and wall seconds of `work` in this process, `repeats` times after `warm_ups`.

    `before` runs untimed each time: a barrier, so that ranks start together.
    """
    cpu, wall = [], []
    for repeat in range(warm_ups + repeats):
        before()
        cpu_started, wall_started = time.process_time(), time.perf_counter()
        work()
        if repeat >= warm_ups:
            cpu.append(time.process_time() - cpu_started)
            wall.append(time.perf_counter() - wall_started)
    return {"cpu": cpu, "wall": wall}


def over_ranks(ranks: list[dict[str, list[float]]]) -> dict[str, float]:
    """Medians over repeats of the ranks' CPU time together, and of the slowest one's wall time."""
    total = [sum(times) for times in zip(*(rank["cpu"] for rank in ranks), strict=True)]
    slowest = [max(times) for times in zip(*(rank["wall"] for rank in ranks), strict=True)]
    return {"cpu_s": statistics.median(total), "wall_s": statistics.median(slowest)}


def circumstances(command: str, packages: Sequence[str] = _PACKAGES) -> dict[str, Any]:
    """Command, versions of those of `packages` that are installed, hardware, commit and date."""
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "versions": {name: version for name in packages if (version := _version(name))}
        | {"python": platform.python_version()},
        "hardware": f"{os.cpu_count()} cores of {_processor()}",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    """Of the repository that is run; a copy without git's folder has none to tell."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
