"""python -m pytest tests/starattn/test_forms.py

Phase 1 over KV that is quantised, or in pieces: dense attention under the mask over what it
widens to; the anchor is one broadcast of as many bytes as it is kept in.
"""

import pytest
import torch

import localflash.quantised
from localflash import DenseKV, attend, joined_kv, quantise
from seqpar import positions, token_nbytes
from starattn import AnchorKV, encode_layer, make_blocks, plan_passes
from tests.starattn.test_star_attention import masked, star_mask
from tests.support.models import relative_error
from tests.support.ranks import in_processes, in_threads

TOKENS, BLOCK, ANCHOR, DIM = 70, 12, 9, 16
FORMS = {"dense": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@pytest.fixture(autouse=True, scope="module")
def _widened_in_small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localflash.quantised, "WIDEN_TOKENS", 7)
        yield


def document(form):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (2 * torch.randn(1, TOKENS, h, DIM, generator=generator) for h in (6, 2, 2))
    return q, quantise(k, v, FORMS[form]) if FORMS[form] else DenseKV(k, v)


def encoded(transport, form, share, chunk_tokens):
    """What this rank's own tokens attend to; its KV is in pieces, pass by pass."""
    q, whole = document(form)
    blocks = make_blocks(TOKENS, transport.world_size, BLOCK, ANCHOR)
    anchors, kept, outs = AnchorKV(blocks.anchor), [whole.slice(0, 0)], [q[:, :0]]
    for step in plan_passes(blocks, transport.rank, share, True, chunk_tokens):
        # the anchor is the document's head
        own = [*step.dropped, *positions(step.kept)]
        new = whole.of(tuple(t[:, own] for t in whole.tensors))
        new = joined_kv([new.slice(0, len(own) // 3), new.slice(len(own) // 3, len(own))])
        past = joined_kv(kept)
        out, _ = encode_layer(0, q[:, own], new, past, step, anchors, transport, attend)
        outs.append(out[:, len(step.dropped) :])
        kept.append(new.slice(len(step.dropped), len(own)))
    return torch.cat(outs, 1), transport.counters.bytes_sent, dict(transport.counters.calls)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", ["world", "rank", "none"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equal_to_dense_attention_over_what_it_widens_to(form, share, world):
    q, whole = document(form)
    k, v = (torch.cat(x, 1) for x in zip(*(s[2:] for s in whole.segments(q.dtype)), strict=True))
    want = masked(q, k, v, star_mask(TOKENS, BLOCK, ANCHOR))
    for chunk_tokens in (TOKENS, 8):
        ranks = in_threads(world, encoded, form, share, chunk_tokens)
        assert relative_error(torch.cat([out for out, _, _ in ranks], 1), want) < 1e-5
        shared = share == "world" and world > 1
        anchor_bytes = ANCHOR * token_nbytes(whole)
        assert [sent for _, sent, _ in ranks] == [
            anchor_bytes * (world - 1) if shared and rank == 0 else 0 for rank in range(world)
        ]
        assert all(calls == ({"broadcast": 1} if shared else {}) for *_, calls in ranks)


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_both_transports_agree(form):
    ranks = [run(3, encoded, form, "world", 20) for run in (in_threads, in_processes)]
    for (a, *_), (b, *_) in zip(*ranks, strict=True):
        assert a.numel() and relative_error(a, b) < 1e-6
