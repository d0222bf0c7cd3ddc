"""Where and with what something was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "ring-attention-pytorch", "ringstar")


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
    facts = Path("/proc/cpuinfo")
    for line in facts.read_text().splitlines() if facts.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    """Of the repository that this file is in; a copy without git's folder has none to tell."""
    here = Path(__file__)
    for asked in (
        ["ls-files", "--error-unmatch", here.name],
        ["describe", "--always", "--dirty", "--exclude=*"],
    ):
        try:
            done = subprocess.run(
                ["git", *asked], cwd=here.parent, capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return "unknown"
        if done.returncode:
            return "unknown"
    return done.stdout.strip()
