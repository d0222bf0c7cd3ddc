"""The specification in plain torch: what every back end must compute, to rounding.

B batch, Tq query rows (einsum q), Tk keys (einsum k), H = Hkv*G query heads (einsum h, g),
D head dim. Scores, softmax and results are float32 (float64 for float64 inputs); lse is a
natural log. Quadratic memory, on purpose.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .band import Band
from .merge import Partial, accumulator_dtype, empty_partial
from .views import DenseKV, KVView, PagedKV

Bands = Band | Sequence[Band | None] | None


def attend_reference(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    band: Band | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Partial:
    """out (B, Tq, H, D) and lse (B, H, Tq) of softmax(q k^T * scale) v over visible keys.

    Rows that see no key give out 0, lse -inf. softcap c makes a score s into c*tanh(s/c).
    """
    dtype = accumulator_dtype(q_BTHD.dtype)
    heads_kv, dim = k_BTHD.shape[2:]
    q_BTHGD = torch.unflatten(q_BTHD.to(dtype), 2, (heads_kv, q_BTHD.shape[2] // heads_kv))
    scores_BHGQK = torch.einsum("bqhgd,bkhd->bhgqk", q_BTHGD, k_BTHD.to(dtype))
    scores_BHGQK = scores_BHGQK * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores_BHGQK = softcap * torch.tanh(scores_BHGQK / softcap)
    if band is not None:
        hidden_QK = ~visible(q_BTHD.shape[1], k_BTHD.shape[1], band, q_BTHD.device)
        scores_BHGQK = scores_BHGQK.masked_fill(hidden_QK, -torch.inf)
    lse_BHGQ = scores_BHGQK.logsumexp(-1)
    # Clamped, so that a row of -inf gives weights of 0 and not exp(-inf + inf).
    floor_BHGQ = lse_BHGQ.clamp_min(torch.finfo(dtype).min)
    weights_BHGQK = torch.exp(scores_BHGQK - floor_BHGQ.unsqueeze(-1))
    out_BTHGD = torch.einsum("bhgqk,bkhd->bqhgd", weights_BHGQK, v_BTHD.to(dtype))
    return out_BTHGD.flatten(2, 3).contiguous(), lse_BHGQ.flatten(1, 2).contiguous()


def visible(tq: int, tk: int, band: Band, device: torch.device | None = None) -> Tensor:
    """The band as a dense (tq, tk) bool mask, straight from its definition."""
    s = (band.q_start + band.q_step * torch.arange(tq, device=device)).unsqueeze(1)
    p = band.k_start + band.k_step * torch.arange(tk, device=device)
    mask = p <= s
    return mask if band.window is None else mask & (p > s - band.window)


def attend_cached_reference(
    q_BTHD: Tensor,
    kv: KVView,
    bands: Bands = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Partial:
    """Each sequence gathered into one dense run of tokens, then `attend_reference`."""
    out_BTHD, lse_BHT = empty_partial(q_BTHD)
    for b in range(kv.batch):
        k_BTHD, v_BTHD = _gather(kv, b, accumulator_dtype(q_BTHD.dtype))
        band = bands if bands is None or isinstance(bands, Band) else bands[b]
        row = attend_reference(q_BTHD[b : b + 1], k_BTHD, v_BTHD, band, scale, softcap)
        out_BTHD[b], lse_BHT[b] = row[0][0], row[1][0]
    return out_BTHD, lse_BHT


def _gather(kv: KVView, b: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if isinstance(kv, DenseKV):
        return kv.k_BTHD[b : b + 1], kv.v_BTHD[b : b + 1]
    if not isinstance(kv, PagedKV):
        raise ValueError(f"kv is {type(kv).__name__}: the reference reads DenseKV and PagedKV")
    length, page = int(kv.lengths[b]), kv.k_pool.shape[1]
    pages = kv.block_table[b, : -(-length // page)].long()
    k_BTHD, v_BTHD = (
        pool[pages].flatten(0, 1)[:length].to(dtype).unsqueeze(0)
        * (1.0 if factor is None else factor[:, None])
        for pool, factor in ((kv.k_pool, kv.k_scale), (kv.v_pool, kv.v_scale))
    )
    return k_BTHD, v_BTHD
