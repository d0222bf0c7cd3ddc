"""Attention packages that a user may have installed, as tiles; imported when first called.

B batch, T tokens (Tq rows, Tk keys), H query heads, Hkv KV heads, D head dim; 16-bit inputs, out
in their dtype, lse float32. Each takes grouped heads as they are; the `causal` of each is
bottom-right, tiles are square. Written from the sources of fa3-fwd 0.0.3, tokenspeed-fa3
3.0.0.post20260810, flash-attn-4 4.0.0b36 and flashinfer-python 0.7.2; run on no GPU yet.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .installed import installed
from .merge import Partial
from .torch_cuda import rows_dense

FA3 = ("flash_attn_interface", "fa3_fwd_interface")  # the second is fa3-fwd's, bfloat16 only
FA4 = ("flash_attn.cute",)
FLASHINFER = ("flashinfer",)


def fa3(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, causal: bool, scale: float) -> Partial:
    """FlashAttention-3; lse (B, H, Tq), natural log."""
    q, k, v = (rows_dense(x) for x in (q_BTHD, k_BTHD, v_BTHD))
    kernel = _function(FA3, "flash_attn_func")
    out_BTHD, lse_BHT = kernel(q, k, v, softmax_scale=scale, causal=causal, return_attn_probs=True)
    return out_BTHD, lse_BHT


def fa4(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, causal: bool, scale: float) -> Partial:
    """FlashAttention-4; lse (B, H, Tq), natural log."""
    q, k, v = (rows_dense(x) for x in (q_BTHD, k_BTHD, v_BTHD))
    kernel = _function(FA4, "flash_attn_func")
    out_BTHD, lse_BHT = kernel(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
    return out_BTHD, lse_BHT


def flashinfer(
    q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, causal: bool, scale: float
) -> Partial:
    """FlashInfer, sequence by sequence: it knows no batch. Its lse is (Tq, H), in base 2."""
    kernel = _function(FLASHINFER, "single_prefill_with_kv_cache")
    batch = zip(*(rows_dense(x) for x in (q_BTHD, k_BTHD, v_BTHD)), strict=True)
    parts = [kernel(*qkv, causal=causal, sm_scale=scale, return_lse=True) for qkv in batch]
    outs_THD, lses_TH = zip(*parts, strict=True)
    return torch.stack(outs_THD), torch.stack(lses_TH).transpose(1, 2) * math.log(2)


@lru_cache(maxsize=8)
def _function(modules: tuple[str, ...], name: str) -> Callable[..., Any]:
    module = installed(modules)
    if module is None:  # `unsupported` says so before it comes to this
        raise ModuleNotFoundError(f"none of {', '.join(modules)} is installed")
    return getattr(import_module(module), name)
