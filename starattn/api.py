"""`star_attention`: phase 1 on tensors, for people with their own model code."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import localflash
from localflash import DenseKV
from seqpar import Transport, token_count
from starattn.blocks import make_blocks
from starattn.encode import AnchorKV, encode_layer
from starattn.plan import plan_passes


def star_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    transport: Transport,
    length: int,
    block_size: int | str | None = None,
    anchor_size: int | str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Block-local causal attention behind the document's first tokens, sharded over ranks.

    A token sees the tokens of its block up to itself, and the first `anchor_size` tokens of the
    document, whose KV rank 0 broadcasts while the ranks attend their blocks to themselves.
    Later tokens that every rank has, such as a question's, go through `seqpar.query_attention`.

    Args:
        q: this rank's queries (B, T, H, D): the tokens of `make_blocks(...).owned(rank)`, in
            order; T may be 0.
        k, v: this rank's keys and values (B, T, K, D), H % K == 0.
        transport: this rank's end of the group.
        length: tokens of the whole document.
        block_size: tokens, also as `4K`; None: length / world_size, rounded up.
        anchor_size: tokens, at most a block; None: a block; 0: none.
        scale: of the scores; D ** -0.5 unless given.
        softcap: scores become softcap · tanh(scores / softcap).
        kernel: the local back end, by name.

    Returns:
        (B, T, H, D) in q's dtype.

    Raises:
        ValueError: sizes that do not fit, shapes that are not the plan's, or wanted gradients.
        TransportError: another rank is gone or late.

    Source: Acharya, Jia, Ginsburg, arXiv 2411.17116, section 2.1.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("star_attention has no backward pass: call it under torch.no_grad()")
    blocks = make_blocks(length, transport.world_size, block_size, anchor_size)
    expected = token_count(blocks.owned(transport.rank))
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape[1] != expected:
            raise ValueError(
                f"{name} has {tensor.shape[1]} tokens, but rank {transport.rank} of"
                f" {transport.world_size} owns {expected} of {length} in blocks of {blocks.size}"
            )
    steps = plan_passes(blocks, transport.rank, "world", anchor_is_head=True, chunk_tokens=length)
    attend = partial(localflash.attend, scale=scale, softcap=softcap, backend=kernel)
    new, anchors = DenseKV(k, v), AnchorKV(blocks.anchor)
    for step in steps:  # one, or none
        whole = encode_layer(0, q, new, new.slice(0, 0), step, anchors, transport, attend)
        return whole[0].to(q.dtype)
    return torch.zeros_like(q)
