"""The merge of partial attention results: everything that combines partials calls it.

B batch, T query rows, H query heads, D head dim, N partials. lse is a natural log.
Partials are float32 (float64 for float64 inputs); an empty row is out 0, lse -inf.
Source: the formula of Ring Attention (Liu et al. 2023, section 3)
and FlashAttention (Dao 2022, section 3.1) written for normalised partials.
"""

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from .installed import installed

Partial = tuple[Tensor, Tensor]  # out (B, T, H, D), lse (B, H, T)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64 (tests); everything else is merged in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_partial(q_BTHD: Tensor) -> Partial:
    """The neutral element of the merge for these queries: out 0, lse -inf, on q's device."""
    B, T, H, _ = q_BTHD.shape
    dtype = accumulator_dtype(q_BTHD.dtype)
    # Not zeros_like: q may be a strided view, and a partial goes over wires.
    out_BTHD = torch.zeros(q_BTHD.shape, dtype=dtype, device=q_BTHD.device)
    lse_BHT = torch.full((B, H, T), -torch.inf, dtype=dtype, device=q_BTHD.device)
    return out_BTHD, lse_BHT


def _fused(x: Tensor) -> ModuleType | None:
    """The kernels that merge in one pass, where x is on a device that has them."""
    return _kernels() if x.is_cuda and x.dtype != torch.float64 else None


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    if not installed(("triton",)):
        return None
    from . import triton_merge

    return triton_merge


def merge_into(out_BTHD: Tensor, lse_BHT: Tensor, out_b_BTHD: Tensor, lse_b_BHT: Tensor) -> None:
    """Merge partial b into (out, lse), in place; all may be strided views.

    out, lse: float32 or float64. out_b: any floating dtype. Exact when either side is -inf.
    """
    if out_BTHD.dtype != accumulator_dtype(out_BTHD.dtype):
        raise ValueError(f"out has dtype {out_BTHD.dtype}: partials merge in float32 or float64")
    fused = _fused(out_BTHD)
    if fused is not None:
        parts = out_b_BTHD.unsqueeze(0), lse_b_BHT.unsqueeze(0)
        fused.merge_partials(*parts, out_BTHD, lse_BHT, into=True)
        return
    lse_b_BHT = lse_b_BHT.to(lse_BHT.dtype)
    # sigmoid(b - a) is exp(b - logaddexp(a, b)) without the rounding of a large lse. The clamp
    # makes it 0 where b is -inf, 1 where only a is, and never NaN: only b can stay infinite.
    weight_BHT = torch.sigmoid(lse_b_BHT - lse_BHT.clamp_min(torch.finfo(lse_BHT.dtype).min))
    torch.logaddexp(lse_BHT, lse_b_BHT, out=lse_BHT)
    # lerp gives either end exactly at weights 0 and 1, in one pass over out.
    out_BTHD.lerp_(out_b_BTHD.to(out_BTHD.dtype), weight_BHT.transpose(1, 2).unsqueeze(-1))


def merge(out_a_BTHD: Tensor, lse_a_BHT: Tensor, out_b_BTHD: Tensor, lse_b_BHT: Tensor) -> Partial:
    """A new partial over the keys of both, which must be disjoint; float32 (or float64)."""
    dtype = accumulator_dtype(out_a_BTHD.dtype)
    out_BTHD, lse_BHT = out_a_BTHD.to(dtype, copy=True), lse_a_BHT.to(dtype, copy=True)
    merge_into(out_BTHD, lse_BHT, out_b_BTHD, lse_b_BHT)
    return out_BTHD, lse_BHT


def add_sinks(out_BTHD: Tensor, lse_BHT: Tensor, sinks_H: Tensor) -> Tensor:
    """A complete result with one more key for each head, of value 0 and score sinks[h].

    Once, over all keys: in every partial it would be counted as often as there are partials.
    A row that sees no key stays 0.
    """
    share_BHT = torch.sigmoid(lse_BHT - sinks_H.to(lse_BHT.dtype)[:, None])
    return out_BTHD * share_BHT.transpose(1, 2).unsqueeze(-1)


def merge_many(outs_NBTHD: Tensor, lses_NBHT: Tensor) -> Partial:
    """All N partials in the order given, so that every rank gets the same bits."""
    if outs_NBTHD.shape[0] < 1 or lses_NBHT.shape[0] != outs_NBTHD.shape[0]:
        counts = f"{outs_NBTHD.shape[0]} outs and {lses_NBHT.shape[0]} lses"
        raise ValueError(f"{counts}: merge_many needs one of each per partial, at least one")
    dtype = accumulator_dtype(outs_NBTHD.dtype)
    fused = _fused(outs_NBTHD)
    if fused is not None and dtype == torch.float32:
        return fused.merge_many(outs_NBTHD, lses_NBHT)
    lses_NBHT = lses_NBHT.to(dtype)
    # With the largest weight at 1 the sum is at least 1, except where every lse is -inf.
    top_BHT = lses_NBHT.amax(0).clamp_min(torch.finfo(dtype).min)
    weights_NBHT = (lses_NBHT - top_BHT).exp_()
    total_BHT = torch.zeros_like(top_BHT)
    for weight_BHT in weights_NBHT:  # not .sum(0): its order of addition is not promised
        total_BHT += weight_BHT
    weights_NBHT /= total_BHT.clamp_min(1.0)
    out_BTHD = torch.zeros(outs_NBTHD.shape[1:], dtype=dtype, device=outs_NBTHD.device)
    for out_b_BTHD, weight_BHT in zip(outs_NBTHD, weights_NBHT, strict=True):
        out_BTHD.addcmul_(out_b_BTHD.to(dtype), weight_BHT.transpose(1, 2).unsqueeze(-1))
    return out_BTHD, total_BHT.log_().add_(top_BHT)
