# python -m pytest tests/localflash/test_merge.py -q
"""The merge: exact at its edges, associative to rounding, never NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localflash import empty_partial, merge, merge_into, merge_many

B, T, H, D = 2, 3, 4, 5
INF = torch.inf


def partial(seed: int, gap: float = 0.0, empty: float = 0.0, dtype=torch.float32):
    """A random partial; `empty` is the share of rows that saw nothing."""
    g = torch.Generator().manual_seed(seed)
    out = torch.randn(B, T, H, D, generator=g, dtype=torch.float64)
    lse = 3 * torch.randn(B, H, T, generator=g, dtype=torch.float64) + gap
    lse[torch.rand(B, H, T, generator=g) < empty] = -INF
    out[lse.transpose(1, 2) == -INF] = 0
    return out.to(dtype), lse.to(dtype)


def exact(*parts):
    """The definition, in float64, over stacked partials."""
    outs, lses = (torch.stack([p[i].double() for p in parts]) for i in (0, 1))
    lse = lses.logsumexp(0)
    weights = torch.where(lses == -INF, 0.0, torch.exp(lses - lse))
    return (outs * weights.transpose(2, 3).unsqueeze(-1)).sum(0), lse


def close(got, want, tol=2e-6):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tol, atol=tol)


GAPS = st.sampled_from([0.0, 5.0, -5.0, 80.0, -80.0, 1000.0, -1000.0])
SHARES = st.sampled_from([0.0, 0.5, 1.0])
PARTS = st.builds(partial, st.integers(0, 10_000), GAPS, SHARES)


@settings(max_examples=100, deadline=None)
@given(PARTS, PARTS)
def test_two_merge_to_their_definition(a, b):
    got = merge(*a, *b)
    assert not any(x.isnan().any() for x in got)
    close(got, exact(a, b))


@settings(max_examples=100, deadline=None)
@given(PARTS, PARTS, PARTS)
def test_associative_and_commutative_to_rounding(a, b, c):
    left = merge(*merge(*a, *b), *c)
    # What an intermediate lse of 1000 can hold in float32 is what its weights can.
    tol = 2e-6 + 4e-7 * max(p[1].nan_to_num(neginf=0).abs().max().item() for p in (a, b, c))
    close(left, merge(*a, *merge(*b, *c)), tol)
    close(left, merge(*merge(*c, *b), *a), tol)


@settings(max_examples=100, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=9))
def test_many_merge_to_their_definition(parts):
    got = merge_many(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))
    assert not any(x.isnan().any() for x in got)
    close(got, exact(*parts))


@pytest.mark.parametrize("gap", [0.0, 1000.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_side_changes_no_bit(gap, dtype):
    part = partial(1, gap, 0.3, dtype)
    none = empty_partial(part[0])
    stacked = [torch.stack(pair) for pair in zip(part, none, strict=True)]
    for got in (merge(*part, *none), merge(*none, *part), merge_many(*stacked)):
        assert torch.equal(got[0], part[0]) and torch.equal(got[1], part[1])


def test_two_empty_sides_stay_empty():
    none = empty_partial(torch.ones(B, T, H, D))
    for got in (merge(*none, *none), merge_many(none[0][None], none[1][None])):
        assert (got[0] == 0).all() and (got[1] == -INF).all()


@pytest.mark.parametrize("gap", [1000.0, -1000.0])
def test_a_gap_of_1000_takes_one_side_exactly(gap):
    a, b = partial(1), partial(2, gap)
    winner = b if gap > 0 else a
    for got in (merge(*a, *b), merge(*b, *a)):
        assert torch.equal(got[0], winner[0]) and torch.equal(got[1], winner[1])


def test_merges_into_views_and_leaves_the_rest_alone():
    whole, part = partial(1), partial(2)
    out, lse = whole[0].clone(), whole[1].clone()
    rows = slice(0, T, 2)
    narrow = part[0][:, rows], part[1][:, :, rows]
    merge_into(out[:, rows], lse[:, :, rows], *narrow)
    close((out[:, rows], lse[:, :, rows]), exact((whole[0][:, rows], whole[1][:, :, rows]), narrow))
    assert torch.equal(out[:, 1], whole[0][:, 1]) and torch.equal(lse[:, :, 1], whole[1][:, :, 1])


def test_bf16_partials_merge_in_float32():
    a, b = partial(1), partial(2)
    rough = a[0].bfloat16(), a[1]
    got = merge(*rough, *b)
    assert got[0].dtype == torch.float32
    close(got, exact(rough, b))
    with pytest.raises(ValueError, match="float32 or float64"):
        merge_into(rough[0], rough[1], *b)


def test_a_large_lse_does_not_blur_the_weights():
    """exp(lse_b - logaddexp) loses them here: float32 resolves 0.004 at 50000."""
    a, b = partial(1), partial(2)
    lse_a, lse_b = torch.full((B, H, T), 50_000.0), torch.full((B, H, T), 50_000.25)
    close(merge(a[0], lse_a, b[0], lse_b), exact((a[0], lse_a), (b[0], lse_b)), 1e-6)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 5.0, -80.0, 1000.0])
def test_on_every_device(device, dtype, gap):
    """Definition, empty rows, exact ends, strided views: what the rest of this file asks too."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    parts = [partial(seed, gap * seed, 0.3, dtype) for seed in range(5)]
    there = [tuple(x.to(device) for x in part) for part in parts]
    outs, lses = (torch.stack([part[i] for part in there]) for i in (0, 1))
    tol = 2e-6 + 4e-7 * max(abs(5 * gap), 10.0)
    want = [x.to(device) for x in exact(*parts)]
    close(merge_many(outs, lses), want, tol)
    out, lse = there[0]
    running = out.repeat_interleave(2, 1)[:, ::2], lse.repeat_interleave(2, 2)[:, :, ::2]
    for part in there[1:]:
        merge_into(*running, *part)
    close(running, want, tol)
    none = empty_partial(there[0][0])
    for got in (merge(*there[0], *none), merge(*none, *there[0])):
        assert all(torch.equal(a, b) for a, b in zip(got, there[0], strict=True))


def test_float64_stays_float64():
    a, b = partial(1, dtype=torch.float64), partial(2, dtype=torch.float64)
    close(merge(*a, *b), exact(a, b), 1e-14)
    assert merge_many(a[0][None], a[1][None])[0].dtype == torch.float64


def test_many_is_deterministic_and_needs_one():
    outs, lses = (torch.stack(x) for x in zip(*(partial(i) for i in range(8)), strict=True))
    first = merge_many(outs, lses)
    again = merge_many(outs.clone(), lses.clone())
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    with pytest.raises(ValueError, match="at least one"):
        merge_many(outs[:0], lses[:0])
