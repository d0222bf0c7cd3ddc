"""python -m pytest tests/ringattn/test_ring_attention.py

The product on tensors: against the reference, over both transports, counted to the byte.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localflash import Band, attend, attend_reference
from ringattn import ring_attention
from seqpar import Layout, positions
from tests.support.models import relative_error
from tests.support.ranks import in_processes, in_threads

LAYOUTS = ("zigzag", "striped", "contiguous")


def tensors(length, heads=6, kv_heads=2, dim=16, batch=1, dtype=torch.float32, seed=0):
    """Sharp attention: with std 1 scores differ by several units."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, h, dim) for h in (heads, kv_heads, kv_heads)]
    return [
        (2 * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype) for s in shapes
    ]


def shares(tensor, layout, length, world, rank):
    index = torch.tensor(positions(Layout(layout, 0, length, world).runs(rank)), dtype=torch.long)
    return tensor[:, index]


def assemble(parts, layout, length):
    whole = torch.empty(parts[0].shape[0], length, *parts[0].shape[2:], dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        own = positions(Layout(layout, 0, length, len(parts)).runs(rank))
        whole[:, torch.tensor(own, dtype=torch.long)] = part
    return whole


def ring(transport, qkv, layout, length, **options):
    mine = [shares(t, layout, length, transport.world_size, transport.rank) for t in qkv]
    return ring_attention(*mine, transport=transport, length=length, layout=layout, **options)


def over_threads(qkv, layout, world, **options):
    length = qkv[0].shape[1]
    parts = in_threads(world, lambda t: ring(t, qkv, layout, length, **options))
    return assemble(parts, layout, length)


def whole(qkv, window=None, **options):
    out, _ = attend_reference(*(t.double() for t in qkv), Band(0, 1, 0, 1, window), **options)
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LAYOUTS),
    st.integers(1, 6),
    st.integers(1, 70),
    st.sampled_from([(4, 4), (6, 2), (5, 1)]),
    st.one_of(st.none(), st.integers(1, 20)),
)
def test_equal_to_attention_over_the_whole(layout, world, length, heads, window):
    qkv = tensors(length, *heads)
    got = over_threads(qkv, layout, world, window=window)
    assert relative_error(got, whole(qkv, window)) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_and_strided_inputs(layout):
    qkv = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors(37, batch=3)]
    assert relative_error(over_threads(qkv, layout, 4), whole(qkv)) < 1e-6


def test_softcap_and_scale():
    qkv = tensors(40)
    got = over_threads(qkv, "zigzag", 3, softcap=5.0, scale=0.3, kernel="reference")
    assert relative_error(got, whole(qkv, softcap=5.0, scale=0.3)) < 1e-6


def test_shares_of_the_wrong_length_are_refused():
    qkv = tensors(10)
    with pytest.raises(ValueError, match="q has 4 tokens, but rank 0 of 2 owns 5 of 10"):
        in_threads(2, lambda t: ring_attention(*(x[:, :4] for x in qkv), transport=t, length=10))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_both_transports_agree_bitwise(world):
    qkv = tensors(101)
    for layout in LAYOUTS:
        threads = in_threads(world, ring, qkv, layout, 101)
        processes = in_processes(world, ring, qkv, layout, 101)
        assert all(torch.equal(a, b) for a, b in zip(threads, processes, strict=True))


def sent_bytes(transport, qkv, layout, length):
    ring(transport, qkv, layout, length)
    return transport.counters.bytes_sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_bytes_sent_are_those_of_the_formula(world, dtype):
    per_rank, kv_heads, dim = 12, 2, 16
    qkv = tensors(per_rank * world, kv_heads=kv_heads, dim=dim, dtype=dtype)
    shard = per_rank * 2 * kv_heads * dim * dtype.itemsize  # KV heads, never query heads
    for layout in ("zigzag", "striped"):
        sent = in_threads(world, sent_bytes, qkv, layout, per_rank * world)
        assert sent == [(world - 1) * shard] * world
    # contiguous: the KV of rank s only goes on to the ranks behind it
    sent = in_threads(world, sent_bytes, qkv, "contiguous", per_rank * world)
    assert sent == [(rank + 1) * shard for rank in range(world - 1)] + [0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_error_of_bfloat16_does_not_grow_with_ranks(layout):
    length = 512
    qkv = tensors(length, heads=6, kv_heads=2, dim=32, dtype=torch.bfloat16)
    exact = whole(qkv)
    kernel = torch.nn.functional.scaled_dot_product_attention
    heads_first = [t.transpose(1, 2) for t in qkv]
    flash = kernel(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
    one_device = relative_error(flash, exact)
    for world in (1, 2, 3, 4, 5, 8):
        error = relative_error(over_threads(qkv, layout, world), exact)
        assert error <= 1.2 * one_device, f"{world} ranks: {error:.2e}, one device {one_device:.2e}"


def test_local_attention_is_the_ring_of_one():
    qkv = tensors(50)
    out, _ = attend(*qkv, Band(0, 1, 0, 1))
    assert torch.equal(over_threads(qkv, "zigzag", 1), out)
