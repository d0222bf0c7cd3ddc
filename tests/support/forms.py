"""KV in every form that there is, and in pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from localflash import DenseKV, joined_kv, quantise
from localflash.views import KV

DIM = 16
FORMS = {"dense": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def document_in(form: str, tokens: int) -> tuple[Tensor, KV]:
    """Queries (1, tokens, 6, DIM), and KV of 2 heads in this form; always the same."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (2 * torch.randn(1, tokens, h, DIM, generator=generator) for h in (6, 2, 2))
    storage = FORMS[form]
    return q, quantise(k, v, storage) if storage else DenseKV(k, v)


def widened(kv: KV, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The keys and values that it stands for."""
    k, v = (torch.cat(x, 1) for x in zip(*(s[2:] for s in kv.segments(dtype)), strict=True))
    return k, v


def tokens_of(kv: KV, index: Sequence[int]) -> KV:
    return kv.of(tuple(tensor[:, index] for tensor in kv.tensors))


def in_two_pieces(kv: KV) -> KV:
    first = kv.tokens // 3
    return joined_kv([kv.slice(0, first), kv.slice(first, kv.tokens)])
