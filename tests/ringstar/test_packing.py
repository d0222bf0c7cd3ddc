"""python -m pytest tests/ringstar/test_packing.py

Documents of unequal length, encoded together: each is what it is alone, and nothing is padded.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ringattn.plan
import seqpar.packing
from ringattn import Costs, RingStrategy
from ringstar import UserError
from ringstar.config import EncodeConfig, StarConfig
from ringstar.strategies import make_strategy
from seqpar import Layout, Span, ThreadWorld, cut, packed_steps, ring_steps, token_count
from tests.support.models import (
    DYNAMIC,
    LONGROPE,
    expected,
    over_bound,
    random_ids,
    tiny_folder,
)
from tests.support.runtime import simulated

LENGTHS = (1, 7, 64, 1000)
DOCUMENTS = [random_ids(length, seed=3) for length in LENGTHS]
QUESTION = random_ids(5, seed=4)
CASES = {
    "llama": ("llama", {}),
    "gemma2": ("gemma2", {}),  # windows in one of two layers
    "mixtral": ("mixtral", {}),  # windows in both
    "gpt_oss": ("gpt_oss", {}),
    "llama dynamic": ("llama", {**DYNAMIC, "max_position_embeddings": 512}),
    "phi3 longrope": ("phi3", LONGROPE),
}


def runtime(folder, world, layout="zigzag", chunk_tokens=8192, **options):
    return simulated(
        folder, world, layout=layout, chunk_tokens=chunk_tokens, allow_beyond_limit=True, **options
    )


def errors(folder, ring, documents):
    """How far each document is off, where 1 is allowed; greedy tokens must be the same."""
    lengths = [len(document) + len(QUESTION) for document in DOCUMENTS]
    made = ring.encode_batch(documents, lengths=lengths)
    found = []
    for ids, document in reversed(list(zip(documents, made, strict=True))):
        answer = ring.ask(document, QUESTION, max_new_tokens=8)
        want = expected(folder, ids + QUESTION, 8)
        found.append(over_bound(answer.first_logits, want))
        if found[-1] <= 1:
            assert answer.ids == want.ids
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
def test_documents_get_what_they_get_alone(world, layout):
    folder = tiny_folder("llama")
    for chunk_tokens in (8192, 50):
        assert max(errors(folder, runtime(folder, world, layout, chunk_tokens), DOCUMENTS)) <= 1


@pytest.mark.parametrize("name", [name for name in CASES if name != "llama"])
@pytest.mark.parametrize("chunk_tokens", [8192, 60])
def test_so_they_do_with_windows_sinks_and_rope_by_length(name, chunk_tokens):
    family, changes = CASES[name]
    folder = tiny_folder(family, **changes)
    assert max(errors(folder, runtime(folder, 3, "zigzag", chunk_tokens), DOCUMENTS)) <= 1


def test_a_document_that_sees_its_neighbour_is_caught(monkeypatch):
    folder = tiny_folder("llama")
    right = seqpar.packing._moved

    def reaching_back(tile, rows, place):
        moved = right(tile, rows, place)
        back = slice(max(0, moved.k.start - 1), moved.k.stop - (moved.k.start > 0))
        return seqpar.packing.replace(moved, k=back)

    monkeypatch.setattr(seqpar.packing, "_moved", reaching_back)
    ringattn.plan._packed.cache_clear()
    try:
        assert max(errors(folder, runtime(folder, 3), DOCUMENTS)) > 10
    finally:
        ringattn.plan._packed.cache_clear()


def test_no_token_is_computed_that_is_not_theirs():
    """One forward a rank in all, of its share of the tokens; as many KV as alone."""
    folder, world = tiny_folder("llama"), 3
    ring = runtime(folder, world)
    seen = []
    model = ring.group.engines[0].model.model
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    together = ring.encode_batch(DOCUMENTS)
    hook.remove()
    assert len(seen) == world and sum(seen) == sum(LENGTHS)
    assert max(seen) - min(seen) <= 2 * len(LENGTHS)
    for ids, document in zip(DOCUMENTS, together, strict=True):
        assert document.tokens == len(ids)
        assert document.metrics.kv_bytes == ring.encode(ids).metrics.kv_bytes


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("chunk_tokens", [8192, 100])
def test_bytes_sent_are_the_plans(family, chunk_tokens):
    folder, world = tiny_folder(family), 3
    made = runtime(folder, world, "contiguous", chunk_tokens).encode_batch(DOCUMENTS)
    costs = Costs(heads=4, head_dim=16, itemsize=4, kv_bytes=2 * 2 * 16 * 4)
    window = 21 if family == "mixtral" else None
    ranks = ThreadWorld(world, threads_per_rank=1)

    def sent(transport):
        ring = RingStrategy(transport, layout="contiguous", chunk_tokens=chunk_tokens)
        _, passes = ring.plan([Span(0, length, ((),) * world) for length in LENGTHS])
        return 2 * sum(step.plan.bytes_sent(costs, window) for step in passes)

    assert all(document.metrics.bytes_sent == ranks.run(sent) for document in made)


def test_star_encodes_them_one_after_another():
    folder, documents = tiny_folder("llama"), DOCUMENTS[2:]
    star = runtime(folder, 2, strategy=StarConfig())
    for ids, document in zip(documents, star.encode_batch(documents), strict=True):
        together = star.ask(document, QUESTION, max_new_tokens=8)
        alone = star.ask(star.encode(ids), QUESTION, max_new_tokens=8)
        assert together.ids == alone.ids
        assert torch.equal(together.first_logits, alone.first_logits)


def test_bad_batches_are_refused_by_name():
    ring = runtime(tiny_folder("llama"), 2)
    with pytest.raises(UserError, match="documents=0: none are given"):
        ring.encode_batch([])
    with pytest.raises(UserError, match="documents=4: have 1 lengths"):
        ring.encode_batch(DOCUMENTS, lengths=[5])
    with pytest.raises(UserError, match="document: is empty"):
        ring.encode_batch([[1, 2], []])
    with pytest.raises(UserError, match="document=97: token ids must be"):
        ring.encode_batch([[1, 2], [97]])


# --- in integers

SPANS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 40)), min_size=1, max_size=5)
WINDOWS = st.sampled_from([None, 1, 5])
LAYOUTS = st.sampled_from(["zigzag", "striped", "contiguous"])


@given(SPANS, st.integers(1, 30))
def test_chunks_cover_every_span_once_in_order(spans, chunk):
    given_spans = [Span(start, start + tokens, ()) for start, tokens in spans]
    chunks = list(cut(given_spans, chunk))
    pieces = [piece for pieces in chunks for piece in pieces]
    assert all(sum(b - a for _, a, b in pieces) <= chunk for pieces in chunks)
    for number, span in enumerate(given_spans):
        own = [position for n, a, b in pieces if n == number for position in range(a, b)]
        assert own == list(range(span.start, span.stop))


@given(SPANS, st.integers(1, 5), LAYOUTS, WINDOWS, st.data())
def test_packed_steps_are_those_of_each_text(spans, world, layout, window, data):
    """Every pair of a query and a key that a text computes alone, and no other."""
    rank = data.draw(st.integers(0, world - 1))
    owned = [
        tuple(Layout(layout, start, start + tokens, world).runs(r) for r in range(world))
        for start, tokens in spans
    ]
    alone = [ring_steps(rank, list(runs), list(runs), window) for runs in owned]
    packed = packed_steps(rank, owned, owned, alone)

    def tokens_of(r):
        return [(t, p) for t, runs in enumerate(owned) for run in runs[r] for p in run]

    for number, step in enumerate(packed):
        rows, keys = tokens_of(rank), tokens_of(step.source)
        for tile in step.tiles:
            texts = {t for t, _ in (*rows[tile.q], *keys[tile.k])}
            assert len(texts) == 1
        assert sum(len(steps[number].tiles) for steps in alone) == len(step.tiles)
        assert step.send in (0, len(keys))
        assert bool(step.send) == any(steps[number].send for steps in alone)
        after = sum(token_count(runs[(step.source - 1) % world]) for runs in owned)
        assert step.receive in (0, after)


def test_the_factory_plans_several_texts():
    transport = ThreadWorld(2, threads_per_rank=1).transports[0]
    made = make_strategy(StarConfig(), EncodeConfig(), transport, 97)
    owned, passes = made.plan([Span(0, 10, ((), ())), Span(0, 4, ((), ()))])
    assert [len(runs) for runs in owned] == [2, 2]
    assert [part.text for step in passes for part in step.parts] == [0, 1]
