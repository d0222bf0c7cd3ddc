"""Distributed softmax: queries that every rank has, against KV that is sharded over ranks.

B batch, T query tokens, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from localflash import DenseKV, Partial, empty_partial, merge_many
from seqpar.local import Attend, accumulate_tiles
from seqpar.schedule import Tile
from seqpar.transport import Transport


def attend_sharded(
    q_BTHD: Tensor, kv: DenseKV, tiles: Sequence[Tile], *, transport: Transport, attend: Attend
) -> Partial:
    """Replicated queries against this rank's keys, then merged over all ranks."""
    if len(tiles) == 1 and tiles[0] == Tile(slice(0, q_BTHD.shape[1]), slice(0, kv.tokens), None):
        # decoding: one call, and nothing to merge it into
        partial = attend(q_BTHD, kv.k_BTHD, kv.v_BTHD, None)
    else:
        partial = empty_partial(q_BTHD)
        accumulate_tiles(q_BTHD, kv, tiles, partial, attend)
    return merge_across_ranks(*partial, transport)


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
