"""python -m pytest tests/ringattn/test_forms.py

A ring over KV that is quantised, or in pieces: the product of one device over what it widens to,
and as many bytes as planned.
"""

from bisect import bisect_left

import pytest
import torch

from localflash import Band, attend, attend_reference, joined_kv
from ringattn import Costs, KVBuffers, RingStrategy
from seqpar import Span, positions, token_nbytes
from tests.support.forms import DIM, FORMS, document_in, in_two_pieces, tokens_of, widened
from tests.support.models import relative_error
from tests.support.ranks import in_processes, in_threads

HEADS, KV_HEADS, TOKENS = 6, 2, 61
pytestmark = pytest.mark.usefixtures("widened_in_small_pieces")


def document(form):
    return document_in(form, TOKENS)


def one_device(q, kv, window):
    tensors = (t.double() for t in (q, *widened(kv, q.dtype)))
    return attend_reference(*tensors, Band(0, 1, 0, 1, window))[0]


def encoded(transport, form, past_by, chunk_tokens, window, layout="zigzag"):
    """This rank's positions, what they attend to, and whether it sent what was planned.

    What is kept is never moved: the past is in as many pieces as there were chunks, twice.
    """
    q, whole = document(form)
    world = transport.world_size
    strategy = RingStrategy(transport, layout=layout, chunk_tokens=chunk_tokens, past_by=past_by)
    _, extensions = strategy.plan([Span(0, TOKENS, ((),) * world)])
    kept, found, outs = [], [], []
    for extension in extensions:
        own = positions(extension.parts[0].positions)
        new = in_two_pieces(tokens_of(whole, own))
        past = joined_kv([whole.slice(0, 0), *seen(kept, extension, window)])
        before = transport.counters.bytes_sent
        out, _ = extension.attend(0, q[:, own], new, [past], window=window, attend=attend)
        planned = planned_bytes(extension.plan, Costs.of(q, new), window, past_by)
        assert transport.counters.bytes_sent - before == planned
        kept, found, outs = [*kept, (own, new)], [*found, *own], [*outs, out]
    return found, torch.cat(outs, 1)


def seen(kept, extension, window):
    """What the window still shows of each earlier chunk: all, or the last of its positions."""
    first = extension.plan.texts[0].start - (window or TOKENS) + 1
    return [kv.slice(bisect_left(own, first), len(own)) for own, kv in kept]


def planned_bytes(plan, costs, window, past_by):
    if past_by == "auto":
        return plan.bytes_sent(costs, window)
    (text,) = plan.texts
    new = sum(step.send for step in plan.new_steps(window)) * costs.kv_bytes
    if past_by == "kv":
        new += sum(step.send for step in text.past_kv_steps(window)) * costs.kv_bytes
    else:
        for step in text.past_query_steps(window):
            new += step.send * costs.query_bytes
            if step.tiles and step.owner != plan.rank:
                returned = sum(len(run) for run in text.new[step.owner])
                new += returned * costs.partial_bytes
    return new


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("past_by", ["kv", "queries", "auto"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equal_to_one_device_over_what_it_widens_to(form, past_by, world):
    q, whole = document(form)
    for chunk_tokens, window in ((100, None), (5, None), (5, 9)):
        out = torch.full(q.shape, torch.nan)
        for own, part in in_threads(world, encoded, form, past_by, chunk_tokens, window):
            out[:, own] = part
        assert relative_error(out, one_device(q, whole, window)) < 1e-5


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_both_transports_agree(form):
    ranks = [run(3, encoded, form, "kv", 9, None) for run in (in_threads, in_processes)]
    for (own, a), (_, b) in zip(*ranks, strict=True):
        assert len(own) and relative_error(a, b) < 1e-6


def test_what_decides_how_the_past_is_reached_is_what_travels():
    """A quarter of the bytes, and KV travels where queries would have."""
    text_kv = {form: Costs.of(*document(form)) for form in FORMS}
    assert text_kv["dense"].kv_bytes == 2 * KV_HEADS * DIM * 4
    assert text_kv["int8"].kv_bytes == text_kv["fp8"].kv_bytes == 2 * KV_HEADS * (DIM + 2)
    assert {costs.query_bytes for costs in text_kv.values()} == {HEADS * DIM * 4}

    def ways(transport, form):
        strategy = RingStrategy(transport, chunk_tokens=6)
        _, extensions = strategy.plan([Span(0, 200, ((),) * 2)])
        return [e.plan.texts[0].past_by(text_kv[form]) for e in extensions]

    (dense, _), (quantised, _) = (in_threads(2, ways, form) for form in ("dense", "int8"))
    assert 0 < dense.count("kv") < quantised.count("kv") < len(quantised)


def test_buffers_serve_every_form_in_turn():
    buffers, (_, dense), (_, small) = KVBuffers(), document("dense"), document("int8")
    first = buffers.arriving(dense, 9, 10)
    room = buffers.nbytes
    assert room == 2 * 10 * token_nbytes(dense)
    second = buffers.arriving(in_two_pieces(small), 9, 10)
    assert buffers.nbytes == room
    for kv, like in ((first, dense), (second, small)):
        assert kv.tokens == 9
        for tensor, other in zip(kv.tensors, like.tensors, strict=True):
            assert tensor.dtype == other.dtype and tensor.is_contiguous()
            tensor.copy_(other[:, :9])
    for kv, like in ((first, dense), (second, small)):  # neither lies on the other
        for tensor, other in zip(kv.tensors, like.tensors, strict=True):
            assert torch.equal(tensor, other[:, :9])
