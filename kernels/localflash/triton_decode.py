"""Attention of few rows to many keys: the keys are split, the partial results merged.

Flash-Decoding (Dao, Haziza, Massa, Sizov 2023).  The query heads of a KV head, and all rows of a
sequence, become rows of one tile, so that each key is read once.  Lengths and block tables are
read on the device: a captured graph may be replayed as they grow.

With `phi`, the splits share one shift instead of their own maxima (FlashDecoding++, Hong et al.
2023, section 3: unified max): their sums then add.  Rows for which that over- or underflows are
computed again with maxima, by a second launch that a flag on the device lets do nothing.

B sequences, Tq rows of each, H query heads, Hkv KV heads, G = H // Hkv, R = Tq*G packed rows,
D head dim, S splits, P pages.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .band import Band
from .merge import Partial, empty_partial
from .reference import Bands
from .triton_merge import merge_partials, merge_rows
from .triton_tools import (
    FUSE,
    LOG2E,
    band_args,
    block_d,
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
from .views import DenseKV, KVView, PagedKV

_MOST_ROWS = 64  # of a tile: more rows are further tiles, each of which reads the keys again
_MOST_SPLITS = 128
_TILE_BYTES = 16384
# these change from call to call: no kernel of their own for multiples of 16, or for 1
_VOLATILE = ["splits", "sl_b", "sl_h"]
_BAND = ["sl_s", "gap", "q_step", "k_step", "window"]


class Source(NamedTuple):
    """A KVView as the kernel takes it: dense is one page of all tokens for each sequence."""

    k: Tensor
    v: Tensor
    table: Tensor | None
    lengths: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    page: int
    capacity: int


def decode(
    q_BTHD: Tensor,
    kv: KVView,
    bands: Bands,
    scale: float,
    softcap: float | None,
    into: Partial | None,
    *,
    phi_H: Tensor | None = None,
    splits: int | None = None,
) -> Partial:
    """`api.attend_cached` by these kernels.

    phi_H (H,) float32: the shift of each query head, near its rows' lse; None: maxima.
    splits: how many parts the keys are read in; None: what fills the device.
    """
    q_BTHD, scale = positive_scale(rows_dense(q_BTHD), scale)
    source = _source(kv)
    if q_BTHD.numel() == 0 or source.capacity == 0:
        return empty_partial(q_BTHD) if into is None else into
    B, tokens, heads, _ = q_BTHD.shape
    heads_kv = source.k.shape[2]
    rows = _tile_rows(tokens * (heads // heads_kv))
    tiles = triton.cdiv(tokens * (heads // heads_kv), rows)
    keys = _tile_keys(source)
    if splits is None:
        processors = device_of(q_BTHD.device).processors
        splits = split_count(tiles * heads_kv * B, triton.cdiv(source.capacity, keys), processors)
    run = _Run(q_BTHD, source, bands, scale, softcap, rows, keys, tiles, splits)
    out = empty_partial(q_BTHD) if into is None else into
    if phi_H is not None:
        _unified(run, phi_H, out, into is not None)
    elif splits == 1:
        run.start(*out, into=into is not None)
    else:
        outs_SBTHD, lses_SBHT = run.workspace()
        run.start(outs_SBTHD, lses_SBHT)
        merge_partials(outs_SBTHD, lses_SBHT, *out, into=into is not None)
    return out


@lru_cache(maxsize=4096)
def split_count(programs: int, blocks: int, processors: int) -> int:
    """The fewest splits whose waves keep the processors 85% as busy as the best number would.

    `programs` without splits, `blocks` of keys to split.  With enough work there are none.
    """
    if programs >= 0.8 * processors:
        return 1

    def busy(splits: int) -> float:
        waves = programs * splits / processors
        return waves / -(-programs * splits // processors)

    counts = range(1, max(1, min(_MOST_SPLITS, blocks, processors)) + 1)
    # numbers that leave the longest split as long as fewer do are no choice
    useful = [s for s in counts if s == 1 or -(-blocks // s) != -(-blocks // (s - 1))]
    best = max(map(busy, useful))
    return next(s for s in useful if busy(s) >= 0.85 * best)


class _Run(NamedTuple):
    """One attention over the keys of each sequence, ready to be started."""

    q_BTHD: Tensor
    source: Source
    bands: Bands
    scale: float
    softcap: float | None
    rows: int
    keys: int
    tiles: int
    splits: int

    def workspace(self) -> Partial:
        """Empty partials of all splits: out (S, B, Tq, H, D), lse (S, B, H, Tq), float32."""
        B, tokens, heads, dim = self.q_BTHD.shape
        like = torch.empty(0, dtype=torch.float32, device=self.q_BTHD.device)
        outs_SBTHD = like.new_empty(self.splits, B, tokens, heads, dim)
        return outs_SBTHD, like.new_empty(self.splits, B, heads, tokens)

    def start(
        self,
        out: Tensor,
        lse: Tensor,
        *,
        into: bool = False,
        phi_H: Tensor | None = None,
        exact: Tensor | None = None,
        flags_BHT: Tensor | None = None,
    ) -> None:
        """Write (merge, with `into`) each split's partial; (S, ...) where there are splits."""
        q, source = self.q_BTHD, self.source
        B, tokens, heads, dim = q.shape
        heads_kv = source.k.shape[2]
        table, band, each = _band_table(self.bands, q.device)
        capped = self.softcap is not None
        factor = self.scale if capped else self.scale * LOG2E
        tensors = (q, *source[:6], table, phi_H, exact, flags_BHT, out, lse)
        strides = (*q.stride()[:3], *source.k.stride()[:3], *source.v.stride()[:3])
        table_step = 0 if source.table is None else source.table.stride(0)
        outer = (out.stride(0), lse.stride(0)) if out.ndim == 5 else (0, 0)
        strides = (*strides, table_step, outer[0], *out.stride()[-4:], outer[1], *lse.stride()[-3:])
        sizes = (tokens, heads // heads_kv, source.capacity, source.page, self.splits)
        numbers = (*band, self.softcap or 0.0, factor)
        options: dict[str, Any] = {
            "HEAD_DIM": dim,
            "BLOCK_D": block_d(dim),
            "ROWS": self.rows,
            "KEYS": self.keys,
            "PAGED": source.table is not None,
            "SPANS": source.page % self.keys != 0,
            "BANDED": band.hides or each,
            "WINDOWED": band.windowed or each,
            "EACH": each,
            "CAPPED": capped,
            "INTO": into,
            "UNIFIED": phi_H is not None,
            "FLAGGED": flags_BHT is not None,
            "PRECISION": precision(q.dtype),
            # float32 products run outside the matrix units, in registers
            "num_warps": 8 if q.dtype == torch.float32 else 4,
            **FUSE,
            "num_stages": 1 if q.dtype == torch.float32 else 3,
        }
        grid = (self.tiles * self.splits, heads_kv, B)
        launch(lambda: _decode[grid](*tensors, *strides, *sizes, *numbers, **options), q.device)


def _unified(run: _Run, phi_H: Tensor, out: Partial, into: bool) -> None:
    """Sums that add; then, for the rows that `flags` names, maxima after all."""
    B, tokens, heads, dim = run.q_BTHD.shape
    sums_SBTHD, rounded_SBHT = run.workspace()
    exact_SBHT = torch.empty_like(rounded_SBHT)
    flags_BHT = torch.empty(B, heads, tokens, dtype=torch.int32, device=phi_H.device)
    run.start(sums_SBTHD, rounded_SBHT, phi_H=phi_H, exact=exact_SBHT)
    numbers = (B * tokens * heads, tokens, heads, run.splits, *out[0].stride(), *out[1].stride())
    rows = merge_rows(dim)
    options = {"HEAD_DIM": dim, "BLOCK_D": block_d(dim), "ROWS": rows, "INTO": into}
    tensors = (sums_SBTHD, rounded_SBHT, exact_SBHT, phi_H, flags_BHT, *out)
    grid = (triton.cdiv(B * tokens * heads, rows),)
    launch(lambda: _add[grid](*tensors, *numbers, **options, num_warps=4, **FUSE), phi_H.device)
    again = run._replace(splits=1)
    again.start(*out, into=into, flags_BHT=flags_BHT)


def _tile_rows(packed: int) -> int:
    return min(_MOST_ROWS, max(16, triton.next_power_of_2(packed)))


def _tile_keys(source: Source) -> int:
    """Keys of a tile: 16 KiB as stored, so that 3 stages of K and V fit any card; whole pages."""
    row = block_d(source.k.shape[3]) * source.k.element_size()
    most = max(16, min(128, _TILE_BYTES // row))
    while most > 16 and source.page % most:
        most //= 2
    return most if source.page % most == 0 else 64


def _source(kv: KVView) -> Source:
    if isinstance(kv, DenseKV):
        k, v = rows_dense(kv.k_BTHD), rows_dense(kv.v_BTHD)
        tokens = k.shape[1]
        return Source(k, v, None, None, None, None, 1 << 30, tokens)
    assert isinstance(kv, PagedKV), type(kv)
    k, v, page = rows_dense(kv.k_pool), rows_dense(kv.v_pool), kv.k_pool.shape[1]
    capacity = kv.block_table.shape[1] * page
    table = kv.block_table if kv.block_table.stride(1) == 1 else kv.block_table.contiguous()
    lengths = kv.lengths.to(device=k.device).contiguous()
    return Source(k, v, table, lengths, kv.k_scale, kv.v_scale, page, capacity)


def _band_table(bands: Bands, device: torch.device) -> tuple[Tensor | None, Any, bool]:
    """(a row for each sequence if their bands differ, the band of all, whether they differ)."""
    if bands is None or isinstance(bands, Band):
        return None, band_args(bands), False
    hides_nothing = (1 << 29, 1, 1, 0)
    rows = [band_args(band) if band is not None else hides_nothing for band in bands]
    # a window that reaches back over everything is none
    rows = [(gap, q, k, window or 1 << 30) for gap, q, k, window in rows]
    table = torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True)
    return table, band_args(None), True


@triton.jit
def _keys(
    x,
    scale,
    table,
    b,
    h,
    j,
    stop,
    stride_p,
    stride_t,
    stride_h,
    page,
    dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    PAGED: tl.constexpr,
    SPANS: tl.constexpr,
):
    """(KEYS, BLOCK_D) of tokens j.. of sequence b in `dtype`, zeros from `stop` on."""
    t = j + tl.arange(0, KEYS)
    d = tl.arange(0, BLOCK_D)
    mask = (t < stop)[:, None] & (d < HEAD_DIM)[None, :]
    x += h.to(tl.int64) * stride_h
    if not PAGED:
        at = x + b.to(tl.int64) * stride_p + t.to(tl.int64)[:, None] * stride_t + d[None, :]
    elif SPANS:  # a tile of several pages: an entry for each token
        pages = tl.load(table + t // page, mask=t < stop, other=0).to(tl.int64)
        at = x + (pages * stride_p + (t % page) * stride_t)[:, None] + d[None, :]
    else:
        start = tl.load(table + j // page).to(tl.int64) * stride_p
        at = x + start + (t % page).to(tl.int64)[:, None] * stride_t + d[None, :]
    return tl.load(at, mask=mask, other=0.0).to(dtype)


@triton.jit(do_not_specialize=[*_VOLATILE, "tokens", "capacity", "table_step", *_BAND])
def _decode(
    q,
    k,
    v,
    table,
    lengths,
    k_scale,
    v_scale,
    band_rows,
    phi,
    exact,
    flags,
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
    table_step,
    so_s,
    so_b,
    so_t,
    so_h,
    so_d,
    sl_s,
    sl_b,
    sl_h,
    sl_t,
    tokens,
    group,
    capacity,
    page,
    splits,
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
    PAGED: tl.constexpr,
    SPANS: tl.constexpr,
    BANDED: tl.constexpr,
    WINDOWED: tl.constexpr,
    EACH: tl.constexpr,
    CAPPED: tl.constexpr,
    INTO: tl.constexpr,
    UNIFIED: tl.constexpr,
    FLAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    hk, b = tl.program_id(1), tl.program_id(2)
    row = tile * ROWS + tl.arange(0, ROWS)  # token-major: heads of a group are neighbours
    inside = row < tokens * group
    i, h = row // group, hk * group + row % group
    wanted = inside
    if FLAGGED:
        asked = tl.load(
            flags + (b * tl.num_programs(1) * group + h) * tokens + i, mask=inside, other=0
        )
        wanted = inside & (asked > 0)
        if tl.max(wanted.to(tl.int32)) == 0:
            return
    length = capacity
    if PAGED:
        length = tl.minimum(capacity, tl.load(lengths + b).to(tl.int32))
        table += b * table_step
    if EACH:
        gap, q_step = tl.load(band_rows + b * 4), tl.load(band_rows + b * 4 + 1)
        k_step, window = tl.load(band_rows + b * 4 + 2), tl.load(band_rows + b * 4 + 3)
    s_rows = gap + i * q_step
    left, stop = 0, length
    if BANDED:
        s_first = gap + (tile * ROWS // group) * q_step
        s_last = gap + (tl.minimum(tile * ROWS + ROWS, tokens * group) - 1) // group * q_step
        stop = tl.minimum(length, end_of_keys(s_last, k_step))
        if WINDOWED:
            left = first_key(s_first, window, k_step) // KEYS * KEYS
    # whole tiles, dealt evenly
    part = tl.cdiv(tl.cdiv(tl.maximum(stop - left, 0), KEYS), splits) * KEYS
    left += split * part
    stop = tl.minimum(stop, left + part)

    d = tl.arange(0, BLOCK_D)
    q += b.to(tl.int64) * sq_b
    q_at = q + (i.to(tl.int64) * sq_t + h.to(tl.int64) * sq_h)[:, None] + d[None, :]
    q_tile = tl.load(q_at, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    if k_scale is not None:  # a head's scale belongs to all its scores
        factor *= tl.load(k_scale + hk)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    l_exact = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if UNIFIED:
        m = tl.load(phi + h, mask=inside, other=0.0) * 1.4426950408889634
    for j in tl.range(left, stop, KEYS):
        k_tile = _keys(
            k,
            k_scale,
            table,
            b,
            hk,
            j,
            stop,
            sk_b,
            sk_t,
            sk_h,
            page,
            q_tile.dtype,
            HEAD_DIM,
            BLOCK_D,
            KEYS,
            PAGED,
            SPANS,
        )
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * factor
        if CAPPED:
            s = softcapped(s, softcap) * 1.4426950408889634
        index = j + tl.arange(0, KEYS)
        seen = (index < stop)[None, :]
        if BANDED:
            seen = seen & shown(s_rows, index, window, k_step, WINDOWED)
        s = tl.where(seen, s, float("-inf"))
        v_tile = _keys(
            v,
            v_scale,
            table,
            b,
            hk,
            j,
            stop,
            sv_b,
            sv_t,
            sv_h,
            page,
            q_tile.dtype,
            HEAD_DIM,
            BLOCK_D,
            KEYS,
            PAGED,
            SPANS,
        )
        if UNIFIED:
            p = tl.exp2(s - m[:, None])
            l_exact += tl.sum(p, 1)
            p = p.to(v_tile.dtype)
            l += tl.sum(p.to(tl.float32), 1)  # of what multiplies v
            acc = tl.dot(p, v_tile, acc, input_precision=PRECISION)
        else:
            m_new = tl.maximum(m, tl.max(s, 1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - shift[:, None])
            alpha = tl.exp2(m - shift)
            l = l * alpha + tl.sum(p, 1)
            acc = tl.dot(
                p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION
            )
            m = m_new
    if v_scale is not None:
        acc *= tl.load(v_scale + hk)

    out += split.to(tl.int64) * so_s + b.to(tl.int64) * so_b
    lse += split.to(tl.int64) * sl_s + b.to(tl.int64) * sl_b
    at = out + (i.to(tl.int64) * so_t + h.to(tl.int64) * so_h)[:, None] + d[None, :] * so_d
    at_lse = lse + h.to(tl.int64) * sl_h + i.to(tl.int64) * sl_t
    both = wanted[:, None] & (d < HEAD_DIM)[None, :]
    if UNIFIED:
        exact += split.to(tl.int64) * sl_s + b.to(tl.int64) * sl_b
        tl.store(at, acc, mask=both)
        tl.store(at_lse, l, mask=wanted)
        tl.store(exact + h.to(tl.int64) * sl_h + i.to(tl.int64) * sl_t, l_exact, mask=wanted)
    else:
        result, natural = finished(acc, m, l)
        if INTO:
            there = tl.load(at_lse, mask=wanted, other=float("-inf"))
            result, natural = merged(tl.load(at, mask=both, other=0.0), there, result, natural)
        tl.store(at, result, mask=both)
        tl.store(at_lse, natural, mask=wanted)


@triton.jit(do_not_specialize=[*_VOLATILE, "rows", "tokens"])
def _add(
    sums,
    rounded,
    exact,
    phi,
    flags,
    out,
    lse,
    rows,
    tokens,
    heads,
    splits,
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
    """The sums of all splits; a flag for each row whose shift was too far from its maximum."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    h, t, b = row % heads, row // heads % tokens, row // heads // tokens
    d = tl.arange(0, BLOCK_D)
    both = inside[:, None] & (d < HEAD_DIM)[None, :]
    by_head = (b * heads + h) * tokens + t
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    l_exact = tl.zeros((ROWS,), tl.float32)
    source = sums + row[:, None] * HEAD_DIM + d[None, :]
    for _ in tl.range(0, splits):
        acc += tl.load(source, mask=both, other=0.0)
        l += tl.load(rounded + by_head, mask=inside, other=0.0)
        l_exact += tl.load(exact + by_head, mask=inside, other=0.0)
        source += rows * HEAD_DIM
        by_head += rows
    by_head -= splits * rows
    # comparisons with NaN are false, and a maximum would pass over it; l within 2**-100..2**100
    whole = tl.min((tl.abs(acc) < float("inf")).to(tl.int32), 1) > 0
    fits = (
        whole & (l_exact < float("inf")) & (l > 7.888609052210118e-31) & (l < 1.2676506002282294e30)
    )
    tl.store(flags + by_head, (~fits).to(tl.int32), mask=inside)
    one = tl.where(fits, l, 1.0)
    result = acc / one[:, None]
    shift = tl.load(phi + h, mask=inside, other=0.0)
    natural = shift + tl.log2(tl.where(fits, l_exact, 1.0)) * 0.6931471805599453
    to = out + (b * so_b + t * so_t + h * so_h)[:, None] + d[None, :] * so_d
    to_lse = lse + b * sl_b + h * sl_h + t * sl_t
    if INTO:
        there = tl.load(to_lse, mask=inside, other=float("-inf"))
        result, natural = merged(tl.load(to, mask=both, other=0.0), there, result, natural)
    keep = inside & fits
    tl.store(to, result, mask=keep[:, None] & (d < HEAD_DIM)[None, :])
    tl.store(to_lse, natural, mask=keep)
