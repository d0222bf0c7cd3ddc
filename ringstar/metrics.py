"""What a rank reports of itself."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from seqpar import Transport


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
    """For each of these numbers the largest of any rank, on every rank; in billionths."""
    gathered = gather_integers(transport, [round(share * 1e9) for share in shares])
    return [max(each) / 1e9 for each in gathered]


def peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
