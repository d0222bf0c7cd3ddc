"""Phase 1 of Star Attention: each block attends to itself and to the anchor before it.

Acharya, Jia, Ginsburg, arXiv 2411.17116, section 2.1 and algorithm 1, with one change that
alters no result: an anchor's KV does not depend on the block behind it, so it is computed once,
on rank 0, and broadcast layer by layer while every rank attends its blocks to themselves.

B batch, T tokens of a pass, H query heads, K key/value heads (H % K == 0), D head dim.
Partials are float32 (float64 for float64 input); KV travels in its own dtype.
"""

from __future__ import annotations

from torch import Tensor

from localflash import DenseKV, Partial, empty_partial
from seqpar import Attend, Done, Handle, Transport, accumulate_tiles
from starattn.plan import Pass


class AnchorKV:
    """The KV of an anchor that this rank does not keep: gone when the encode is.

    Later passes of a lane need every layer's; where a lane is one pass, each layer's takes the
    place of the one before.
    """

    def __init__(self, tokens: int):
        self._tokens = tokens
        self._packed: dict[int, Tensor] = {}

    def packed(self, layer: int, like: DenseKV, step: Pass) -> Tensor:
        """k and v of `layer` as one tensor (2, B, anchor tokens, K, D)."""
        place = layer if step.several else -1
        if place not in self._packed:
            batch, _, heads, dim = like.k_BTHD.shape
            self._packed[place] = like.k_BTHD.new_empty(2, batch, self._tokens, heads, dim)
        return self._packed[place]


def encode_layer(
    layer: int,
    q_BTHD: Tensor,
    new: DenseKV,
    past: DenseKV,
    step: Pass,
    anchors: AnchorKV,
    transport: Transport,
    attend: Attend,
) -> Partial:
    """One layer of one pass; float32, complete over all keys.

    `new` is the KV of the pass's own tokens, `past` what the rank kept before them.
    """
    into = empty_partial(q_BTHD)
    arriving = _pass_on(layer, new, step, anchors, transport)
    transport.mark("attend blocks")
    accumulate_tiles(q_BTHD, new, step.new, into, attend)
    accumulate_tiles(q_BTHD, past, step.past, into, attend)
    arriving.wait()
    if step.anchor:
        transport.mark("attend anchor")
        k_BTHD, v_BTHD = anchors.packed(layer, new, step)
        accumulate_tiles(q_BTHD, DenseKV(k_BTHD, v_BTHD), step.anchor, into, attend)
    return into


def _pass_on(
    layer: int, new: DenseKV, step: Pass, anchors: AnchorKV, transport: Transport
) -> Handle:
    """Put the anchor tokens of this pass where later passes and other ranks find them."""
    if len(step.made):
        made, packed = step.made, anchors.packed(layer, new, step)
        for place, tensor in zip(packed, (new.k_BTHD, new.v_BTHD), strict=True):
            place[:, made.start : made.stop].copy_(tensor[:, : len(made)])
    if not step.shares:
        return Done()
    return transport.broadcast(anchors.packed(layer, new, step), root=0)
