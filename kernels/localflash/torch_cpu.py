"""PyTorch's flash attention on the CPU, as a tile.

B batch, T tokens (Tq rows, Tk keys), H query heads in Hkv groups of G, R = T*G packed rows,
D head dim. Kernel: aten._scaled_dot_product_flash_attention_for_cpu; it takes any strides but
the last, groups heads unrepeated, and ends the process (SIGFPE) on empty keys. Figures below:
torch 2.13, one thread of an AMD EPYC (AVX-512, no AMX), H=9, Hkv=3, D=64.
"""

import torch
from torch import Tensor

from .band import Band
from .merge import Partial, empty_partial, merge_into
from .reference import attend_reference

# 16-bit tiles come back rounded to 16 bits: 8-16 of them merged are 1.2-1.35 times as wrong as a
# single call. In float32 they are 0.7-0.95 times as wrong, and, without AMX, 5% faster. Below
# these rows widening costs more than the products; in blocks of these keys its copy stays small.
_WIDEN_ROWS = 4
_WIDEN_BLOCK = 2048
# Packing a group's heads into rows reads K and V once: 1.3x faster at 1 row in float32, 7x in
# bfloat16; 1.07x at 256 rows, nothing at 768.
_PACK_ROWS = 256
# The kernel computes whole blocks of 512 keys past the diagonal. Squares of 256 rows beside
# rectangles save 18% at 512 rows, 6% at 1536, 3% at 2048, nothing at 4096; with several threads
# the extra synchronisation costs more.
_SPLIT_SQUARE = 256
_SPLIT_UP_TO = 2048
_CAPPED_ROWS, _CAPPED_KEYS = 512, 1024


def tile(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, causal: bool, scale: float) -> Partial:
    """A tile as `tiles.Tile` wants it; out is float32, or q's dtype for a few 16-bit rows."""
    attend = _causal if causal else _full
    return attend(q_BTHD, k_BTHD, v_BTHD, scale)


def capped_tile(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    causal: bool,
    scale: float,
    *,
    softcap: float,
) -> Partial:
    """The same with softcap, which the kernel lacks: the specification, block by block.

    Scores of all heads exist for one block of rows and keys at a time.
    """
    out_BTHD, lse_BHT = empty_partial(q_BTHD)
    for i in range(0, q_BTHD.shape[1], _CAPPED_ROWS):
        rows = slice(i, min(i + _CAPPED_ROWS, q_BTHD.shape[1]))
        into = out_BTHD[:, rows], lse_BHT[:, :, rows]
        for j in range(0, rows.stop if causal else k_BTHD.shape[1], _CAPPED_KEYS):
            k, v = (x[:, j : j + _CAPPED_KEYS] for x in (k_BTHD, v_BTHD))
            band = Band(i, 1, j, 1) if causal else None
            merge_into(*into, *attend_reference(q_BTHD[:, rows], k, v, band, scale, softcap))
    return out_BTHD, lse_BHT


def _full(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scale: float) -> Partial:
    if q_BTHD.shape[1] < _WIDEN_ROWS or not _widens(q_BTHD.dtype):
        return _packed(q_BTHD, k_BTHD, v_BTHD, scale)
    q_BTHD = q_BTHD.float()
    blocks = -(-k_BTHD.shape[1] // _WIDEN_BLOCK)
    out: Partial | None = None
    for k_block, v_block in zip(k_BTHD.chunk(blocks, 1), v_BTHD.chunk(blocks, 1), strict=True):
        part = _packed(q_BTHD, k_block.float(), v_block.float(), scale)
        if out is None:
            out = part
        else:
            merge_into(*out, *part)
    assert out is not None
    return out


def _causal(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scale: float) -> Partial:
    """A square, or row blocks of it: a smaller square and the rectangle to its left."""
    rows = q_BTHD.shape[1]
    if rows <= _WIDEN_BLOCK and _widens(q_BTHD.dtype):
        q_BTHD, k_BTHD, v_BTHD = q_BTHD.float(), k_BTHD.float(), v_BTHD.float()
    block = _square(rows, q_BTHD.dtype)
    if block >= rows:
        return _flash(q_BTHD, k_BTHD, v_BTHD, True, scale)
    out_BTHD, lse_BHT = empty_partial(q_BTHD)
    for start in range(0, rows, block):
        own = slice(start, min(start + block, rows))
        square = _causal(q_BTHD[:, own], k_BTHD[:, own], v_BTHD[:, own], scale)
        merge_into(out_BTHD[:, own], lse_BHT[:, :, own], *square)
        if start:
            left = _full(q_BTHD[:, own], k_BTHD[:, :start], v_BTHD[:, :start], scale)
            merge_into(out_BTHD[:, own], lse_BHT[:, :, own], *left)
    return out_BTHD, lse_BHT


def _square(rows: int, dtype: torch.dtype) -> int:
    if _widens(dtype):
        return _WIDEN_BLOCK
    alone = torch.get_num_threads() == 1
    return _SPLIT_SQUARE if alone and dtype.itemsize >= 4 and rows <= _SPLIT_UP_TO else rows


def _packed(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scale: float) -> Partial:
    """A full tile; the query heads of a group become rows of one head when rows are few."""
    rows, heads_kv = q_BTHD.shape[1], k_BTHD.shape[2]
    group = q_BTHD.shape[2] // heads_kv
    if group == 1 or rows > _PACK_ROWS:
        return _flash(q_BTHD, k_BTHD, v_BTHD, False, scale)
    q_BRHD = torch.unflatten(q_BTHD, 2, (heads_kv, group)).transpose(2, 3).flatten(1, 2)
    out_BRHD, lse_BHR = _flash(q_BRHD, k_BTHD, v_BTHD, False, scale)
    out_BTHD = torch.unflatten(out_BRHD, 1, (rows, group)).transpose(2, 3).flatten(2, 3)
    lse_BHTG = torch.unflatten(lse_BHR, 2, (rows, group))
    return out_BTHD, lse_BHTG.transpose(2, 3).flatten(1, 2)


def _flash(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, causal: bool, scale: float) -> Partial:
    """The kernel itself. Its `causal` is top-left, hence squares only."""
    rows, keys = q_BTHD.shape[1], k_BTHD.shape[1]
    assert keys > 0
    assert not causal or rows == keys
    q_BHTD, k_BHTD, v_BHTD = (_heads_first(x) for x in (q_BTHD, k_BTHD, v_BTHD))
    if rows == 1 and q_BTHD.dtype.itemsize == 2:
        q_BHTD = q_BHTD.expand(-1, -1, 2, -1)  # one 16-bit row takes a path 3 times slower than two
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out_BHTD, lse_BHT = kernel(q_BHTD, k_BHTD, v_BHTD, 0.0, causal, scale=scale)
    # Its lse lies in memory as (B, T, H): read so, one merge costs 3 times as much.
    return out_BHTD[:, :, :rows].transpose(1, 2), lse_BHT[:, :, :rows].contiguous()


def _heads_first(x_BTHD: Tensor) -> Tensor:
    # The kernel takes the last stride for 1 without looking, and reads wrong numbers.
    dense = x_BTHD if x_BTHD.stride(3) == 1 or x_BTHD.shape[3] == 1 else x_BTHD.contiguous()
    return dense.transpose(1, 2)


def _widens(dtype: torch.dtype) -> bool:
    # With AMX, 16-bit products are several times as fast: there the speed is worth the rounding.
    return dtype.itemsize == 2 and not torch.cpu._is_amx_tile_supported()
