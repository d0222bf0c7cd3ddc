"""python -m pytest tests/ringstar/test_reuse.py

Beginnings that documents have in common are encoded once, and answers stay what they are.
"""

import copy
import gc
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringstar import CacheConfig, LongContext, UserError
from ringstar.config import StarConfig
from ringstar.document import Shelf, _blocks, _in_common
from seqpar.process import ProcessWorld
from tests.support.models import (
    DYNAMIC,
    expected,
    random_ids,
    relative_error,
    tiny_folder,
)
from tests.support.ranks import in_processes
from tests.support.runtime import assert_exact, simulated

QUESTION, NEW = random_ids(9, seed=4), 16
COMMON = random_ids(150, seed=7)


def runtime(folder, world=3, layout="zigzag", cache=None, **options):
    return simulated(
        folder, world, layout=layout, cache=cache or CacheConfig(page_tokens=4), **options
    )


def check(ring, folder, document):
    assert_exact(ring, document, folder, QUESTION, NEW)


def computed(ring):
    """A list that grows by the tokens of each forward pass of any rank."""
    seen = []
    decoder = ring.group.engines[0].model.model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
@pytest.mark.parametrize("chunk_tokens", [9, 8192])
def test_a_common_beginning_is_encoded_once(layout, chunk_tokens):
    folder = tiny_folder("llama")
    for world in (1, 2, 3):
        ring = runtime(folder, world, layout, chunk_tokens=chunk_tokens)
        first = ring.encode(COMMON + random_ids(20, seed=1))
        seen = computed(ring)
        second = ring.encode(COMMON + random_ids(31, seed=2))
        assert second.cached_tokens == len(COMMON) and first.cached_tokens == 0
        assert sum(seen) == 31 if chunk_tokens > 100 else sum(seen) >= 31
        for document in (first, second, first):
            check(ring, folder, document)


def test_the_same_document_is_not_encoded_again_and_takes_no_memory():
    folder = tiny_folder("llama")
    ring = runtime(folder)
    first, seen = ring.encode(COMMON), computed(ring)
    pools = [shard.cache.pool for shard in first.shards]
    before = [pool.allocated_nbytes for pool in pools]
    second = ring.encode(COMMON)
    assert second.cached_tokens == len(COMMON) and not seen
    page = pools[0].groups[None].page_bytes
    grown = [pool.allocated_nbytes - was for pool, was in zip(pools, before, strict=True)]
    assert all(0 <= each <= page for each in grown)  # a tail that is copied
    check(ring, folder, second)
    check(ring, folder, first)


def test_short_documents_are_found_too():
    ring = runtime(tiny_folder("llama"), 2)
    ring.encode(COMMON[:3])
    assert ring.encode(COMMON[:3]).cached_tokens == 3
    assert ring.encode(COMMON[:2]).cached_tokens == 0


def test_a_document_that_nobody_has_any_more_is_still_known():
    ring = runtime(tiny_folder("llama"))
    ring.encode(COMMON)
    gc.collect()
    document = ring.encode(COMMON)
    assert document.cached_tokens == len(COMMON)
    document.forget()
    ring.encode(COMMON).forget()  # the first one's pages were shared
    with pytest.raises(UserError, match="encode it again"):
        ring.ask(document, QUESTION)


def test_without_reuse_each_is_encoded_and_gone_with_its_owner():
    ring = runtime(tiny_folder("llama"), cache=CacheConfig(reuse=False))
    document = ring.encode(COMMON)
    pools = [shard.cache.pool for shard in document.shards]
    assert ring.encode(COMMON).cached_tokens == 0
    del document
    gc.collect()
    assert [pool.allocated_nbytes for pool in pools] == [0] * 3


def test_dense_and_ring_know_each_other_but_star_only_itself():
    folder = tiny_folder("llama")
    ring = runtime(folder, 2)
    ring.encode(COMMON)
    star = StarConfig(block_size=40)
    first = ring.encode(COMMON, strategy=star)
    assert first.cached_tokens == 0
    answer = ring.ask(first, QUESTION, max_new_tokens=NEW)
    again = ring.encode(COMMON, strategy=StarConfig(block_size=40))
    assert again.cached_tokens == len(COMMON)
    same = ring.ask(again, QUESTION, max_new_tokens=NEW)
    assert same.ids == answer.ids
    assert relative_error(same.first_logits, answer.first_logits) <= 1e-5
    for other in (StarConfig(block_size=50), StarConfig(block_size=40, anchor_size=8)):
        assert ring.encode(COMMON, strategy=other).cached_tokens == 0
    assert ring.encode([*COMMON, 5], strategy=star).cached_tokens == 0
    assert ring.encode(COMMON).cached_tokens == len(COMMON)


def test_star_of_another_number_of_ranks_is_another_approximation(tmp_path):
    folder = tiny_folder("llama")
    three = runtime(folder, 3, strategy=StarConfig())
    three.save(three.encode(COMMON), str(tmp_path))
    two = runtime(folder, 2, strategy=StarConfig())
    two.load(str(tmp_path))
    assert two.encode(COMMON).cached_tokens == 0


def test_after_loading_and_appending(tmp_path):
    folder = tiny_folder("llama")
    ring = runtime(folder, 2)
    ring.save(ring.encode(COMMON), str(tmp_path))
    other = runtime(folder, 3)
    loaded = other.load(str(tmp_path))
    more = random_ids(40, seed=3)
    longer = other.append(loaded, more)
    again = other.encode([*COMMON, *more[:20], more[20] ^ 1])
    assert again.cached_tokens == len(COMMON) + 20
    for document in (longer, again):
        check(other, folder, document)


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_windows_that_forgot_it_are_not_asked(family, layout):
    """A beginning of a document is gone where a window has moved on; the whole is not."""
    folder = tiny_folder(family)
    ring = runtime(folder, 2, layout, chunk_tokens=20)
    first = ring.encode(COMMON)
    assert ring.encode([*COMMON[:100], 1, 2]).cached_tokens == 0
    longer = ring.encode([*COMMON, *random_ids(30, seed=9)])
    assert longer.cached_tokens == len(COMMON)
    for document in (longer, first):
        check(ring, folder, document)


def test_rope_that_depends_on_the_length():
    folder = tiny_folder("llama", **DYNAMIC)
    ring = runtime(folder, 2, allow_beyond_limit=True)
    ring.encode(COMMON[:70])
    assert ring.encode(COMMON[:90]).cached_tokens == 0
    ring.encode(COMMON[:70], length=99)
    document = ring.encode(COMMON[:90], length=99)
    assert document.cached_tokens == 70
    check(ring, folder, document)


def test_conversations_and_documents_do_not_meet():
    """A document shares pages with one that is asked, appended to and talked about."""
    folder = tiny_folder("llama")
    ring = runtime(folder, 2)
    first = ring.encode(COMMON[:70])
    talk = ring.converse(first)
    talk.ask(QUESTION, max_new_tokens=5)
    second = ring.encode([*COMMON[:70], *random_ids(11, seed=2)])
    assert second.cached_tokens == 70
    talk.ask(QUESTION, max_new_tokens=5)
    third = ring.append(first, random_ids(8, seed=5))
    for document in (second, third):
        check(ring, folder, document)


def in_a_process(transport, folder):
    ring = LongContext.from_pretrained(folder, transport=ProcessWorld(transport))
    ring.encode(COMMON)
    document = ring.encode([*COMMON[:130], 7, 8, 9])
    return document.cached_tokens, ring.ask(document, QUESTION, max_new_tokens=NEW).ids


def test_processes_know_the_same():
    folder = tiny_folder("llama")
    want = expected(folder, [*COMMON[:130], 7, 8, 9, *QUESTION], NEW)
    assert in_processes(2, in_a_process, folder) == [(130, want.ids)] * 2


texts = st.lists(st.integers(0, 2), min_size=1, max_size=400)


@dataclass(eq=False)
class FakeDocument:
    ids: list
    shards: list = field(default_factory=lambda: [None])
    evicted: bool = False


@given(st.lists(st.tuples(st.integers(0, 300), texts), min_size=1, max_size=5), st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_the_longest_beginning_is_found(tails, kept):
    """By blocks: only what shares a block of 64, or is the same as a whole, is looked at."""
    base, shelf = random_ids(300), Shelf(keeps=True)
    documents = [FakeDocument(base[:cut] + tail) for cut, tail in tails]
    for document in documents:
        shelf.add(document)
    wanted = [*base[:kept], 1]
    found = shelf.beginning(wanted, lambda document, tokens: True)
    most = max(_in_common(document.ids, wanted) for document in documents)
    assert (found[1] if found else 0) == most or most < 64
    for document in documents:
        shelf.remove(document)
    assert not shelf._by_block and not shelf._by_use


def test_blocks_depend_on_all_before_them():
    ids = random_ids(200)
    changed = [ids[0] + 1, *ids[1:]]
    assert not set(_blocks(ids)) & set(_blocks(changed))


def test_a_copied_past_shares_its_pages():
    """As scripts reuse a prefix with transformers: copy.deepcopy(past_key_values)."""
    ring = runtime(tiny_folder("llama"), 1)
    (shard,) = ring.encode(COMMON).shards
    before = shard.cache.pool.allocated_nbytes
    other = copy.deepcopy(shard)
    assert other.cache.of(None).pages[:-1] == shard.cache.of(None).pages[:-1]
    assert shard.cache.pool.allocated_nbytes <= before + shard.cache.pool.groups[None].page_bytes
