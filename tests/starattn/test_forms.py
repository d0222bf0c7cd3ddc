"""python -m pytest tests/starattn/test_forms.py

Phase 1 over KV that is quantised, or in pieces: dense attention under the mask over what it
widens to; the anchor is one broadcast of as many bytes as it is kept in.
"""

import pytest
import torch

from localflash import attend, joined_kv
from seqpar import positions, token_nbytes
from starattn import AnchorKV, encode_layer, make_blocks, plan_passes
from tests.starattn.test_star_attention import masked, star_mask
from tests.support.forms import FORMS, document_in, in_two_pieces, tokens_of, widened
from tests.support.models import relative_error
from tests.support.ranks import in_processes, in_threads

TOKENS, BLOCK, ANCHOR = 70, 12, 9
pytestmark = pytest.mark.usefixtures("widened_in_small_pieces")


def encoded(transport, form, share, chunk_tokens):
    """What this rank's own tokens attend to; its KV is in pieces, pass by pass."""
    q, whole = document_in(form, TOKENS)
    blocks = make_blocks(TOKENS, transport.world_size, BLOCK, ANCHOR)
    anchors, kept, outs = AnchorKV(blocks.anchor), [whole.slice(0, 0)], [q[:, :0]]
    for step in plan_passes(blocks, transport.rank, share, True, chunk_tokens):
        # the anchor is the document's head
        own = [*step.dropped, *positions(step.kept)]
        new = in_two_pieces(tokens_of(whole, own))
        past = joined_kv(kept)
        out, _ = encode_layer(0, q[:, own], new, past, step, anchors, transport, attend)
        outs.append(out[:, len(step.dropped) :])
        kept.append(new.slice(len(step.dropped), len(own)))
    return torch.cat(outs, 1), transport.counters.bytes_sent, dict(transport.counters.calls)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", ["world", "rank", "none"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equal_to_dense_attention_over_what_it_widens_to(form, share, world):
    q, whole = document_in(form, TOKENS)
    want = masked(q, *widened(whole, q.dtype), star_mask(TOKENS, BLOCK, ANCHOR))
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
