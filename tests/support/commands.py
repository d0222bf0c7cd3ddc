"""The command line in processes of its own, and what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# two simulated ranks with a thread each
THREADS = ["transport=threads", "transport.world_size=2", "transport.threads_per_rank=1"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def environment(**more: str) -> dict[str, str]:
    """That of this process, in which `python` finds our packages in any folder."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), **more}


def python(*arguments: str, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess:
    """`python ARGUMENTS...`, as one starts it in a shell; text in, text out."""
    options = {"env": environment(), "capture_output": True, "text": True, **options}
    return subprocess.run([sys.executable, *arguments], timeout=timeout, **options)


def json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]
