"""Attention alone, causal, with a model's heads: ours, the PyPI peer's, and one process's.

`ring-attention-pytorch` is made for training: it has no cache and no answers, so that only this
can be compared with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ringstar.attention_alone import Call, ring_share
from ringstar.ranks import Transport

# what each rank does once, before it is measured: q, k and v of all tokens, and its transport
Prepare = Callable[[list[Tensor], Transport], Call]

# tokens of a bucket, at most: scores of it are bucket² for each head; with fewer than the least,
# what is called for each pair of buckets takes longer than what it computes
_BUCKET, _LEAST_BUCKET = 4096, 256
OURS, PEER, ONE_PROCESS = "ringattn", "ring-attention-pytorch", "PyTorch sdpa"


def peer(qkv: list[Tensor], transport: Transport) -> Call:
    """`ring_attention_pytorch.ring_flash_attn` on this rank's share, contiguous.

    On CUDA its Triton kernel; elsewhere its path of plain einsum, in buckets of a rank's share, or
    of a part of it where scores of a whole share would fill the memory.
    """
    world = transport.world_size
    share = qkv[0].shape[1] // world
    own = slice(transport.rank * share, (transport.rank + 1) * share)
    q, k, v = (t[:, own].contiguous() for t in qkv)
    attend = _peer_attention(q.is_cuda)
    return lambda: attend(
        q,
        k,
        v,
        causal=True,
        bucket_size=_bucket(share),
        ring_reduce_col=True,
        ring_size=world,
    )


def _peer_attention(cuda: bool) -> Callable[..., Tensor]:
    if cuda:
        from ring_attention_pytorch.ring_flash_attention_cuda import ring_flash_attn_cuda

        return ring_flash_attn_cuda
    from ring_attention_pytorch import ring_flash_attn

    return ring_flash_attn


def one_process(qkv: list[Tensor], _: Transport | None = None) -> Call:
    """PyTorch's own attention over the whole."""
    q, k, v = (t.transpose(1, 2) for t in qkv)
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


PREPARED: dict[str, Prepare] = {OURS: ring_share, PEER: peer, ONE_PROCESS: one_process}


def why_never(worlds: Sequence[int], transport: str, halves: bool) -> str | None:
    """Why the peer can be measured on none of these numbers of ranks; None if it can.

    `halves`: it would compute in float16 what we compute in float32, as it does on CUDA.
    """
    if find_spec("ring_attention_pytorch") is None:
        return "is not installed: pip install ring-attention-pytorch"
    if halves:
        return "computes float32 in float16 on a GPU; model.dtype=bfloat16 is the same for both"
    if max(worlds) == 1 or transport == "threads":
        return "needs several processes: its ring is torch.distributed's"
    return None


def why_not(tokens: int, world: int) -> str | None:
    """Why the peer cannot take this length; None if it can."""
    if tokens % world:
        return f"needs a length that {world} ranks divide evenly"
    share = tokens // world
    if _bucket(share) < min(share, _LEAST_BUCKET):
        sizes = f"{_LEAST_BUCKET} to {_BUCKET} tokens"
        return f"needs a length of which each rank's share, {share}, is buckets of {sizes}"
    return None


def contenders(world: int) -> tuple[str, ...]:
    """Who is measured on so many ranks; the peer last: what it does to these ranks is its own."""
    return (OURS, PEER) if world > 1 else (ONE_PROCESS,)


def _bucket(share: int) -> int:
    """The largest that a rank's share is a multiple of."""
    return next(size for size in range(min(share, _BUCKET), 0, -1) if share % size == 0)


def seconds_of(
    call: Call, barrier: Callable[[], object], warm_ups: int, repeats: int
) -> list[float]:
    """Wall seconds of each call after `warm_ups`; `barrier` runs untimed before each."""
    found = []
    for repeat in range(warm_ups + repeats):
        barrier()
        started = time.perf_counter()
        out = call()
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        if repeat >= warm_ups:
            found.append(time.perf_counter() - started)
    return found
