"""What a rank reports of itself."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch

from seqpar import Transport


@dataclass(frozen=True, slots=True)
class RankMetrics:
    """One value per rank, in rank order, bytes.

    `peak_memory` is the CUDA allocator's peak on a GPU, else the peak resident size of the
    process (which simulated ranks share).  `bytes_sent` counts from the start of the rank.
    """

    peak_memory_bytes: list[int]
    kv_bytes: list[int]
    bytes_sent: list[int]


def gather_metrics(transport: Transport, kv_bytes: int) -> RankMetrics:
    """Collect every rank's figures on all ranks; its own exchange is not counted."""
    figures = [peak_memory(transport.device), kv_bytes, transport.counters.bytes_sent]
    mine = torch.tensor(figures, dtype=torch.int64, device=transport.device)
    everyone = mine.new_empty(transport.world_size, 3)
    with transport.uncounted():
        transport.all_gather(mine, everyone).wait()
    peak, kv, sent_by = (everyone[:, column].tolist() for column in range(3))
    return RankMetrics(peak, kv, sent_by)


def peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
