# TRITON_INTERPRET=1 python -m pytest tests/localflash/test_triton.py -q
"""Our kernels beyond the conformance suite: on a GPU, or in Triton's interpreter on the CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="there is no Triton for this system")

from localflash import (
    Band,
    DenseKV,
    PagedKV,
    attend,
    attend_cached,
    attend_cached_reference,
    attend_reference,
    empty_partial,
    merge,
    merge_many,
)
from localflash.triton_backend import few_rows
from localflash.triton_decode import decode, split_count
from localflash.triton_encode import Tiling, _full, _launch, encode
from localflash.triton_merge import merge_many as merge_many_here
from localflash.triton_merge import merge_partials
from localflash.triton_tools import band_args, interpreting, positive_scale
from tests.localflash.test_attend import BANDS, agree, data

DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
    ),
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    ),
]
ON = pytest.mark.parametrize("device", DEVICES)
STEPS = st.integers(1, 4)
ANY_BAND = st.builds(
    Band,
    st.integers(0, 60),
    STEPS,
    st.integers(0, 60),
    STEPS,
    st.one_of(st.none(), st.integers(1, 80)),
)


def close(got, want, tol=2e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double().cpu(), b.double().cpu(), rtol=tol, atol=tol)


def on(device, *tensors):
    return [x.to(device) for x in tensors]


@ON
@settings(max_examples=40, deadline=None)
@given(ANY_BAND, st.integers(1, 150), st.integers(1, 150))
def test_any_band(device, band, tq, tk):
    # one KV head, for the interpreter's sake; tests of conformance have two
    q, k, v = data(tq, tk, heads=(2, 1), batch=1, device=device)
    agree(encode(q, k, v, band, 0.25, None, None), q, k, v, band, tol=5e-6)
    got = decode(q, DenseKV(k, v), band, 0.25, None, None, splits=3)
    agree(got, q, k, v, band, tol=5e-6)


@ON
@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("band", ["all", "causal", "window", "unequal window"])
@pytest.mark.parametrize("dim", [16, 24])
def test_tiles_fetched_in_bulk_or_not(device, bulk, band, dim):
    if bulk and device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no bulk copy engine")
    q, k, v = data(150, 300, torch.float16, device, heads=(2, 1), dim=dim, batch=1)
    got = encode(q, k, v, BANDS[band], dim**-0.5, None, None, bulk=bulk)
    agree(got, q, k, v, BANDS[band])


@ON
@pytest.mark.parametrize("into", [False, True])
def test_the_loop_of_full_blocks(device, into):
    """The warp-specialised kernel, wherever it runs."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("written for Hopper")
    dim = 64 if device == "cuda" else 16
    q, k, v = data(200, 256, torch.float16, device, heads=(4, 2), dim=dim, batch=2)
    before = attend_reference(q, *data(200, 9, torch.float16, device, (4, 2), dim)[1:])
    running = tuple(x.clone() for x in before) if into else None
    tiles = Tiling(128, 128, 4, 2)
    got = _launch(_full, tiles, q, k, v, band_args(None), dim**-0.5, None, running)
    want = attend_reference(q.double(), k.double(), v.double())
    close(got, merge(*(x.double() for x in before), *want) if into else want, 2e-3)


@ON
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-3])
def test_any_scale(device, scale):
    q, k, v = data(40, 50, device=device)
    for got in (
        encode(q, k, v, BANDS["causal"], scale, None, None),
        decode(q, DenseKV(k, v), BANDS["causal"], scale, None, None),
    ):
        agree(got, q, k, v, BANDS["causal"], scale=scale)


@ON
def test_the_maximum_may_be_anywhere(device):
    """Scores that rise or fall by hundreds along the keys, and rows that see few of them."""
    q = torch.ones(1, 40, 2, 16, device=device)
    for slope in (3.0, -3.0):
        k = (slope * torch.arange(300.0, device=device)).view(1, 300, 1, 1).expand(1, 300, 1, 16)
        v = torch.randn(1, 300, 1, 16, generator=torch.Generator().manual_seed(0)).to(device)
        for band in (None, Band(0, 1, 0, 1), Band(250, 1, 0, 1, 3)):
            agree(encode(q, k, v, band, 0.25, None, None), q, k, v, band)
            agree(decode(q, DenseKV(k, v), band, 0.25, None, None, splits=4), q, k, v, band)


TABLE = torch.tensor([[4, 5, 6, 7, 8], [20, 3, 4, 11, 12], [23, 0, 0, 0, 0], [1, 1, 2, 0, 9]])
EACH = [None, Band(3, 1, 0, 1), None, Band(6, 1, 0, 1, 2)]


def pages(device, page=16, dtype=torch.float32, scales=None):
    g = torch.Generator().manual_seed(page)
    pools = 3 * torch.randn(2, 24, page, 2, 16, generator=g)
    if dtype == torch.int8:
        pools = (30 * pools).clamp(-127, 127).round()
    lengths = torch.tensor([4 * page + 5, 4 * page + 1, 0, page])
    k_pool, v_pool = pools.to(dtype)
    if scales is not None:
        scales = on(device, *torch.tensor(scales))
    return PagedKV(*on(device, k_pool, v_pool, TABLE, lengths), *(scales or ()))


@ON
@pytest.mark.parametrize("bands", [None, Band(20, 1, 0, 1), Band(70, 1, 0, 1, 9), EACH])
@pytest.mark.parametrize("page", [8, 12, 64])
@pytest.mark.parametrize("splits", [1, 3])
def test_pages(device, bands, page, splits):
    kv, (q, _, _) = pages(device, page), data(3, 1, batch=4, device=device)
    got = decode(q, kv, bands, 0.25, None, None, splits=splits)
    close(got, attend_cached_reference(q, kv, bands, 0.25))


@ON
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_pages(device, dtype):
    if device == "cuda" and dtype != torch.int8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no such fp8 on this device")
    kv = pages(device, 16, dtype, [[0.02, 0.01], [0.03, 0.05]])
    q, _, _ = data(3, 1, batch=4, device=device)
    close(decode(q, kv, None, 0.1, None, None), attend_cached_reference(q, kv, None, 0.1))


@ON
def test_lengths_and_tables_are_read_when_it_runs(device):
    kv, (q, _, _) = pages(device), data(1, 1, batch=4, device=device)
    decode(q, kv, None, 0.25, None, None)
    kv.lengths.copy_(torch.tensor([3, 80, 7, 16]))
    kv.block_table[0, 0] = 9
    close(decode(q, kv, None, 0.25, None, None), attend_cached_reference(q, kv, None, 0.25))


@ON
@pytest.mark.parametrize("phi", [0.0, 5.0, 200.0, -300.0])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("into", [False, True])
def test_unified_max(device, phi, splits, into):
    """A shift near the maxima, and one from which every row is computed again."""
    kv, (q, _, _) = pages(device), data(3, 1, batch=4, device=device)
    phi_H = torch.full((6,), phi, device=device)
    phi_H[1] = 2.0
    before = attend_reference(q, *data(3, 9, batch=4, device=device)[1:])
    running = tuple(x.clone() for x in before) if into else None
    got = decode(q, kv, None, 0.25, None, running, phi_H=phi_H, splits=splits)
    want = attend_cached_reference(q, kv, None, 0.25)
    close(got, merge(*before, *want) if into else want)


@ON
def test_unified_max_is_not_for_float16(device):
    """What is far below the shift would vanish, and the row would not be flagged."""
    q = torch.zeros(1, 1, 2, 16, dtype=torch.float16, device=device)
    phi_H = torch.zeros(2, device=device)
    with pytest.raises(ValueError, match="in float16 weights that are far below the shift"):
        attend_cached(q, DenseKV(q, q), None, phi=phi_H, backend="triton")


@ON
def test_unified_max_recomputes_the_rows_that_need_it(device):
    """Scores 400 above the shift for one head only: infinite sums, refused, right all the same."""
    q = torch.ones(1, 1, 4, 16, device=device)
    q[:, :, 2] *= 100
    k = torch.ones(1, 70, 1, 16, device=device)
    v = torch.randn(1, 70, 1, 16, generator=torch.Generator().manual_seed(0)).to(device)
    phi_H = torch.zeros(4, device=device)
    got = decode(q, DenseKV(k, v), None, 0.25, None, None, phi_H=phi_H, splits=2)
    assert torch.isfinite(got[0]).all()
    close(got, attend_reference(q, k, v, None, 0.25))


@ON
def test_unified_max_sees_one_bad_column(device):
    """Sums of one column that overflow to either side and meet: NaN, beside finite ones."""
    q, k = torch.zeros(1, 1, 2, 16, device=device), torch.zeros(1, 256, 1, 16, device=device)
    v = torch.ones(1, 256, 1, 16, device=device)
    v[:, :128, :, 3], v[:, 128:, :, 3] = 1e36, -1e36
    phi_H = torch.full((2,), -20.0, device=device)
    out, lse = decode(q, DenseKV(k, v), None, 0.25, None, None, phi_H=phi_H, splits=2)
    assert (out[..., 3].abs() < 1e30).all()  # 1e36 that cancels, to rounding
    out[..., 3] = 1
    close((out, lse), attend_reference(q, k, torch.ones_like(v), None, 0.25))


def partials(device, count=5, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    outs = torch.randn(count, 2, 7, 3, 24, generator=g)
    lses = torch.tensor([0.0, 1000.0, -1000.0, -torch.inf, 5.0])[:count].view(count, 1, 1, 1)
    lses = (lses + torch.randn(count, 2, 3, 7, generator=g)).contiguous()
    lses[:, 0, 0, :3] = -torch.inf
    lses[1, 0, 1] = -torch.inf
    outs.masked_fill_((lses == -torch.inf).transpose(2, 3).unsqueeze(-1), 0)
    return on(device, outs.to(dtype), lses)


@ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merge_of_many(device, dtype):
    outs, lses = partials(device, dtype=dtype)
    got = merge_many_here(outs, lses)
    assert got[0].dtype == torch.float32 and not torch.isnan(got[0]).any()
    close(got, merge_many(outs.double(), lses.double()), 2e-6)
    assert torch.equal(got[1][0, 0, :3].cpu(), torch.full((3,), -torch.inf))


@ON
def test_merge_into_views(device):
    outs, lses = partials(device, 2)
    room, room_lse = torch.zeros(2, 14, 3, 24, device=device), torch.zeros(2, 3, 14, device=device)
    out, lse = room[:, ::2], room_lse[:, :, ::2]
    out.copy_(outs[0]), lse.copy_(lses[0])
    merge_partials(outs[1:], lses[1:], out, lse, into=True)
    close((out, lse), merge(*(x.double() for pair in zip(outs, lses, strict=True) for x in pair)))
    assert (room[:, 1::2] == 0).all() and (room_lse[:, :, 1::2] == 0).all()


@ON
def test_nothing_to_do_touches_nothing(device):
    for sizes in ((0, 5), (5, 0)):
        q, k, v = data(*sizes, device=device)
        into = tuple(x + 1 for x in empty_partial(q))
        for call in (attend, lambda q, k, v, **o: attend_cached(q, DenseKV(k, v), **o)):
            got = call(q, k, v, into=into, backend="triton")
            assert got[0] is into[0] and (got[0] == 1).all()


def test_few_rows_are_split_over_keys(monkeypatch):
    from localflash import triton_backend, triton_tools

    card = triton_tools.Device((9, 0), 132)
    monkeypatch.setattr(triton_backend, "device_of", lambda _: card)
    assert few_rows(torch.empty(1, 16, 32, 8), 8)  # one tile of a group's 64 rows
    assert few_rows(torch.empty(1, 128, 32, 8), 8)  # 32 tiles of rows for 132 processors
    assert not few_rows(torch.empty(1, 512, 32, 8), 8)


@pytest.mark.parametrize(
    ("programs", "blocks", "splits"),
    [
        (8, 2048, 15),  # 120 of 132 processors, in one wave
        (132, 2048, 1),
        (110, 2048, 1),
        (1, 3, 3),
        (8, 1, 1),
        (1, 1, 1),
        (1, 4096, 111),
    ],
)
def test_split_count(programs, blocks, splits):
    assert split_count(programs, blocks, 132) == splits


@given(st.integers(1, 200), st.integers(1, 5000), st.integers(1, 200))
def test_every_split_has_work(programs, blocks, processors):
    splits = split_count(programs, blocks, processors)
    longest = -(-blocks // splits)
    assert 1 <= splits <= blocks and -(-blocks // longest) <= splits
    assert splits == 1 or -(-blocks // (splits - 1)) > longest


def test_a_scale_is_made_positive():
    q = torch.randn(3)
    assert positive_scale(q, 2.0)[0] is q
    for scale in (-2.0, 0.0):
        made, above = positive_scale(q, scale)
        assert above > 0 and torch.equal(made * above, q * scale)
