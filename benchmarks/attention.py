"""Attention alone: ranks against one process's flash attention and the PyPI peer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import MEDIANS, cpu_seconds, over_ranks
from ringattn import KVBuffers, ring_attention
from seqpar import Layout, Transport, positions
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
    q, k, v = (t.transpose(1, 2) for t in tensors())

    def work() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.inference_mode():
        return over_ranks([cpu_seconds(work)])


def ours(transport: Transport) -> dict[str, list[float]]:
    layout = Layout("zigzag", 0, TOKENS, transport.world_size)
    own = torch.tensor(positions(layout.runs(transport.rank)))
    q, k, v = (t[:, own] for t in tensors())
    buffers = KVBuffers()

    def work() -> None:
        ring_attention(q, k, v, transport=transport, length=TOKENS, buffers=buffers)

    return cpu_seconds(work, transport.barrier)


def peer(transport: Transport) -> dict[str, list[float]]:
    """`ring-attention-pytorch` on the same tensors: its path for CPUs, contiguous shares."""
    from ring_attention_pytorch import ring_flash_attn

    share = TOKENS // transport.world_size
    own = slice(transport.rank * share, (transport.rank + 1) * share)
    q, k, v = (t[:, own].contiguous() for t in tensors())

    def work() -> None:
        ring_flash_attn(
            q, k, v, causal=True, bucket_size=share, ring_reduce_col=True, ring_size=WORLD
        )

    return cpu_seconds(work, transport.barrier)


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
