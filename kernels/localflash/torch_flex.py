"""PyTorch's FlexAttention, as a tile.

B batch, T tokens (Tq rows, Tk keys), H query heads, Hkv KV heads, D head dim; lse comes back
float32, natural log. On CUDA it is compiled, which has been run on no GPU yet; on the CPU it is
PyTorch's unfused form, which holds every score: for checks.
"""

import threading
import warnings
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .merge import Partial
from .torch_cuda import rows_dense

_BLOCK = 128  # rows and keys of a block of the mask; PyTorch's default
_FIRST_CALL = threading.Lock()


def tile(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, causal: bool, scale: float) -> Partial:
    """Causal by a mask of blocks, so that what lies above the diagonal is skipped."""
    if q_BTHD.is_cuda:
        q, k, v = (rows_dense(x).transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
        attention = _fused(causal, q.dtype, q.shape[1], k.shape[1], q.shape[3])
    else:  # widened: unfused, it would round the scores of 16-bit inputs to 16 bits
        q, k, v = (x.float().transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
        attention = _unfused()
    mask = _causal_blocks(q.shape[2], q.device) if causal else None
    out_BHTD, lse_BHT = attention(q, k, v, mask, scale, q.shape[1] != k.shape[1])
    return out_BHTD.transpose(1, 2), lse_BHT


def _attend(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, mask: Any, scale: float, grouped: bool
) -> Partial:
    """out (B, H, Tq, D) in q's dtype, lse (B, H, Tq) float32; mask: a BlockMask or None."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    out_BHTD, aux = flex_attention(
        q_BHTD,
        k_BHTD,
        v_BHTD,
        block_mask=mask,
        scale=scale,
        enable_gqa=grouped,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return out_BHTD, aux.lse


@lru_cache(maxsize=64)
def _fused(
    causal: bool, dtype: torch.dtype, heads: int, heads_kv: int, dim: int, backend: Any = "inductor"
) -> Any:
    """`_attend` compiled for any lengths, once for each combination of the arguments.

    One combination still has several graphs, for single rows, single keys and layouts. PyTorch
    gives up after 8 of one code object: each combination has its own, so that they do not add up.
    Past that it raises, and does not hold the scores of a long tile unasked.
    """
    own = FunctionType(_attend.__code__.replace(), _attend.__globals__)
    return torch.compile(own, dynamic=True, fullgraph=True, backend=backend)


def _unfused() -> Callable[..., Partial]:
    """`_attend` as it is. PyTorch warns of that once in a process: here, where none hears it."""
    with _FIRST_CALL:  # simulated ranks come together, and filters of warnings are one for all
        return _warned()


@lru_cache(maxsize=1)
def _warned() -> Callable[..., Partial]:
    x_BHTD = torch.zeros(1, 1, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _attend(x_BHTD, x_BHTD, x_BHTD, None, 1.0, False)
    return _attend


@lru_cache(maxsize=16)
def _causal_blocks(rows: int, device: torch.device) -> Any:
    """The BlockMask of a causal square: blocks on the diagonal are masked, those left of it full.

    As PyTorch makes it, which would look at all rows x rows pairs for it; so the blocks of a last
    row that is not filled are all masked ones.
    """
    from torch.nn.attention.flex_attention import BlockMask

    blocks = -(-rows // _BLOCK)
    at = torch.arange(blocks, dtype=torch.int32, device=device)
    # Row i reads the first masked[i] of masked_at[i], the first full[i] of full_at[i].
    masked, masked_at = torch.ones_like(at), at[:, None].repeat(1, blocks)
    full, full_at = at.clone(), at.repeat(blocks, 1)
    if rows % _BLOCK:
        masked[-1], masked_at[-1], full[-1] = blocks, at, 0
    return BlockMask.from_kv_blocks(
        kv_num_blocks=masked[None, None],
        kv_indices=masked_at[None, None],
        full_kv_num_blocks=full[None, None],
        full_kv_indices=full_at[None, None],
        BLOCK_SIZE=_BLOCK,
        mask_mod=_sees,
        seq_lengths=(rows, rows),
    )


def _sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return row >= key
