"""python -m pytest tests/seqpar/test_local.py

Tiles over KV in pieces are those over the same KV in one; decoding merges only what it must.
"""

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import localflash.quantised
from localflash import Band, DenseKV, attend, attend_reference, empty_partial, joined_kv, quantise
from seqpar import Held, Run, Tile, accumulate_tiles, attend_sharded, tiles, token_nbytes
from tests.support.models import relative_error
from tests.support.ranks import in_threads

EXACT = partial(attend, backend="reference")
STEP = st.integers(1, 3)


@pytest.fixture(autouse=True, scope="module")
def _widened_in_small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localflash.quantised, "WIDEN_TOKENS", 5)
        yield


def tensors(tq, tk, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tq + 100 * tk)
    shapes = ((1, tq, 4, 8), (1, tk, 2, 8), (1, tk, 2, 8))
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


def in_pieces(whole, cuts):
    inside = sorted(at for at in cuts if at <= whole.tokens)
    return joined_kv([whole.slice(*edges) for edges in pairwise([0, *inside, whole.tokens])])


def spans(tokens):
    return st.tuples(st.integers(0, tokens), st.integers(0, tokens)).map(
        lambda x: slice(*sorted(x))
    )


@st.composite
def plans(draw):
    tq, tk = draw(st.integers(1, 12)), draw(st.integers(1, 30))
    bands = st.builds(
        Band,
        st.integers(0, 60),
        STEP,
        st.integers(-20, 60),
        STEP,
        st.one_of(st.none(), st.integers(1, 30)),
    )
    several = st.lists(
        st.builds(Tile, spans(tq), spans(tk), st.one_of(st.none(), bands)), max_size=3
    )
    return tq, tk, draw(several), draw(st.lists(st.integers(0, tk), max_size=5))


def accumulated(q, kv, several):
    into = empty_partial(q)
    accumulate_tiles(q, kv, several, into, EXACT)
    return into


@settings(max_examples=200, deadline=None)
@given(plans())
def test_tiles_over_pieces(plan):
    tq, tk, several, cuts = plan
    q, k, v = tensors(tq, tk)
    whole = DenseKV(k, v)
    want, got = (accumulated(q, kv, several) for kv in (whole, in_pieces(whole, cuts)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(plans(), st.sampled_from([torch.int8, torch.float8_e4m3fn]))
def test_tiles_over_quantised_pieces(plan, storage):
    tq, tk, several, cuts = plan
    q, k, v = tensors(tq, tk, torch.float32)
    kv = quantise(k, v, storage)
    wide = DenseKV(*(_wide(*pair) for pair in zip(kv.tensors[:2], kv.tensors[2:], strict=True)))
    want, got = (accumulated(q, x, several) for x in (wide, in_pieces(kv, cuts)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def _wide(values_BTHD, scale_BTH):
    return values_BTHD.float() * scale_BTH[..., None].float()


def noting(calls):
    """`attend`, which adds to `calls` what each call merges into."""

    def call(q, k, v, band, *, into=None):
        calls.append(into)
        return attend(q, k, v, band, into=into)

    return call


def decoded(transport, q, wholes, calls):
    """One query against what each rank holds; `calls` gets what each call merges into."""
    kv = wholes[transport.rank]
    held = Held(slice(0, 1), kv, (Tile(slice(0, 1), slice(0, kv.tokens), None),))

    call = noting(calls[transport.rank])
    return attend_sharded(q, [held], transport=transport, attend=call)[0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_decoding_over_pieces_merges_into_the_first(world):
    q, k, v = tensors(1, 4 * world, torch.float32)
    shares = [DenseKV(k, v).slice(4 * rank, 4 * rank + 4) for rank in range(world)]
    want = attend_reference(q, k, v)[0]
    for cuts, several in (([], 1), ([1, 1, 3], 3)):
        calls = [[] for _ in range(world)]
        held = [in_pieces(share, cuts) for share in shares]
        for got in in_threads(world, decoded, q, held, calls):
            assert relative_error(got, want) < 1e-6
        for given_into in calls:
            assert len(given_into) == several
            assert given_into[0] is None and None not in given_into[1:]


def test_each_text_meets_its_own_keys_and_decoding_merges_nothing():
    q, k, v = tensors(4, 9, torch.float32)
    kv, calls = DenseKV(k, v), []
    one, other = kv.slice(0, 5), kv.slice(5, 9)
    texts = [
        Held(slice(0, 1), one, tiles((Run(4, 5),), (Run(0, 5),))),  # a token more
        Held(slice(1, 4), other, tiles((Run(1, 4),), (Run(0, 4),))),  # a few, causal
    ]
    attended = partial(attend_sharded, q, texts, attend=noting(calls))
    out, lse = in_threads(1, lambda transport: attended(transport=transport))[0]
    bands = (None, Band(1, 1, 0, 1))
    for text, band in zip(texts, bands, strict=True):
        want = attend_reference(q[:, text.rows], *text.kv.tensors, band)
        assert relative_error(out[:, text.rows], want[0]) < 1e-6
        torch.testing.assert_close(lse[:, :, text.rows], want[1])
    assert calls[0] is None and None not in calls[1:]


def test_no_tokens_are_no_calls():
    q, k, v = tensors(2, 3)
    nothing = DenseKV(k, v).slice(0, 0)
    held = Held(slice(0, 2), nothing, tiles((Run(0, 2),), ()))
    out, lse = in_threads(1, lambda t: attend_sharded(q, [held], transport=t, attend=None))[0]
    assert not out.any() and (lse == -torch.inf).all()


def test_bytes_of_a_token_are_those_of_all_tensors():
    _, k, v = tensors(1, 6, torch.bfloat16)
    dense, quantised = DenseKV(k, v), quantise(k, v, torch.int8)
    assert token_nbytes(dense) == 2 * 2 * 8 * 2
    assert token_nbytes(in_pieces(quantised, [2])) == 2 * 2 * (8 + 2)
    assert token_nbytes(quantised.slice(0, 0)) == 2 * 2 * (8 + 2)
