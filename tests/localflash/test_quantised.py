"""python -m pytest tests/localflash/test_quantised.py

What 8 bits keep of a number, row by row; rows at the edges of what floats can say.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localflash import QuantKV, attend, attend_cached, quantise
from localflash.views import WIDEN_TOKENS

STORAGES = (torch.int8, torch.float8_e4m3fn)
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BY_STORAGE = pytest.mark.parametrize("storage", STORAGES)


def widened(kv, dtype=torch.float32):
    """(k, v) of all tokens; in one piece, also for what reads it in several."""
    parts = [(s.k_BTHD, s.v_BTHD) for s in kv.segments(dtype)]
    return tuple(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))


def through(rows, storage, dtype=None):
    """What these rows (N, D) widen to, as values, in their own dtype unless told."""
    x = rows[None, :, None]
    kv = quantise(torch.zeros_like(x), x, storage)
    return widened(kv, dtype or rows.dtype)[1][0, :, 0]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(STORAGES),
    st.sampled_from(DTYPES),
    st.lists(st.floats(-1, 1), min_size=1, max_size=20),
    st.integers(-8, 10),
)
def test_errors_are_what_is_said(storage, dtype, numbers, exponent):
    rows = (torch.tensor([numbers]) * 2.0**exponent).to(dtype)
    got, exact = through(rows, storage, torch.float32).double(), rows.double()
    amax = exact.abs().max()
    scale = amax / LARGEST[storage] * (1 + 2**-8)  # rounded to bfloat16
    # float8: 3 binary digits after the point; below 2**-6 of a scale, steps of 2**-9
    bounds = {torch.int8: 0.5 * scale, STORAGES[1]: (exact.abs() / 16).clamp_min(scale / 1024)}
    # scales below the normal numbers have fewer digits: half of their last step, 127 or 448 times
    assert ((got - exact).abs() <= bounds[storage] + LARGEST[storage] * 2.0**-134).all()


@BY_STORAGE
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_finite_numbers_widen_to_finite_ones_that_are_no_larger_than_theirs(
    storage, dtype, data
):
    width = 16 if dtype == torch.float16 else 32
    numbers = data.draw(
        st.lists(
            st.floats(width=width, allow_nan=False, allow_infinity=False), min_size=1, max_size=8
        )
    )
    rows = torch.tensor([numbers]).to(dtype)
    rows = rows.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    got = through(rows, storage)
    assert got.isfinite().all()
    amax = rows.double().abs().max()
    assert ((got.double() - rows.double()).abs() <= amax * 1.01).all()
    assert (got[rows == 0] == 0).all()


@BY_STORAGE
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_stay_finite_and_close(storage, dtype):
    largest = torch.finfo(dtype).max
    rows = torch.tensor([[largest, -largest, largest / 2, 0.0]]).to(dtype)
    got, exact = through(rows, storage).double(), rows.double()
    assert got.isfinite().all()
    assert ((got - exact).abs() <= largest * 2**-4).all()


@BY_STORAGE
def test_rows_of_zeros_and_the_least_numbers(storage):
    least = 2.0**-149
    rows = torch.tensor([[0.0, -0.0], [least, -least], [1e-39, -1e-40], [1e-30, 0.0]])
    k = rows[None, :, None]
    kv = quantise(k, k, storage)
    assert kv.k_scale_BTH[0, 0, 0] == 0
    got = widened(kv)[0][0, :, 0]
    assert torch.equal(got[:2], torch.zeros(2, 2))
    assert ((got - rows).abs() <= rows.abs().amax(1, keepdim=True)).all()
    assert abs(got[3, 0] / 1e-30 - 1) < 1 / 254 + 2**-8


@BY_STORAGE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible_in_its_row_alone(storage, dtype, bad):
    rows = torch.ones(3, 4, dtype=dtype)
    rows[1, 2] = bad
    got = through(rows, storage)
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


def test_float64_beyond_float32_counts_as_infinite():
    rows = torch.tensor([[1e300, 1.0], [2.0, 1.0]], dtype=torch.float64)
    got = through(rows, torch.int8)
    assert got[0].isnan().all() and abs(got[1, 0] - 2) < 0.01


@BY_STORAGE
def test_widening_rounds_once(storage):
    k, v = torch.randn(2, 1, 50, 2, 16)
    kv = quantise(k, v, storage)
    assert [t.dtype for t in kv.tensors] == [storage, storage, torch.bfloat16, torch.bfloat16]
    for dtype in (*DTYPES, torch.float64):
        pairs = zip(widened(kv, dtype), kv.tensors[:2], kv.tensors[2:], strict=True)
        for got, values, scale in pairs:
            exact = values.double() * scale.double()[..., None]
            assert torch.equal(got, exact.to(dtype))


@BY_STORAGE
def test_long_kv_is_widened_piece_by_piece(storage):
    tokens = 2 * WIDEN_TOKENS + 5
    kv = quantise(*torch.randn(2, 1, tokens, 1, 8), storage)
    lengths = [(s.start, s.k_BTHD.shape[1]) for s in kv.segments(torch.float32)]
    assert lengths == [(0, WIDEN_TOKENS), (WIDEN_TOKENS, WIDEN_TOKENS), (2 * WIDEN_TOKENS, 5)]
    q = torch.randn(1, 3, 2, 8)
    for got, want in zip(attend_cached(q, kv), attend(q, *widened(kv)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@BY_STORAGE
def test_slices_and_other_tensors(storage):
    kv = quantise(*torch.randn(2, 2, 9, 2, 8), storage)
    part = kv.slice(2, 6)
    assert (part.batch, part.tokens) == (2, 4)
    assert part.nbytes == 2 * 2 * 4 * 2 * (8 + 2)
    assert part.k_BTHD.data_ptr() == kv.k_BTHD[:, 2:].data_ptr()
    assert torch.equal(widened(part)[1], widened(kv)[1][:, 2:6])
    copy = kv.of(tuple(t.clone() for t in kv.tensors))
    assert torch.equal(widened(copy)[0], widened(kv)[0])
    assert list(kv.slice(0, 0).segments(torch.float32)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.zeros(1, 3, 2, 4)}, r"storage=torch.float32: allowed are torch.int8, torch.fl"),
        (
            {1: torch.zeros(1, 3, 2, 5).char()},
            r"v is \(1, 3, 2, 5\) torch.int8: must be \(1, 3, 2, 4\)",
        ),
        ({2: torch.zeros(1, 3, 2)}, r"k_scale is \(1, 3, 2\) torch.float32: must be"),
        ({3: torch.zeros(1, 3).bfloat16()}, r"v_scale is \(1, 3\) torch.bfloat16: must be"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    right = quantise(*torch.randn(2, 1, 3, 2, 4), torch.int8).tensors
    with pytest.raises(ValueError, match=message):
        QuantKV(*(changes.get(i, tensor) for i, tensor in enumerate(right)))


def test_another_storage_is_refused():
    with pytest.raises(ValueError, match=r"storage=torch.int16: allowed are"):
        quantise(*torch.randn(2, 1, 3, 2, 4), torch.int16)
