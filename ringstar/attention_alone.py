"""Ring Attention without a model: what a benchmark of attention by itself runs on each rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ringattn import KVBuffers, ring_attention
from ringstar.models import attention_heads
from seqpar import Layout, Transport, positions

Call = Callable[[], Tensor]


def random_qkv(config: Any, tokens: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v (1, T, H, D) with the heads of a model's config, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    q_heads, kv_heads, dim = attention_heads(config)
    return [
        torch.randn(1, tokens, heads, dim, generator=generator).to(device, dtype)
        for heads in (q_heads, kv_heads, kv_heads)
    ]


def ring_share(qkv: list[Tensor], transport: Transport) -> Call:
    """`ringattn.ring_attention` on this rank's share of q, k and v (1, T, H, D), zigzag."""
    tokens = qkv[0].shape[1]
    layout = Layout("zigzag", 0, tokens, transport.world_size)
    own = torch.tensor(positions(layout.runs(transport.rank)), device=qkv[0].device)
    q, k, v = (t[:, own] for t in qkv)
    buffers = KVBuffers()
    return lambda: ring_attention(q, k, v, transport=transport, length=tokens, buffers=buffers)
