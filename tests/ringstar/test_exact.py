"""python -m pytest tests/ringstar/test_exact.py

First-token logits and greedy tokens against one device's eager Hugging Face model, over
simulated ranks.  Models are initialised with std 0.2, where attention is sharp.
"""

import pytest

from ringstar import LongContext
from tests.support.models import FAMILIES, expected, random_ids, relative_error, tiny_folder
from tests.support.runtime import simulated

BOUND = 1e-5
GREEDY = 32
LAYOUTS = ("zigzag", "striped", "contiguous")
QUERIES = (1, 2, 7, 70)


def runtime(folder: str, world: int, layout: str, chunk_tokens: int) -> LongContext:
    return simulated(folder, world, layout=layout, chunk_tokens=chunk_tokens)


def check(folder, runtime, document, query, new_tokens=GREEDY):
    ids, question = random_ids(document, seed=1), random_ids(query, seed=2)
    want = expected(folder, ids + question, new_tokens)
    answer = runtime.ask(runtime.encode(ids), question, max_new_tokens=new_tokens)
    error = relative_error(answer.first_logits, want.logits_V)
    assert error <= BOUND, f"document {document}, query {query}: {error:.1e}"
    assert answer.ids == want.ids
    # one device's own float32 error against its float64 twin is what the bound allows for
    own = relative_error(want.logits_V, want.logits64_V)
    assert own <= BOUND
    assert relative_error(answer.first_logits, want.logits64_V) <= BOUND


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_one_device(family, world, layout):
    folder = tiny_folder(family)
    ring = runtime(folder, world, layout, chunk_tokens=8192)
    lengths = sorted({1, 2, max(1, world - 1), world, 63, 97})
    for index, document in enumerate(lengths):
        new_tokens = GREEDY if document == lengths[-1] else 3
        check(folder, ring, document, QUERIES[index % len(QUERIES)], new_tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_equal_to_one_device_in_several_chunks(world, layout):
    folder = tiny_folder("qwen3")
    for chunk_tokens, document in ((1, 17), (3, 50), (7, 101)):
        check(folder, runtime(folder, world, layout, chunk_tokens), document, 3, new_tokens=8)


@pytest.mark.parametrize("past_by", ["kv", "queries"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_past_may_be_reached_either_way(layout, past_by):
    folder = tiny_folder("llama")
    ring = runtime(folder, 3, layout, chunk_tokens=5)
    ring.config.strategy.past_by = past_by
    check(folder, LongContext.from_config(ring.config), 64, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [2, 4])
def test_long_documents(world, layout):
    folder = tiny_folder("llama")
    check(folder, runtime(folder, world, layout, 8192), 1021, 5)
    check(folder, runtime(folder, world, layout, 100), 1021, 5)


@pytest.mark.parametrize("window", [5, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sliding_windows(layout, window):
    folder = tiny_folder("mistral", sliding_window=window)
    check(folder, runtime(folder, 3, layout, 8192), 61, 9)
    check(folder, runtime(folder, 3, layout, 6), 61, 9)


def test_a_document_can_be_asked_again_and_questions_leave_nothing_behind():
    folder = tiny_folder("llama")
    ring = runtime(folder, 3, "zigzag", 8192)
    document = ring.encode(random_ids(40))
    held = document.metrics.kv_bytes
    first = ring.ask(document, random_ids(9), max_new_tokens=20)
    ring.ask(document, random_ids(30, seed=3), max_new_tokens=5)
    again = ring.ask(document, random_ids(9), max_new_tokens=20)
    assert again.ids == first.ids
    assert held == document.metrics.kv_bytes


def test_answering_moves_nothing():
    ring = runtime(tiny_folder("llama"), 3, "zigzag", 8192)
    document = ring.encode(random_ids(40))

    def places():
        caches = [shard.cache.of(None) for shard in document.shards]
        return [kept.view(0, 0, 1).k_BTHD.data_ptr() for kept in caches]

    before = places()
    ring.ask(document, random_ids(30), max_new_tokens=20)
    assert places() == before
    ring.ask(document, random_ids(900), max_new_tokens=200)  # more than the room
    assert places() == before


def test_dense_is_one_rank_of_the_same():
    folder = tiny_folder("llama")
    check(folder, LongContext.from_pretrained(folder, strategy="dense"), 50, 4)
