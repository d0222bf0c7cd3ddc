"""Phase 1 of Star Attention: each block attends to itself and to the anchor before it.

Acharya, Jia, Ginsburg, arXiv 2411.17116, section 2.1 and algorithm 1, with one change that
alters no result: an anchor's KV does not depend on the block behind it, so it is computed once,
on rank 0, and broadcast layer by layer while every rank attends its blocks to themselves.

B batch, T tokens of a pass, H query heads, K key/value heads (H % K == 0), D head dim.
Partials are float32 (float64 for float64 input); KV travels in the form in which it is kept.
"""

from __future__ import annotations

from torch import Tensor

from localflash import KV, Partial, empty_partial
from seqpar import Attend, Done, Handle, Transport, accumulate_tiles, kv_over, kv_room
from starattn.plan import Pass


class AnchorKV:
    """The KV of an anchor that this rank does not keep: gone when the encode is.

    Later passes of a lane need every layer's; where a lane is one pass, each layer's takes the
    place of the one before.
    """

    def __init__(self, tokens: int):
        self._tokens = tokens
        self._packed: dict[int, Tensor] = {}

    def packed(self, layer: int, like: KV, step: Pass) -> Tensor:
        """The bytes of `layer`: all tensors of the anchor's KV end to end, for one broadcast."""
        place = layer if step.several else -1
        if place not in self._packed:
            self._packed[place] = kv_room(like, self._tokens)
        return self._packed[place]

    def of(self, layer: int, like: KV, step: Pass) -> KV:
        """The anchor's KV of `layer`, over those bytes, in the form of `like`."""
        return kv_over(self.packed(layer, like, step), like, self._tokens)


def encode_layer(
    layer: int,
    q_BTHD: Tensor,
    new: KV,
    past: KV,
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
    transport.mark("attend blocks", of="blocks")
    accumulate_tiles(q_BTHD, new, step.new, into, attend)
    accumulate_tiles(q_BTHD, past, step.past, into, attend)
    arriving.wait()
    if step.anchor:
        transport.mark("attend anchor", of="anchor")
        accumulate_tiles(q_BTHD, anchors.of(layer, new, step), step.anchor, into, attend)
    return into


def _pass_on(layer: int, new: KV, step: Pass, anchors: AnchorKV, transport: Transport) -> Handle:
    """Put the anchor tokens of this pass where later passes and other ranks find them."""
    if len(step.made):
        places = anchors.of(layer, new, step).slice(step.made.start, step.made.stop)
        made = new.slice(0, len(step.made))
        for place, tensor in zip(places.tensors, made.tensors, strict=True):
            place.copy_(tensor)
    if not step.shares:
        return Done()
    return transport.broadcast(anchors.packed(layer, new, step), root=0)
