"""The merge of partial results, one pass over them: reads each once, writes once.

B batch, T query rows, H query heads, D head dim, N partials. lse natural log; float32.
Rows of the kernel are the B*T*H heads of tokens, in that order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .merge import Partial
from .triton_tools import FUSE, block_d, launch, merged

# these change from call to call: no kernel of their own for multiples of 16, or for 1
_VOLATILE = ["sm_n", "sm_b", "sm_h", "sl_b", "sl_h"]


def merge_partials(
    outs_NBTHD: Tensor, lses_NBHT: Tensor, out_BTHD: Tensor, lse_BHT: Tensor, *, into: bool
) -> None:
    """Merge N partials, in order, into `out` and `lse`, which they replace unless `into`.

    outs in any floating dtype, the others float32; all may be strided views.
    """
    count, B, T, H, D = outs_NBTHD.shape
    rows = B * T * H
    if rows == 0:
        return
    strides = (x.stride() for x in (outs_NBTHD, lses_NBHT, out_BTHD, lse_BHT))
    numbers = (rows, T, H, count, *(s for each in strides for s in each))
    options = {"HEAD_DIM": D, "BLOCK_D": block_d(D), "ROWS": merge_rows(D), "INTO": into}
    options |= {"num_warps": 4, "num_stages": 2, **FUSE}
    grid = (triton.cdiv(rows, merge_rows(D)),)
    tensors = (outs_NBTHD, lses_NBHT, out_BTHD, lse_BHT)
    launch(
        lambda: _merge[grid](*tensors, *numbers, **options),
        out_BTHD.device,
    )


def merge_rows(head_dim: int) -> int:
    """Rows of a program: 16 elements of each for a thread, which spills nothing."""
    return 2048 // block_d(head_dim)


def merge_many(outs_NBTHD: Tensor, lses_NBHT: Tensor) -> Partial:
    """`merge.merge_many` for float32 results on a CUDA device."""
    out_BTHD = torch.empty(outs_NBTHD.shape[1:], dtype=torch.float32, device=outs_NBTHD.device)
    lse_BHT = torch.empty(lses_NBHT.shape[1:], dtype=torch.float32, device=outs_NBTHD.device)
    merge_partials(outs_NBTHD, lses_NBHT, out_BTHD, lse_BHT, into=False)
    return out_BTHD, lse_BHT


@triton.jit(do_not_specialize=["rows", "T", "count", *_VOLATILE])
def _merge(
    outs,
    lses,
    out,
    lse,
    rows,
    T,
    H,
    count,
    si_n,
    si_b,
    si_t,
    si_h,
    si_d,
    sm_n,
    sm_b,
    sm_h,
    sm_t,
    so_b,
    so_t,
    so_h,
    so_d,
    sl_b,
    sl_h,
    sl_t,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    INTO: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    h, t, b = row % H, row // H % T, row // H // T
    d = tl.arange(0, BLOCK_D)
    both = inside[:, None] & (d < HEAD_DIM)[None, :]
    to = out + (b * so_b + t * so_t + h * so_h)[:, None] + d[None, :] * so_d
    to_lse = lse + b * sl_b + h * sl_h + t * sl_t
    if INTO:
        acc = tl.load(to, mask=both, other=0.0)
        total = tl.load(to_lse, mask=inside, other=float("-inf"))
    else:
        acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
        total = tl.full((ROWS,), float("-inf"), tl.float32)
    source = outs + (b * si_b + t * si_t + h * si_h)[:, None] + d[None, :] * si_d
    source_lse = lses + b * sm_b + h * sm_h + t * sm_t
    for _ in tl.range(0, count):
        part = tl.load(source, mask=both, other=0.0).to(tl.float32)
        part_lse = tl.load(source_lse, mask=inside, other=float("-inf")).to(tl.float32)
        acc, total = merged(acc, total, part, part_lse)
        source += si_n
        source_lse += sm_n
    tl.store(to, acc, mask=both)
    tl.store(to_lse, total, mask=inside)
