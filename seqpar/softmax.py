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
from seqpar.local import Attend, accumulate_tiles, attend_all
from seqpar.schedule import Tile
from seqpar.transport import Transport


class Held(NamedTuple):
    """What a rank holds of one text, and the calls for the query tokens `rows` of that text."""

    rows: slice
    kv: KV
    tiles: Sequence[Tile]

    @property
    def is_seen_whole(self) -> bool:
        """Whether every one of these query tokens sees all that is held."""
        tokens = self.rows.stop - self.rows.start
        everything = Tile(slice(0, tokens), slice(0, self.kv.tokens), None)
        return len(self.tiles) == 1 and self.tiles[0] == everything


def attend_sharded(
    q_BTHD: Tensor, texts: Sequence[Held], *, transport: Transport, attend: Attend
) -> Partial:
    """Replicated queries against this rank's keys, text by text, then merged over all ranks.

    The texts' rows follow one another, and are all of q's.
    """
    parts = [_attend_held(q_BTHD[:, text.rows], text, attend) for text in texts]
    if len(parts) == 1:
        return merge_across_ranks(*parts[0], transport)
    outs_BTHD, lses_BHT = zip(*parts, strict=True)
    return merge_across_ranks(torch.cat(outs_BTHD, 1), torch.cat(lses_BHT, 2), transport)


def _attend_held(q_BTHD: Tensor, text: Held, attend: Attend) -> Partial:
    if text.is_seen_whole:  # decoding: nothing to merge with
        return attend_all(q_BTHD, text.kv, attend)
    own = empty_partial(q_BTHD)
    accumulate_tiles(q_BTHD, text.kv, text.tiles, own, attend)
    return own


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
