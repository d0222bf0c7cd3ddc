"""PyTorch's fused CUDA attentions, as tiles.

B batch, T tokens (Tq rows, Tk keys), H query heads in Hkv groups of G, D head dim; lse comes
back float32, natural log. Written from the operators' schemas (torch 2.13) and the conditions in
PyTorch's sdp_utils.cpp; run on no GPU yet.
"""

import torch
from torch import Tensor

from .merge import Partial


def flash(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, causal: bool, scale: float) -> Partial:
    """FlashAttention-2. Its `causal` is bottom-right; tiles are square."""
    q, k, v = (rows_dense(x) for x in (q_BTHD, k_BTHD, v_BTHD))
    kernel = torch.ops.aten._flash_attention_forward.default
    sizes = (None, None, q.shape[1], k.shape[1])  # no cumulative lengths: one length for all
    out_BTHD, lse_BHT, *_ = kernel(q, k, v, *sizes, 0.0, causal, False, scale=scale)
    return out_BTHD, _normal(lse_BHT, q_BTHD.shape[1])


def cudnn(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, causal: bool, scale: float) -> Partial:
    """cuDNN's graph, built anew for each new shape: for repeated shapes, not for decoding."""
    if k_BTHD.shape[1] == 1:  # which cuDNN refuses
        return _one_key(q_BTHD, k_BTHD, v_BTHD, scale)
    q, k, v = (rows_dense(x).transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    out_BHTD, lse_BHT1, *_ = kernel(q, k, v, None, True, 0.0, causal, False, scale=scale)
    lse_BHT = lse_BHT1.squeeze(3) if lse_BHT1.ndim == 4 else lse_BHT1
    return out_BHTD.transpose(1, 2), _normal(lse_BHT, q_BTHD.shape[1])


def efficient(
    q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, causal: bool, scale: float
) -> Partial:
    """The memory-efficient kernel; it knows no groups: member g of all groups at a time."""
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention.default
    group = q_BTHD.shape[2] // k_BTHD.shape[2]
    k, v = (rows_dense(x).transpose(1, 2) for x in (k_BTHD, v_BTHD))
    outs, lses = [], []
    for g in range(group):
        q = rows_dense(q_BTHD[:, :, g::group]).transpose(1, 2)
        out_BHTD, lse_BHT, *_ = kernel(q, k, v, None, True, 0.0, causal, scale=scale)
        outs.append(out_BHTD.transpose(1, 2))
        lses.append(_normal(lse_BHT, q_BTHD.shape[1]))
    return torch.stack(outs, 3).flatten(2, 3), torch.stack(lses, 2).flatten(1, 2)


def _normal(lse_BHT: Tensor, rows: int) -> Tensor:
    """Cut padded rows off; an empty row is +inf in FlashAttention, -inf here."""
    lse_BHT = lse_BHT[:, :, :rows].float()
    return lse_BHT.masked_fill(lse_BHT == torch.inf, -torch.inf).contiguous()


def _one_key(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scale: float) -> Partial:
    q_BTHGD = torch.unflatten(q_BTHD.float(), 2, (k_BTHD.shape[2], -1))
    lse_BTHG = (q_BTHGD * k_BTHD.float().unsqueeze(3)).sum(-1) * scale
    out_BTHGD = v_BTHD.float().unsqueeze(3).expand_as(q_BTHGD)
    return out_BTHGD.flatten(2, 3), lse_BTHG.flatten(2, 3).transpose(1, 2)


def rows_dense(x_BTHD: Tensor) -> Tensor:
    """The kernels take any strides but the last, and rows that start at 16 bytes."""
    step = 16 // x_BTHD.element_size()
    aligned = all(s % step == 0 for s in x_BTHD.stride()[:3]) and x_BTHD.data_ptr() % 16 == 0
    if aligned and x_BTHD.stride(3) == 1:
        return x_BTHD
    return x_BTHD.clone(memory_format=torch.contiguous_format)
