# python -m pytest tests/localflash/test_views.py -q
"""Cached KV: paged against dense, read through views of the pool."""

from dataclasses import dataclass

import pytest
import torch

from localflash import (
    BACKENDS,
    Band,
    DenseKV,
    PagedKV,
    attend,
    attend_cached,
    attend_cached_reference,
    attend_reference,
    merge,
)
from localflash.backends import Case

H, HKV, D, PAGE, POOL = 6, 2, 16, 8, 24
TABLE = torch.tensor([[4, 5, 6, 7, 8], [20, 3, 4, 11, 12], [23, 0, 0, 0, 0], [1, 1, 2, 0, 9]])
LENGTHS = [37, 33, 0, 8]
BY_NAME = pytest.mark.parametrize(
    ("name", "device"), [(name, device) for device in ("cpu", "cuda") for name in BACKENDS]
)
# of an output that a kernel may round to the dtype
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Place:
    """Where a back end runs, and in what."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def agree(self, got, want) -> None:
        tol = TOLERANCE[self.dtype]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def place(name: str, device: str) -> Place:
    """In float32 where the back end takes it; skips where it cannot run, with its reason."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{name}: no CUDA device here")
    for dtype in TOLERANCE:
        why = BACKENDS[name].unsupported(Case(torch.device(device), dtype, D, None))
        if not why:
            return Place(device, dtype)
    pytest.skip(f"{name}: {why}")


HERE = Place()


def pool(seed=0, at=HERE):
    torch.manual_seed(seed)
    return torch.randn(POOL, PAGE, HKV, D).to(at.device, at.dtype)


def paged(at=HERE, **changes) -> PagedKV:
    fields = {
        "k_pool": pool(1, at),
        "v_pool": pool(2, at),
        "block_table": TABLE.to(at.device),
        "lengths": torch.tensor(LENGTHS, device=at.device),
    }
    return PagedKV(**(fields | changes))


def dense(kv: PagedKV, b: int):
    """Sequence b token by token, without any of the code under test."""
    where = [divmod(t, PAGE) for t in range(int(kv.lengths[b]))]
    rows = [[p[kv.block_table[b, i], j] for i, j in where] for p in (kv.k_pool, kv.v_pool)]
    return [torch.stack(r)[None] if r else kv.k_pool.new_empty(1, 0, HKV, D) for r in rows]


def queries(tq=3, at=HERE):
    torch.manual_seed(5)
    return torch.randn(len(LENGTHS), tq, H, D).to(at.device, at.dtype)


def numbers(at, *shape):
    return torch.randn(*shape).to(at.device, at.dtype)


@BY_NAME
@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bands", [None, Band(20, 1, 0, 1), Band(30, 1, 0, 1, 9)])
def test_paged_equals_dense(name, device, table_dtype, bands):
    at = place(name, device)
    q, kv = queries(at=at), paged(at, block_table=TABLE.to(device, table_dtype))
    out, lse = attend_cached(q, kv, bands, backend=name)
    for b in range(len(LENGTHS)):
        want = attend_reference(q[b : b + 1], *dense(kv, b), bands)
        at.agree((out[b : b + 1], lse[b : b + 1]), want)


@BY_NAME
def test_each_sequence_its_band(name, device):
    at = place(name, device)
    q, kv = queries(at=at), paged(at)
    bands = [Band(n // 2, 1, 0, 1) if n else None for n in LENGTHS]
    out, lse = attend_cached(q, kv, bands, backend=name)
    for b, band in enumerate(bands):
        want = attend_reference(q[b : b + 1], *dense(kv, b), band)
        at.agree((out[b : b + 1], lse[b : b + 1]), want)


@BY_NAME
@pytest.mark.parametrize("each", [False, True])
def test_dense_view_equals_attend(name, device, each):
    at = place(name, device)
    q, k, v = queries(at=at), numbers(at, 4, 19, HKV, D), numbers(at, 4, 19, HKV, D)
    band = Band(6, 1, 0, 2)
    got = attend_cached(q, DenseKV(k, v), [band] * 4 if each else band, backend=name)
    at.agree(got, attend(q, k, v, band, backend=name))


@BY_NAME
def test_into_accumulates(name, device):
    at = place(name, device)
    q, kv = queries(at=at), paged(at)
    own = numbers(at, 4, 5, HKV, D)
    into = attend(q, own, own, backend=name)
    want = merge(*into, *attend_cached_reference(q, kv))
    got = attend_cached(q, kv, into=into, backend=name)
    assert got[0] is into[0] and got[1] is into[1]
    at.agree(got, want)


@BY_NAME
def test_scales_widen_a_quantised_pool(name, device):
    at = place(name, device)
    scale = torch.tensor([0.5, 3.0], device=device)
    low = {n: pool(i, at).to(torch.float8_e4m3fn) for i, n in enumerate(("k_pool", "v_pool"))}
    kv = paged(at, **low, k_scale=scale, v_scale=2 * scale)
    wide = paged(
        at,
        k_pool=low["k_pool"].float() * scale[:, None],
        v_pool=low["v_pool"].float() * 2 * scale[:, None],
    )
    q = queries(at=at)
    at.agree(attend_cached(q, kv, backend=name), attend_cached_reference(q, wide))


def test_runs_are_views_of_the_pool():
    kv = paged()
    segments = list(kv.segments(torch.float32))
    runs = [(s.batch.start, s.start, s.k_BTHD.shape[1]) for s in segments]
    assert runs == [(0, 0, 37), (1, 0, 8), (1, 8, 16), (1, 24, 9), (3, 0, 8)]
    for s in segments:
        for x, whole in ((s.k_BTHD, kv.k_pool), (s.v_BTHD, kv.v_pool)):
            assert x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_a_pool_with_gaps_between_pages_is_read_page_by_page():
    roomy = torch.randn(POOL, PAGE + 3, HKV, D)
    kv = paged(k_pool=roomy[:, :PAGE])
    assert [s.k_BTHD.shape[1] for s in kv.segments(torch.float32)][:5] == [8, 8, 8, 8, 5]
    q = queries()
    got, want = attend_cached(q, kv), attend_cached_reference(q, kv)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_table": TABLE.float()}, "block_table is .* must be"),
        ({"lengths": torch.tensor([1.0] * 4)}, "lengths is .* integers"),
        ({"v_pool": torch.zeros(1, 1, 1, 1)}, "k_pool and v_pool are"),
        ({"k_scale": torch.ones(3)}, r"k_scale is \(3,\): must be \(2,\)"),
        ({"block_table": TABLE + 16}, "block_table.0. names pages 20 to 24: the pool has 0 to 23"),
        ({"block_table": TABLE - 5}, "block_table.0. names pages -1"),
        ({"lengths": torch.tensor([41, 0, 0, 0])}, r"lengths\[0\]=41: .*room for 0 to 40"),
        ({"lengths": torch.tensor([-9, 0, 0, 0])}, r"lengths\[0\]=-9"),
    ],
)
def test_a_broken_view_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        attend_cached(queries(), paged(**changes))


def test_batch_and_bands_must_match():
    with pytest.raises(ValueError, match="kv has 4 sequences: must be 1"):
        attend_cached(queries()[:1], paged())
    with pytest.raises(ValueError, match="bands has 2 entries: must be one per sequence, 4"):
        attend_cached(queries(), paged(), [None, None])
    with pytest.raises(ValueError, match="bands holds a int"):
        attend_cached(queries(), paged(), [1, 2, 3, 4])
