"""`ring_attention`: the exact product on tensors, for people with their own model code."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import localflash
from localflash import DenseKV
from ringattn.plan import ExtendPlan, PackedPlan
from ringattn.prefill import KVBuffers, Past, Ring, extend
from seqpar import Layout, LayoutKind, Transport


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    transport: Transport,
    length: int,
    layout: LayoutKind = "zigzag",
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    kernel: str = "auto",
    buffers: KVBuffers | None = None,
) -> Tensor:
    """Causal attention over a sequence of `length` tokens that is sharded over ranks.

    Args:
        q: this rank's queries (B, T, H, D); T and the order of tokens are those of
            `Layout(layout, 0, length, world_size).runs(rank)`, and may be 0.
        k, v: this rank's keys and values (B, T, K, D), H % K == 0.
        transport: this rank's end of the ring.
        length: tokens of the whole sequence; any number, divisible or not.
        layout: `zigzag` (balanced), `striped` (balanced) or `contiguous`.
        scale: of the scores; D ** -0.5 unless given.
        softcap: scores become softcap · tanh(scores / softcap).
        window: a query sees the last `window` positions, its own among them; None: all.
        kernel: the local back end, by name.
        buffers: transfer buffers to reuse between calls of like shapes.

    Returns:
        (B, T, H, D) in q's dtype.

    Raises:
        ValueError: the shapes are not those of the layout, or gradients are wanted.
        TransportError: another rank is gone or late.

    Source: Liu et al., "Ring Attention with Blockwise Transformers", section 3.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("ring_attention has no backward pass: call it under torch.no_grad()")
    shares = Layout(layout, 0, length, transport.world_size)
    expected = shares.count(transport.rank)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape[1] != expected:
            raise ValueError(
                f"{name} has {tensor.shape[1]} tokens, but rank {transport.rank} of"
                f" {transport.world_size} owns {expected} of {length} under layout={layout}"
            )
    runs = tuple(shares.runs(rank) for rank in range(transport.world_size))
    attend = partial(localflash.attend, scale=scale, softcap=softcap, backend=kernel)
    new = DenseKV(k.contiguous(), v.contiguous())
    plan = PackedPlan((ExtendPlan(transport.rank, runs, tuple(() for _ in runs)),))
    ring = Ring(transport, attend, buffers or KVBuffers())
    nothing = Past(new.slice(0, 0), "none")
    return extend(q, new, [nothing], plan, ring, window)[0].to(q.dtype)
