# python -m pytest tests/localflash/test_band.py -q
"""Pieces against the dense mask: integers only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localflash import Band, normalise, pieces, split_steps
from localflash.reference import visible

STARTS = st.integers(-40, 40)
STEPS = st.integers(1, 6)
SIZES = st.integers(0, 40)
WINDOWS = st.none() | st.integers(1, 60)


def coverage(tq: int, tk: int, band: Band | None) -> torch.Tensor:
    """How many pieces hold each (row, key)."""
    count = torch.zeros(tq, tk, dtype=torch.int64)
    for q, k, kind in pieces(tq, tk, band):
        block = torch.ones_like(count[q, k])
        assert block.numel() > 0, "an empty piece"
        if kind != "full":
            assert block.shape[0] == block.shape[1], "a causal piece must be square"
            block = block.tril() if kind == "causal" else block.triu()
        count[q, k] += block
    return count


@settings(max_examples=400, deadline=None)
@given(STARTS, STEPS, STARTS, STEPS, WINDOWS, SIZES, SIZES)
def test_pieces_cover_the_dense_mask_exactly_once(q0, dq, k0, dk, window, tq, tk):
    band = Band(q0, dq, k0, dk, window)
    assert torch.equal(coverage(tq, tk, band), visible(tq, tk, band).long())


@settings(max_examples=400, deadline=None)
@given(STARTS, STEPS, STARTS, WINDOWS, SIZES, SIZES)
def test_pieces_of_equal_steps_cover_the_dense_mask_exactly_once(q0, step, k0, window, tq, tk):
    band = Band(q0, step, k0, step, window)
    assert torch.equal(coverage(tq, tk, band), visible(tq, tk, band).long())


@settings(max_examples=200, deadline=None)
@given(STARTS, STEPS, STARTS, WINDOWS)
def test_offsets_say_what_the_band_says(q0, step, k0, window):
    band = Band(q0, step, k0, step, window)
    lo, hi = normalise(band)
    i, j = torch.arange(30).unsqueeze(1), torch.arange(30)
    mask = j <= i + hi
    assert torch.equal(mask if lo is None else mask & (j >= i + lo), visible(30, 30, band))


@settings(max_examples=200, deadline=None)
@given(STARTS, STEPS, STARTS, STEPS, WINDOWS, SIZES, SIZES)
def test_split_steps_partition_rows_and_keys(q0, dq, k0, dk, window, tq, tk):
    band = Band(q0, dq, k0, dk, window)
    mask = torch.full((tq, tk), -1)
    for q, k, part in split_steps(tq, tk, band):
        assert part.q_step == part.k_step
        block = mask[q, k]
        assert (block == -1).all(), "two parts overlap"
        mask[q, k] = visible(*block.shape, part).long()
    assert torch.equal(mask, visible(tq, tk, band).long())


@settings(max_examples=300, deadline=None)
@given(STARTS, STEPS, STARTS, SIZES, SIZES)
def test_a_causal_band_takes_at_most_three_pieces(q0, step, k0, tq, tk):
    plan = pieces(tq, tk, Band(q0, step, k0, step))
    assert len(plan) <= 3
    assert [p.kind for p in plan].count("causal") <= 1


@pytest.mark.parametrize(
    ("tq", "tk", "band", "kinds"),
    [
        (6, 9, None, ["full"]),
        (6, 6, Band(0, 1, 0, 1), ["causal"]),
        (6, 6, Band(3, 4, 4, 4), ["causal"]),  # striped, offset -1
        (6, 10, Band(4, 1, 0, 1), ["full", "causal"]),
        (6, 6, Band(6, 1, 0, 1), ["full"]),
        (6, 6, Band(0, 1, 6, 1), []),
        (1, 10, Band(4, 1, 0, 1), ["full"]),  # a decoded token is one call
        (1, 10, Band(9, 5, 0, 1, 4), ["full"]),
        (9, 9, Band(0, 1, 0, 1, 9), ["causal"]),  # a window that hides nothing
        (9, 9, Band(0, 1, 0, 1, 3), ["causal", *["anticausal", "causal"] * 2]),
        (8, 8, Band(8, 1, 0, 1, 9), ["anticausal"]),  # a window behind
        (6, 6, Band(20, 1, 0, 3), ["full"]),  # unequal steps, all visible
    ],
)
def test_few_calls(tq, tk, band, kinds):
    assert [p.kind for p in pieces(tq, tk, band)] == kinds


@pytest.mark.parametrize("bad", [{"q_step": 0}, {"k_step": -1}, {"window": 0}])
def test_a_bad_band_is_refused_by_field(bad):
    fields = {"q_start": 0, "q_step": 1, "k_start": 0, "k_step": 1} | bad
    with pytest.raises(ValueError, match=f"Band.{next(iter(bad))}="):
        Band(**fields)


def test_unequal_steps_have_no_offsets():
    with pytest.raises(ValueError, match="equal steps"):
        normalise(Band(0, 1, 0, 2))
