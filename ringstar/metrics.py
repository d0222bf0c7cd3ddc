"""What a rank reports of itself."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from seqpar import Transport

_INFINITE = 2**63 - 1


@dataclass(frozen=True, slots=True)
class RankMetrics:
    """One value per rank, in rank order, bytes.

    `peak_memory` is the CUDA allocator's peak on a GPU, else the peak resident size of the
    process (which simulated ranks share).
    """

    peak_memory_bytes: list[int]
    kv_bytes: list[int]
    bytes_sent: list[int]


def gather_metrics(transport: Transport, kv_bytes: int, bytes_sent: int) -> RankMetrics:
    """Collect every rank's figures on all ranks; its own exchange is not counted."""
    figures = [peak_memory(transport.device), kv_bytes, bytes_sent]
    return RankMetrics(*gather_integers(transport, figures))


def gather_integers(transport: Transport, mine: Sequence[int]) -> list[list[int]]:
    """For each of these figures a list of every rank's; the exchange is not counted."""
    figures = torch.tensor(mine, dtype=torch.int64, device=transport.device)
    everyone = figures.new_empty(transport.world_size, len(mine))
    with transport.uncounted():
        transport.all_gather(figures, everyone).wait()
    return everyone.T.tolist()


def slowest(transport: Transport, seconds: float) -> float:
    """The longest time of any rank, on every rank; seconds."""
    (longest,) = largest(transport, [seconds])
    return longest


def largest(transport: Transport, shares: Sequence[float]) -> list[float]:
    """For each of these numbers the largest of any rank, on every rank; in billionths.

    What is not finite counts as infinity.
    """
    mine = [round(share * 1e9) if math.isfinite(share) else _INFINITE for share in shares]
    found = map(max, gather_integers(transport, mine))
    return [math.inf if most == _INFINITE else most / 1e9 for most in found]


def peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
