"""Attention of many rows: a tile of rows reads the keys that its band shows, block by block.

FlashAttention-2 (Dao 2023, section 3.1): online softmax, rows in parallel, the longest first.
Two kernels: `_full` has one loop without masks, for whole blocks of keys that every row sees,
and is warp-specialised (Triton's pass takes a single loop only); `_banded` visits masked blocks
left of the fully visible ones, those, and masked ones right of them. Both merge into a running
float32 pair in their last lines.

B batch, Tq rows, Tk keys, H query heads, Hkv KV heads, G = H // Hkv, D head dim.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .band import Band
from .merge import Partial, empty_partial
from .triton_tools import (
    FUSE,
    LOG2E,
    BandArgs,
    band_args,
    block_d,
    copies_in_bulk,
    device_of,
    end_of_keys,
    finished,
    first_key,
    launch,
    merged,
    positive_scale,
    precision,
    rows_dense,
    shown,
    softcapped,
)

_HALF = (torch.bfloat16, torch.float16)
# these change from call to call: no kernel of their own for multiples of 16, or for 1
_VOLATILE = ["rows", "keys", "sl_b", "sl_h"]


class Tiling(NamedTuple):
    """Rows and keys of a tile, the warps that share it, and how many loads are in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


def encode(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    band: Band | None,
    scale: float,
    softcap: float | None,
    into: Partial | None,
    *,
    bulk: bool | None = None,
) -> Partial:
    """`api.attend` by these kernels, on a CUDA device of capability 8.0 or later.

    `bulk` says whether tiles are fetched by the bulk copy engine; None: where there is one and
    the tensors are aligned for it.
    """
    if q_BTHD.numel() == 0 or k_BTHD.shape[1] == 0:
        return empty_partial(q_BTHD) if into is None else into
    q_BTHD, scale = positive_scale(q_BTHD, scale)
    q_BTHD, k_BTHD, v_BTHD = (rows_dense(x) for x in (q_BTHD, k_BTHD, v_BTHD))
    capability = device_of(q_BTHD.device).capability
    if bulk is None:
        # float32 products run outside the matrix units, and spill behind descriptors
        fits = capability >= (9, 0) and q_BTHD.dtype in _HALF
        bulk = fits and copies_in_bulk(q_BTHD, k_BTHD, v_BTHD)
    args, tokens = band_args(band), k_BTHD.shape[1]
    fast = specialised(capability, q_BTHD) if bulk and not args.hides and softcap is None else None
    whole = tokens // fast.keys * fast.keys if fast else 0
    if whole:
        assert fast is not None
        keys = slice(0, whole)
        into = _launch(
            _full, fast, q_BTHD, k_BTHD[:, keys], v_BTHD[:, keys], args, scale, None, into
        )
        if whole == tokens:
            return into
        k_BTHD, v_BTHD = k_BTHD[:, whole:], v_BTHD[:, whole:]
    plain = tiling(q_BTHD.dtype, block_d(q_BTHD.shape[3]), q_BTHD.shape[1], bulk)
    return _launch(_banded, plain, q_BTHD, k_BTHD, v_BTHD, args, scale, softcap, into, bulk)


def specialised(capability: tuple[int, int], q_BTHD: Tensor) -> Tiling | None:
    """The warp-specialised kernel's tiles: 4 warps fetch, and 4 for each half of the rows."""
    wide = block_d(q_BTHD.shape[3])
    if capability[0] != 9 or q_BTHD.dtype not in _HALF or wide not in (64, 128):
        return None
    return Tiling(128, 128, 4, 2) if q_BTHD.shape[1] > 64 else None


def tiling(dtype: torch.dtype, wide: int, rows: int, bulk: bool) -> Tiling:
    """What fits without spilled registers, in 99 KiB of shared memory, or 227 KiB on the cards
    that have the bulk copy engine."""
    if dtype not in _HALF:
        chosen = Tiling(32, 16, 8, 1) if wide > 128 else Tiling(32, 32, 8, 1)
    elif bulk:
        chosen = Tiling(64, 64, 8, 2) if wide > 128 else Tiling(128, 128, 8, 2)
    elif wide > 128:
        chosen = Tiling(64, 32, 8, 2)
    else:
        chosen = Tiling(128, 32, 8, 3) if wide > 64 else Tiling(128, 64, 8, 3)
    if rows > chosen.rows // 2:
        return chosen
    return chosen._replace(rows=max(16, triton.next_power_of_2(rows)), warps=4)


def _launch(
    kernel: triton.JITFunction,
    tiles: Tiling,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    band: BandArgs,
    scale: float,
    softcap: float | None,
    into: Partial | None,
    bulk: bool = True,
) -> Partial:
    B, rows, heads, dim = q_BTHD.shape
    # every element is written: nothing to fill beforehand
    out_BTHD, lse_BHT = _fresh(q_BTHD) if into is None else into
    options: dict[str, Any] = {
        "HEAD_DIM": dim,
        "BLOCK_D": block_d(dim),
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "INTO": into is not None,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        **FUSE,
    }
    capped = softcap is not None
    factor = scale if capped else scale * LOG2E
    numbers: tuple[float, ...] = (factor,)
    if kernel is _banded:
        options |= {"BULK": bulk, "BANDED": band.hides, "WINDOWED": band.windowed}
        options |= {"CAPPED": capped, "PRECISION": precision(q_BTHD.dtype)}
        numbers = (*band, softcap or 0.0, factor)
    grid = (triton.cdiv(rows, tiles.rows), B * heads)
    sizes = (rows, k_BTHD.shape[1], heads, heads // k_BTHD.shape[2])
    strides = (
        *(s for x in (q_BTHD, k_BTHD, v_BTHD) for s in x.stride()[:3]),
        *out_BTHD.stride(),
        *lse_BHT.stride(),
    )
    tensors = (q_BTHD, k_BTHD, v_BTHD, out_BTHD, lse_BHT)
    launch(
        lambda: kernel[grid](*tensors, *strides, *sizes, *numbers, **options),
        q_BTHD.device,
        scratch=bulk,
    )
    return out_BTHD, lse_BHT


def _fresh(q_BTHD: Tensor) -> Partial:
    B, rows, heads, dim = q_BTHD.shape
    out_BTHD = torch.empty(B, rows, heads, dim, dtype=torch.float32, device=q_BTHD.device)
    return out_BTHD, torch.empty(B, heads, rows, dtype=torch.float32, device=q_BTHD.device)


@triton.jit
def _source(
    x,
    stride_b,
    stride_t,
    stride_h,
    b,
    h,
    tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COUNT: tl.constexpr,
    BULK: tl.constexpr,
):
    """Head h of sequence b: a descriptor of its (tokens, HEAD_DIM), or where it starts."""
    x += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    if BULK:
        return tl.make_tensor_descriptor(x, [tokens, HEAD_DIM], [stride_t, 1], [COUNT, BLOCK_D])
    else:
        return x


@triton.jit
def _rows(
    x,
    start,
    stride_t,
    tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COUNT: tl.constexpr,
    BULK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """(COUNT, BLOCK_D) from token `start`, zeros beyond the tensor; WHOLE: all are within it."""
    if BULK:
        return x.load([start, 0])
    else:
        t = start + tl.arange(0, COUNT)
        d = tl.arange(0, BLOCK_D)
        at = x + t.to(tl.int64)[:, None] * stride_t + d[None, :]
        if WHOLE and HEAD_DIM == BLOCK_D:
            return tl.load(at)
        elif WHOLE:
            return tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0.0)
        else:
            return tl.load(at, mask=(t < tokens)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _softmax_step(acc, l, m, s, factor, v, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """A block of scores s (ROWS, KEYS), in units of log2 once multiplied by factor."""
    m_new = tl.maximum(m, tl.max(s, 1) * factor)
    shift = m_new
    if MASKED:  # a row that has seen nothing yet has no maximum to subtract
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * factor - shift[:, None])
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, l, m_new


@triton.jit
def _write(
    acc,
    l,
    m,
    out,
    lse,
    so_b,
    so_t,
    so_h,
    so_d,
    sl_b,
    sl_h,
    sl_t,
    b,
    h,
    i,
    rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTO: tl.constexpr,
):
    """The rows' result, or its merge with what is there: no pass of its own over out."""
    result, natural = finished(acc, m, l)
    d = tl.arange(0, BLOCK_D)
    i64 = i.to(tl.int64)
    out += b.to(tl.int64) * so_b + h.to(tl.int64) * so_h
    lse += b.to(tl.int64) * sl_b + h.to(tl.int64) * sl_h
    at = out + i64[:, None] * so_t + d[None, :] * so_d
    inside = (i < rows)[:, None] & (d < HEAD_DIM)[None, :]
    if INTO:
        there = tl.load(lse + i64 * sl_t, mask=i < rows, other=float("-inf"))
        result, natural = merged(tl.load(at, mask=inside, other=0.0), there, result, natural)
    tl.store(at, result, mask=inside)
    tl.store(lse + i64 * sl_t, natural, mask=i < rows)


@triton.jit(do_not_specialize=_VOLATILE)
def _full(
    q,
    k,
    v,
    out,
    lse,
    sq_b,
    sq_t,
    sq_h,
    sk_b,
    sk_t,
    sk_h,
    sv_b,
    sv_t,
    sv_h,
    so_b,
    so_t,
    so_h,
    so_d,
    sl_b,
    sl_h,
    sl_t,
    rows,
    keys,
    heads,
    group,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    INTO: tl.constexpr,
):
    """All rows see all keys, and keys % KEYS == 0."""
    start = tl.program_id(0) * ROWS
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    q_rows = _source(q, sq_b, sq_t, sq_h, b, h, rows, HEAD_DIM, BLOCK_D, ROWS, True)
    k_rows = _source(k, sk_b, sk_t, sk_h, b, h // group, keys, HEAD_DIM, BLOCK_D, KEYS, True)
    v_rows = _source(v, sv_b, sv_t, sv_h, b, h // group, keys, HEAD_DIM, BLOCK_D, KEYS, True)
    q_tile = q_rows.load([start, 0])
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for j in tl.range(0, keys, KEYS, warp_specialize=True):
        s = tl.dot(q_tile, k_rows.load([j, 0]).T)
        acc, l, m = _softmax_step(acc, l, m, s, factor, v_rows.load([j, 0]), False, "tf32")
    i = start + tl.arange(0, ROWS)
    _write(
        acc,
        l,
        m,
        out,
        lse,
        so_b,
        so_t,
        so_h,
        so_d,
        sl_b,
        sl_h,
        sl_t,
        b,
        h,
        i,
        rows,
        HEAD_DIM,
        BLOCK_D,
        INTO,
    )


@triton.jit
def _visit(
    acc,
    l,
    m,
    q_tile,
    s_rows,
    k,
    v,
    sk_t,
    sv_t,
    start,
    stop,
    keys,
    window,
    k_step,
    softcap,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    BULK: tl.constexpr,
    MASKED: tl.constexpr,
    BANDED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The key blocks from `start`, a multiple of KEYS, up to `stop`."""
    for j in tl.range(start, stop, KEYS):
        k_tile = _rows(k, j, sk_t, keys, HEAD_DIM, BLOCK_D, KEYS, BULK, not MASKED)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        if CAPPED:
            s = softcapped(s * factor, softcap)
        if MASKED:
            index = j + tl.arange(0, KEYS)
            seen = (index < keys)[None, :]
            if BANDED:
                seen = seen & shown(s_rows, index, window, k_step, WINDOWED)
            s = tl.where(seen, s, float("-inf"))
        v_tile = _rows(v, j, sv_t, keys, HEAD_DIM, BLOCK_D, KEYS, BULK, not MASKED)
        # capped scores are natural ones
        unit = 1.4426950408889634 if CAPPED else factor
        acc, l, m = _softmax_step(acc, l, m, s, unit, v_tile, MASKED, PRECISION)
    return acc, l, m


@triton.jit(do_not_specialize=[*_VOLATILE, "gap", "q_step", "k_step", "window"])
def _banded(
    q,
    k,
    v,
    out,
    lse,
    sq_b,
    sq_t,
    sq_h,
    sk_b,
    sk_t,
    sk_h,
    sv_b,
    sv_t,
    sv_h,
    so_b,
    so_t,
    so_h,
    so_d,
    sl_b,
    sl_h,
    sl_t,
    rows,
    keys,
    heads,
    group,
    gap,
    q_step,
    k_step,
    window,
    softcap,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    INTO: tl.constexpr,
    BULK: tl.constexpr,
    BANDED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Any band; the last rows, which see most, start first."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    q = _source(q, sq_b, sq_t, sq_h, b, h, rows, HEAD_DIM, BLOCK_D, ROWS, BULK)
    k = _source(k, sk_b, sk_t, sk_h, b, h // group, keys, HEAD_DIM, BLOCK_D, KEYS, BULK)
    v = _source(v, sv_b, sv_t, sv_h, b, h // group, keys, HEAD_DIM, BLOCK_D, KEYS, BULK)
    q_tile = _rows(q, start, sq_t, rows, HEAD_DIM, BLOCK_D, ROWS, BULK, False)
    i = start + tl.arange(0, ROWS)
    s_rows = gap + i * q_step
    # seen by any row: [left, stop); by all: [left_all, stop_all)
    left, stop = 0, keys
    left_all, stop_all = 0, keys
    if BANDED:
        s_first = gap + start * q_step
        s_last = gap + (tl.minimum(start + ROWS, rows) - 1) * q_step
        stop = tl.minimum(keys, end_of_keys(s_last, k_step))
        stop_all = tl.minimum(keys, end_of_keys(s_first, k_step))
        if WINDOWED:
            left = first_key(s_first, window, k_step) // KEYS * KEYS
            left_all = tl.cdiv(first_key(s_last, window, k_step), KEYS) * KEYS
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if WINDOWED:
        acc, l, m = _visit(
            acc,
            l,
            m,
            q_tile,
            s_rows,
            k,
            v,
            sk_t,
            sv_t,
            left,
            tl.minimum(left_all, stop),
            keys,
            window,
            k_step,
            softcap,
            factor,
            HEAD_DIM,
            BLOCK_D,
            KEYS,
            BULK,
            True,
            BANDED,
            WINDOWED,
            CAPPED,
            PRECISION,
        )
    middle = tl.maximum(left_all, stop_all // KEYS * KEYS)
    acc, l, m = _visit(
        acc,
        l,
        m,
        q_tile,
        s_rows,
        k,
        v,
        sk_t,
        sv_t,
        left_all,
        middle,
        keys,
        window,
        k_step,
        softcap,
        factor,
        HEAD_DIM,
        BLOCK_D,
        KEYS,
        BULK,
        False,
        BANDED,
        WINDOWED,
        CAPPED,
        PRECISION,
    )
    acc, l, m = _visit(
        acc,
        l,
        m,
        q_tile,
        s_rows,
        k,
        v,
        sk_t,
        sv_t,
        middle,
        stop,
        keys,
        window,
        k_step,
        softcap,
        factor,
        HEAD_DIM,
        BLOCK_D,
        KEYS,
        BULK,
        True,
        BANDED,
        WINDOWED,
        CAPPED,
        PRECISION,
    )
    _write(
        acc,
        l,
        m,
        out,
        lse,
        so_b,
        so_t,
        so_h,
        so_d,
        sl_b,
        sl_h,
        sl_t,
        b,
        h,
        i,
        rows,
        HEAD_DIM,
        BLOCK_D,
        INTO,
    )
