"""Room for KV that another rank sends, of whatever form: bytes, and KV over them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from localflash import KV


def token_nbytes(kv: KV) -> int:
    """Bytes of one token of one sequence, as they are sent."""
    return sum(math.prod(t.shape[2:]) * t.element_size() for t in _form(kv))


def kv_room(like: KV, tokens: int) -> Tensor:
    """Bytes for `tokens` tokens of KV like this; what is in them is not set."""
    nbytes = like.batch * tokens * token_nbytes(like)
    return _form(like)[0].new_empty(nbytes, dtype=torch.uint8)


def kv_over(room: Tensor, like: KV, tokens: int) -> KV:
    """KV of `tokens` tokens in the form of `like`, whose tensors lie end to end in `room`.

    `room` is contiguous uint8 and may be longer.
    """
    tensors, at = [], 0
    for tensor in _form(like):
        shape = (tensor.shape[0], tokens, *tensor.shape[2:])
        stop = at + math.prod(shape) * tensor.element_size()
        tensors.append(room[at:stop].view(tensor.dtype).view(shape))
        at = stop
    return like.of(tuple(tensors))


def _form(kv: KV) -> tuple[Tensor, ...]:
    """Its tensors without tokens: KV in pieces is not gathered for its form."""
    return kv.slice(0, 0).tensors
