"""Distributed softmax: queries that every rank has, against KV that is sharded over ranks.

B batch, T query tokens, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import localflash
from localflash import KV, Band, Partial, empty_partial, merge_many
from seqpar.local import Attend, accumulate_tiles, attend_all, rows_of
from seqpar.schedule import Tile
from seqpar.transport import Transport


class Held(NamedTuple):
    """What a rank holds of one text, and the calls for the query tokens `rows` of that text."""

    rows: slice
    kv: KV
    tiles: Sequence[Tile]


def attend_sharded(
    q_BTHD: Tensor, texts: Sequence[Held], *, transport: Transport, attend: Attend
) -> Partial:
    """Replicated queries against this rank's keys, text by text, then merged over all ranks."""
    kv, tiles = texts[0].kv, texts[0].tiles
    all_of_it = (Tile(slice(0, q_BTHD.shape[1]), slice(0, kv.tokens), None),)
    if len(texts) == 1 and tuple(tiles) == all_of_it:
        own = attend_all(q_BTHD, kv, attend)  # decoding
    else:
        own = empty_partial(q_BTHD)
        for rows, kv, tiles in texts:
            accumulate_tiles(q_BTHD[:, rows], kv, tiles, rows_of(own, rows), attend)
    return merge_across_ranks(*own, transport)


def merge_across_ranks(out_BTHD: Tensor, lse_BHT: Tensor, transport: Transport) -> Partial:
    """Merge every rank's float32 partial over its own keys; the same bits on all ranks.

    One collective: out and lse travel packed as (B, T, H, D + 1).  A rank without keys passes
    out 0 and lse -inf.  What is sent does not depend on the number of keys.
    """
    if transport.world_size == 1:
        return out_BTHD, lse_BHT
    packed = torch.cat([out_BTHD, lse_BHT.transpose(1, 2).unsqueeze(-1)], dim=-1)
    gathered = packed.new_empty(transport.world_size, *packed.shape)
    transport.all_gather(packed, gathered).wait()
    return merge_many(gathered[..., :-1], gathered[..., -1].transpose(-1, -2))


def query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    *,
    transport: Transport,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """A question that every rank has, against a context that is sharded over ranks.

    Every token of the context comes before the question, so no row of it is masked: a causal
    limit on each shard would hide its last keys.  The question's own causal square is added on
    rank 0.  One collective, whose size does not depend on the context.

    Args:
        q: the question's queries (B, T, H, D), the same on every rank.
        k, v: the question's keys and values (B, T, K, D), the same on every rank.
        k_context, v_context: this rank's share of the context (B, Tc, K, D); Tc may be 0.
        transport: this rank's end of the group.
        scale: of the scores; D ** -0.5 unless given.
        softcap: scores become softcap · tanh(scores / softcap).
        kernel: the local back end, by name.

    Returns:
        (B, T, H, D) in q's dtype, the same bits on every rank.

    Source: Acharya, Jia, Ginsburg, arXiv 2411.17116, section 2.2, with the merge of
    `localflash.merge` in place of the printed one, whose weight is wrong.
    """
    attend = partial(localflash.attend, scale=scale, softcap=softcap, backend=kernel)
    into = empty_partial(q)
    attend(q, k_context, v_context, None, into=into)
    if transport.rank == 0:
        attend(q, k, v, Band(0, 1, 0, 1), into=into)
    return merge_across_ranks(*into, transport)[0].to(q.dtype)
