"""Attention alone: ranks against one process's flash attention and the PyPI peer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import MEDIANS, cpu_seconds, over_ranks
from launch.bench import attention
from ringstar.attention_alone import ring_share
from seqpar import Transport
from seqpar.spawn import run_processes

TOKENS, HEADS, KV_HEADS, DIM, WORLD = 4096, 9, 3, 64, 4


def tensors() -> list[Tensor]:
    """q, k, v (1, T, H, D), float32."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, TOKENS, h, DIM, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS)
    ]


def one_process() -> dict[str, float]:
    """PyTorch's flash attention over the whole, one thread."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        return over_ranks([cpu_seconds(attention.one_process(tensors()))])


def ours(transport: Transport) -> dict[str, list[float]]:
    return cpu_seconds(ring_share(tensors(), transport), transport.barrier)


def peer(transport: Transport) -> dict[str, list[float]]:
    return cpu_seconds(attention.peer(tensors(), transport), transport.barrier)


def run() -> dict[str, Any]:
    """CPU seconds of all, and the two ratios."""
    alone = one_process()
    ring = over_ranks(run_processes(WORLD, ours))
    other = over_ranks(run_processes(WORLD, peer))
    return {
        "what": f"causal attention, {TOKENS} tokens, {HEADS} query and {KV_HEADS} KV heads of"
        f" {DIM}, float32, {WORLD} gloo ranks of one thread; {MEDIANS}",
        "one process, flash": alone,
        "ringattn": ring,
        "ring-attention-pytorch": other,
        "ringattn / one process": ring["cpu_s"] / alone["cpu_s"],
        "ring-attention-pytorch / ringattn": other["cpu_s"] / ring["cpu_s"],
    }
