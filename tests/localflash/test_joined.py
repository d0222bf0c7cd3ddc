"""python -m pytest tests/localflash/test_joined.py

Pieces one after another are the whole, however they are cut.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localflash import DenseKV, JoinedKV, joined_kv, quantise

TOKENS = 12
K, V = torch.randn(2, 2, TOKENS, 3, 4)
WHOLES = {"dense": DenseKV(K, V), "int8": quantise(K, V, torch.int8)}
CUTS = st.lists(st.integers(0, TOKENS), max_size=6)


def cut(whole, cuts):
    """`whole` in pieces, some of them empty, joined."""
    return joined_kv([whole.slice(*edges) for edges in pairwise([0, *sorted(cuts), whole.tokens])])


def agree(got, want):
    assert (got.batch, got.tokens, got.nbytes) == (want.batch, want.tokens, want.nbytes)
    for a, b in zip(got.tensors, want.tensors, strict=True):
        assert torch.equal(a, b)
    at = 0
    for s in got.segments(torch.float32):
        assert (s.batch, s.start) == (slice(0, want.batch), at)
        (same,) = want.slice(at, at + s.k_BTHD.shape[1]).segments(torch.float32)
        assert torch.equal(s.k_BTHD, same.k_BTHD) and torch.equal(s.v_BTHD, same.v_BTHD)
        at += s.k_BTHD.shape[1]
    assert at == want.tokens


@given(st.sampled_from(sorted(WHOLES)), CUTS, CUTS, st.data())
def test_pieces_are_the_whole(form, cuts, inner, data):
    whole = WHOLES[form]
    start = data.draw(st.integers(0, TOKENS))
    stop = data.draw(st.integers(start, TOKENS))
    got = cut(whole, cuts)
    agree(got, whole)
    agree(got.slice(start, stop), whole.slice(start, stop))
    again = [at for at in inner if at <= stop - start]
    agree(cut(got.slice(start, stop), again), whole.slice(start, stop))  # pieces of pieces


def test_reading_and_cutting_never_copy():
    parts = cut(WHOLES["dense"], [5, 5, 8])
    where = [s.k_BTHD.data_ptr() for s in parts.slice(3, 10).segments(torch.float32)]
    assert where == [K[:, at:].data_ptr() for at in (3, 5, 8)]
    assert joined_kv([parts]) is parts
    one = parts.slice(5, 8)
    assert one.tensors[0].data_ptr() == K[:, 5:].data_ptr()


def test_without_tokens_the_form_is_still_known():
    nothing = cut(WHOLES["int8"], [4]).slice(7, 7)
    assert nothing.tokens == nothing.nbytes == 0
    assert [t.dtype for t in nothing.tensors] == [torch.int8] * 2 + [torch.bfloat16] * 2
    other = cut(WHOLES["int8"], [4]).of(WHOLES["int8"].tensors)
    agree(other, WHOLES["int8"])


def test_pieces_are_the_tensors_without_a_copy():
    for whole in (WHOLES["dense"], WHOLES["int8"]):
        parts = cut(whole, [4, 9])
        for kv in (whole, parts, JoinedKV((parts, whole))):
            for pieces, tensor in zip(kv.pieces, kv.tensors, strict=True):
                assert torch.equal(torch.cat(pieces, 1).view(torch.uint8), tensor.view(torch.uint8))
        held = {piece.untyped_storage().data_ptr() for each in parts.pieces for piece in each}
        assert held <= {each.untyped_storage().data_ptr() for each in whole.tensors} | {
            tensor.untyped_storage().data_ptr() for part in parts.parts for tensor in part.tensors
        }


def test_without_parts_it_is_not():
    with pytest.raises(ValueError, match="parts is empty: must have a part"):
        joined_kv([])


def test_several_forms_are_read_but_not_sent_together():
    mixed = JoinedKV((WHOLES["dense"], WHOLES["int8"]))
    assert [s.start for s in mixed.segments(torch.float32)] == [0, TOKENS]
    with pytest.raises(ValueError, match="parts are of several forms"):
        _ = mixed.tensors
    other = DenseKV(K.bfloat16(), V.bfloat16())
    with pytest.raises(ValueError, match=r"several dtypes \(torch.float32, torch.bfloat16\)"):
        _ = joined_kv([WHOLES["dense"], other]).tensors
