"""What the machine can do at most, and what the model needs at least.

Started by `python -m launch.bench` in a process of its own.
"""

from __future__ import annotations

from launch.interrupts import quiet_interrupts

if __name__ == "__main__":  # the imports below take seconds
    quiet_interrupts()

import time
from collections.abc import Callable
from typing import Any

import torch

from launch.bench.cells import Ceilings, add_line
from launch.bench.plan import own_device
from launch.bench.ranks import check_request
from launch.options import BENCH
from launch.start import RankCommand, run_program
from ringstar.config import BenchConfig
from ringstar.models import choose_dtype
from ringstar.models.work import work_of
from ringstar.ranks import usable_cores

# elements on a side of the product; bytes that are read
_SIDE, _BYTES = 4096, 2**30
_ENOUGH_S = 1.0


def flops_per_s(dtype: torch.dtype, device: torch.device, side: int = _SIDE) -> float:
    """The best of a second of square products."""
    side *= 2 if device.type == "cuda" else 1
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best_seconds(lambda: a @ b, device)


def bytes_per_s(dtype: torch.dtype, device: torch.device, nbytes: int = _BYTES) -> float:
    """The best of a second of products with a vector, which read a matrix once."""
    nbytes *= 2 if device.type == "cuda" else 1
    columns = 4096
    matrix = torch.randn(nbytes // dtype.itemsize // columns, columns, device=device).to(dtype)
    vector = torch.randn(columns, device=device).to(dtype)
    return matrix.nbytes / _best_seconds(lambda: matrix @ vector, device)


def _best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    found: list[float] = []
    ends = time.perf_counter() + _ENOUGH_S
    while not found or time.perf_counter() < ends:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found)


def run_rank(config: BenchConfig, _: Any) -> None:
    """All of it, as one line."""
    files, _ = check_request(config)
    device = own_device()
    torch.set_num_threads(usable_cores())
    dtype, _ = choose_dtype(config.model, files.config, device)
    work = work_of(files.load(config.model, dtype, device))
    assert config.bench.cells is not None
    found = Ceilings(
        flops_per_s(dtype, device),
        bytes_per_s(dtype, device),
        max(1, torch.cuda.device_count()),
        work,
    )
    add_line(config.bench.cells, found)


COMMAND = RankCommand(
    "launch.bench.ceilings", BENCH.parse, check_request, run_rank, lambda: __doc__ or ""
)

if __name__ == "__main__":
    run_program(COMMAND.main)
