"""What the card can do at all: bytes a second through its memory, and bf16 products a second."""

from __future__ import annotations

import torch

from benchmarks.gpu.timing import Bench, Section, random

COPY_BYTES, SIDE = 4 * 2**30, 8192


def copy_bytes(nbytes: int) -> int:
    """Bytes that a copy of `nbytes` moves: read and written."""
    return 2 * nbytes


def matmul_flops(side: int) -> int:
    return 2 * side**3


def run(bench: Bench, nbytes: int = COPY_BYTES, side: int = SIDE) -> Section:
    """Both ceilings; `facts` holds them as `copy` (bytes/s) and `matmul` (FLOP/s)."""
    section = Section(
        "ceilings",
        f"device-to-device copy of {nbytes / 1e9:.1f} GB (read + written), {side}³ bf16 product",
    )
    section.facts["copy"] = copy_bytes(nbytes) / _copy_seconds(bench, nbytes)
    section.facts["matmul"] = matmul_flops(side) / _matmul_seconds(bench, side)
    section.rows = [
        {"ceiling": "copy", "GB/s": section.facts["copy"] / 1e9},
        {"ceiling": "matmul", "TFLOP/s": section.facts["matmul"] / 1e12},
    ]
    return section


def _copy_seconds(bench: Bench, nbytes: int) -> float:
    source = random(nbytes // 2, device=bench.device)
    target = torch.empty_like(source)
    return bench.timer.seconds(lambda _: target.copy_(source))


def _matmul_seconds(bench: Bench, side: int) -> float:
    a, b = (random(side, side, device=bench.device) for _ in range(2))
    return bench.timer.seconds(lambda _: a @ b)
