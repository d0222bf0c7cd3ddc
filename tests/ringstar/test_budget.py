"""python -m pytest tests/ringstar/test_budget.py

KV stays within its budget: documents make room for others, or are refused before they are encoded.
"""

from collections import namedtuple

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ringstar.memory
import ringstar.paging.pool
import ringstar.stowed
from ringstar import CacheConfig, LongContext, UserError, attach
from ringstar.config import Config, ModelConfig, byte_size
from ringstar.memory import free_memory
from ringstar.paging import PageTable
from ringstar.shard import TextShard
from ringstar.stowed import HostPlace, Stowed
from seqpar.process import ProcessWorld
from tests.support.models import eager, expected, random_ids, tiny_folder
from tests.support.ranks import in_processes
from tests.support.runtime import assert_exact, simulated

QUESTION, NEW = random_ids(9, seed=4), 8
TOKEN = 2 * 2 * 2 * 16 * 4  # bytes of a tiny model's KV: layers, k and v, heads, head size, float32
PAGE = 4


def documents(count, tokens=100):
    return [random_ids(tokens, seed=10 + number) for number in range(count)]


def budget(tokens, **options):
    """Room for so many tokens on each rank."""
    return CacheConfig(max_bytes=tokens * TOKEN, page_tokens=PAGE, **options)


def runtime(folder, cache, world=2, **options):
    return simulated(folder, world, cache=cache, **options)


def check(ring, folder, document):
    assert_exact(ring, document, folder, QUESTION, NEW)


def put_aside(place):
    """What this process has in files of that folder."""
    maps = psutil.Process().memory_maps(grouped=False)
    return [each for each in maps if each.path.startswith(f"{place}/")]


def within(ring):
    for engine in ring.group.engines.values():
        assert engine.pool.allocated_nbytes <= engine.pool.limit


def refused_and_asked(transport, folder):
    """An answer after a document that found no room; on a rank of its own."""
    config = Config(model=ModelConfig(path=folder), cache=budget(80))
    ring = LongContext.from_config(config, ProcessWorld(transport))
    kept = ring.encode(documents(1)[0])
    kept.pin()
    for _ in range(2):
        with pytest.raises(UserError, match=r"cache\.max_bytes"):
            ring.encode(documents(2)[1])
    return ring.ask(kept, QUESTION, max_new_tokens=NEW).ids


def test_processes_go_on_after_a_refusal():
    folder = tiny_folder("llama")
    want = expected(folder, documents(1)[0] + QUESTION, NEW).ids
    assert in_processes(2, refused_and_asked, folder) == [want] * 2


def test_the_least_recently_used_makes_room():
    """Two documents of 50 tokens a rank fit, and a question; not three."""
    folder = tiny_folder("llama")
    ring = runtime(folder, budget(130))
    first, second, third = documents(3)
    one, two = ring.encode(first), ring.encode(second)
    check(ring, folder, one)
    three = ring.encode(third)
    within(ring)
    with pytest.raises(UserError, match=r"^document=100 tokens: made room for others, "):
        ring.ask(two, QUESTION)
    for document in (one, three):
        check(ring, folder, document)
    assert ring.encode(first).cached_tokens == 100
    check(ring, folder, ring.encode(second))
    within(ring)


def test_pinned_documents_stay_and_others_are_refused_before_anything_goes():
    folder = tiny_folder("llama")
    ring = runtime(folder, budget(130))
    first, second, third = documents(3)
    one, two = ring.encode(first), ring.encode(second)
    one.pin()
    two.pin()
    said = r"^cache\.max_bytes=[\d,]+: [\d,]+ bytes too few on rank \d for the KV that is needed; "
    with pytest.raises(UserError, match=said):
        ring.encode(third)
    two.unpin()
    with pytest.raises(UserError, match=said):
        ring.encode(random_ids(200))  # would not fit beside the first, even if the second went
    check(ring, folder, two)
    ring.encode(third)
    with pytest.raises(UserError, match="made room"):
        ring.ask(two, QUESTION)
    check(ring, folder, one)


def test_shared_pages_are_counted_once_before_anything_goes():
    """200 tokens do not fit beside nothing; two documents of 100 are one and a few tokens."""
    folder = tiny_folder("llama")
    ring = runtime(folder, budget(130), 1)
    first = documents(1)[0]
    both = [ring.encode(first), ring.encode([*first, 3, 4, 5, 6])]
    with pytest.raises(UserError, match=r"^cache\.max_bytes="):
        ring.encode(random_ids(200, seed=3))
    for document in both:
        check(ring, folder, document)


def test_memory_that_the_device_does_not_have_leaves_the_pool_as_it_was(monkeypatch):
    folder = tiny_folder("llama")
    ring = runtime(folder, budget(1000), 1)
    pool = ring.group.engines[0].pool

    def none(*_):
        raise torch.OutOfMemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(ringstar.paging.pool.Storage, "room", none)
        with pytest.raises(torch.OutOfMemoryError):
            ring.encode(documents(1)[0])
    assert pool.free_nbytes == pool.allocated_nbytes == 0
    check(ring, folder, ring.encode(documents(1)[0]))


def test_a_document_that_never_fits_is_refused_before_it_is_encoded():
    ring = runtime(tiny_folder("llama"), budget(40))
    seen = []
    decoder = ring.group.engines[0].model.model.get_decoder()
    decoder.register_forward_pre_hook(lambda *_: seen.append(1))
    with pytest.raises(UserError, match=r"^cache\.max_bytes=20,480: "):
        ring.encode(random_ids(100))
    assert not seen
    small = ring.encode(random_ids(60))
    with pytest.raises(UserError, match=r"^cache\.max_bytes=20,480: "):
        ring.ask(small, random_ids(60))
    with pytest.raises(UserError, match=r"^cache\.max_bytes=20,480: "):
        ring.append(small, random_ids(60))
    assert len(ring.ask(small, QUESTION, max_new_tokens=NEW).ids) == NEW  # is what it was


def test_budgets_hold_for_models_with_windows():
    folder = tiny_folder("gemma2")
    needed = None
    for tokens in range(20, 100, 6):
        ring = runtime(folder, budget(tokens), chunk_tokens=10)
        try:
            document = ring.encode(documents(1)[0])
            check(ring, folder, document)
        except UserError as error:
            assert error.key == "cache.max_bytes"  # noqa: PT017
            assert needed is None, "more memory must not be too little"
        else:
            needed = needed or tokens
        within(ring)
    assert needed is not None and needed > 20


def test_random_requests_stay_within_the_budget_and_right():
    """Encodes, questions, appends and conversations, in every order."""
    folder = tiny_folder("llama")
    draws = torch.Generator().manual_seed(0)

    def draw(below):
        return int(torch.randint(below, (1,), generator=draws))

    for offload in ("none", "disk"):
        ring = runtime(folder, budget(150, offload=offload), 3)
        base, alive = random_ids(120, seed=3), []
        for _ in range(60):
            kind = draw(3)
            try:
                if kind == 0 or not alive:
                    ids = base[: draw(121)] + random_ids(1 + draw(40), seed=draw(1000))
                    alive.append(ring.encode(ids))
                elif kind == 1:
                    check(ring, folder, alive[draw(len(alive))])
                else:
                    at = draw(len(alive))
                    alive[at] = ring.append(alive[at], random_ids(1 + draw(20), seed=draw(1000)))
            except UserError as error:
                assert error.key in ("document", "cache.max_bytes")  # noqa: PT017
            alive = [each for each in alive if each.shards and not each.shards[0].evicted]
            within(ring)
        assert alive
        for document in alive:
            check(ring, folder, document)


# --- put aside, and back


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_what_goes_to_disk_comes_back(family, tmp_path):
    folder = tiny_folder(family)
    place = tmp_path / "a place"
    place.mkdir()
    cache = budget(130, offload="disk", offload_path=str(place))
    ring = runtime(folder, cache, layout="zigzag", chunk_tokens=30)
    encoded = [ring.encode(ids) for ids in documents(4)]
    assert put_aside(place) and not list(place.iterdir())  # nothing that a killed run could leave
    for _ in range(2):
        for document in encoded:
            check(ring, folder, document)
            within(ring)
    encoded[0].pin()
    longer = ring.append(encoded[0], random_ids(13, seed=8))
    assert longer in ring.shelf.pinned and encoded[0] not in ring.shelf.pinned
    longer.unpin()
    again = ring.encode([*documents(4)[1], 3, 4])
    assert again.cached_tokens == (100 if family == "llama" else again.cached_tokens)
    for document in (longer, again):
        check(ring, folder, document)
    del encoded, longer, again, document
    ring.shelf._by_use.clear()
    ring.shelf._by_block.clear()
    assert not put_aside(place)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_could_not_be_read_back_is_read_again(family, monkeypatch):
    """A try that failed halfway leaves nothing behind."""
    folder = tiny_folder(family)
    ring = runtime(folder, budget(200), 1, chunk_tokens=30)
    document = ring.encode(documents(1)[0])
    document.shards[0].stow(document.shards[0].copied_to(HostPlace()))
    calls, write = [], PageTable.write

    def fails_once(table, layer, at, kv):
        calls.append(layer)
        if len(calls) == 2:
            raise OSError("the disk went away")
        write(table, layer, at, kv)

    monkeypatch.setattr(PageTable, "write", fails_once)
    with pytest.raises(OSError, match="went away"):
        ring.ask(document, QUESTION)
    assert ring.group.engines[0].pool.allocated_nbytes == 0
    check(ring, folder, document)


def test_what_was_put_aside_and_forgotten_is_gone(tmp_path):
    place = tmp_path / "a place"
    place.mkdir()
    ring = runtime(tiny_folder("llama"), budget(70, offload="disk", offload_path=str(place)))
    kept = [ring.encode(ids) for ids in documents(2)]
    assert put_aside(place)
    kept[0].forget()
    assert not put_aside(place)


@pytest.mark.parametrize("held", [True, False])
def test_only_what_somebody_has_is_put_aside(tmp_path, held):
    """Nobody could ask about the rest: it is dropped, in pages or on the disk."""
    cache = budget(70, offload="disk", offload_path=str(tmp_path))
    ring, ids = runtime(tiny_folder("llama"), cache), documents(5)

    def texts_aside():
        return len({each.path for each in put_aside(tmp_path)}) // ring.world_size

    kept = [ring.encode(ids[0])]
    last = ring.encode(ids[1])
    assert texts_aside() == 1  # the first
    if not held:
        kept.clear()
    for each in ids[2:4]:
        last = ring.encode(each)  # the one before it is held until this is there
        assert texts_aside() == 1 + held
    del last
    ring.encode(ids[4])  # for which one went that nobody had
    assert texts_aside() == 1 + held
    for document in kept:
        check(ring, tiny_folder("llama"), document)


def test_host_memory_that_is_full_is_refused_on_every_rank(monkeypatch):
    ring = runtime(tiny_folder("llama"), budget(70))
    ring.group.places = [HostPlace() for _ in ring.group.places]
    document = ring.encode(documents(1)[0])
    make, calls = torch.empty, []

    def full(*args, **more):
        if "pin_memory" in more:
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("CUDA error: out of memory")
        return make(*args, **more)

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UserError, match="a document cannot be put there on rank"):
        ring.encode(documents(2)[1])
    monkeypatch.undo()
    check(ring, tiny_folder("llama"), document)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_host_memory_is_a_place_too(family):
    """As from a GPU, where there is one."""
    folder = tiny_folder(family)
    ring = runtime(folder, budget(130), chunk_tokens=30)
    document = ring.encode(documents(1)[0])
    for shard in document.shards:
        shard.stow(shard.copied_to(HostPlace()))
        assert not shard.is_here and shard.cache.pool.allocated_nbytes == 0
    check(ring, folder, document)
    assert all(shard.is_here for shard in document.shards)


def test_a_saved_and_a_scored_document_come_back_first(tmp_path):
    folder = tiny_folder("llama")
    ring = runtime(folder, budget(70, offload="disk"))
    one, two = (ring.encode(ids) for ids in documents(2))
    assert not one.shards[0].is_here
    ring.save(one, str(tmp_path / "one"))
    assert one.shards[0].is_here and not two.shards[0].is_here
    ring.logits(two, QUESTION)
    loaded = ring.load(str(tmp_path / "one"))
    check(ring, folder, loaded)


def test_conversations_are_read_again_when_their_document_was_away():
    folder = tiny_folder("llama")
    ring = runtime(folder, budget(80, offload="disk"))
    one, two = (ring.encode(ids) for ids in documents(2))
    talk, ids = ring.converse(one), list(one.ids)
    for turn in range(3):
        question = random_ids(5, seed=turn)
        want = expected(folder, [*ids, *question], 4)
        answer = talk.ask(question, max_new_tokens=4)
        assert answer.ids == want.ids
        ids += [*question, *answer.ids]
        check(ring, folder, two)


def test_a_full_disk_is_named(monkeypatch):
    def full(path, tensors):
        raise OSError(28, "No space left on device")

    ring = runtime(tiny_folder("llama"), budget(70, offload="disk"))
    first, second = documents(2)
    one = ring.encode(first)
    monkeypatch.setattr(ringstar.stowed, "write_tensors", full)
    with pytest.raises(UserError, match=r"^cache\.offload_path=.*rank 0: no space left on device"):
        ring.encode(second)
    monkeypatch.undo()
    check(ring, tiny_folder("llama"), one)


def test_a_disk_that_is_full_on_one_rank_leaves_the_document_on_all(monkeypatch):
    ring = runtime(tiny_folder("llama"), budget(70, offload="disk"))
    first, second = documents(2)
    one = ring.encode(first)

    def full_on_rank_1(shard, place):
        if shard is one.shards[1]:
            raise OSError(28, "No space left on device")
        return Stowed(shard.cache, place)

    monkeypatch.setattr(TextShard, "copied_to", full_on_rank_1)
    for _ in range(2):
        with pytest.raises(UserError, match=r"^cache\.offload_path=.*rank 1: no space left"):
            ring.encode(second)
        assert all(shard.is_here for shard in one.shards)
    monkeypatch.undo()
    two = ring.encode(second)
    assert not any(shard.is_here for shard in one.shards)
    for document in (one, two):
        check(ring, tiny_folder("llama"), document)


def test_a_folder_of_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    ring = runtime(tiny_folder("llama"), budget(70, offload="disk", offload_path="~"))
    kept = [ring.encode(ids) for ids in documents(2)]
    assert put_aside(tmp_path) and kept


def test_what_cannot_be_is_refused_by_name(tmp_path):
    folder = tiny_folder("llama")
    for options, said in (
        ({"max_bytes": "12 parsecs"}, r"^cache\.max_bytes=12 parsecs: allowed: bytes above 0"),
        ({"max_bytes": 0}, r"^cache\.max_bytes=0: "),
        ({"memory_fraction": 1.5}, r"^cache\.memory_fraction=1\.5: allowed: above 0, at most 1"),
        ({"memory_fraction": 0.5, "max_bytes": 9}, r"^cache\.memory_fraction=0\.5: .*drop one"),
        ({"page_tokens": 0}, r"^cache\.page_tokens=0: "),
        ({"dtype": "int4"}, r"^cache\.dtype=int4: allowed: auto, int8, fp8"),
        ({"offload": "moon"}, r"^cache\.offload=moon: allowed: none, host, disk"),
        ({"offload": "host"}, r"^cache\.offload=host: KV is in host memory already"),
        ({"offload_path": "x"}, r"^cache\.offload_path=x: needs cache\.offload=disk"),
        (
            {"offload": "disk", "offload_path": str(tmp_path / "none")},
            r"^cache\.offload_path=.*none: no such file or directory",
        ),
    ):
        with pytest.raises(UserError, match=said):
            runtime(folder, CacheConfig(**options), 1)
    with pytest.raises(UserError, match=r"^cache\.offload=disk: "):
        attach(eager(folder), cache=CacheConfig(offload="disk"))


def in_a_process(transport, folder, place):
    cache = budget(130, offload="disk", offload_path=place)
    ring = LongContext.from_pretrained(folder, transport=ProcessWorld(transport), cache=cache)
    encoded = [ring.encode(ids) for ids in documents(4)]
    encoded[2].pin()
    asked = [ring.ask(each, QUESTION, max_new_tokens=NEW).ids for each in [*encoded, encoded[1]]]
    within(ring)
    return asked, [each.shards[0].is_here for each in encoded]


def test_processes_agree_about_who_goes(tmp_path):
    folder = tiny_folder("llama")
    one, other = in_processes(2, in_a_process, folder, str(tmp_path))
    want = [expected(folder, [*ids, *QUESTION], NEW).ids for ids in documents(4)]
    assert one == other == ([*want, want[1]], [False, True, True, False])


# --- how much there is


def test_the_budget_is_a_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr(ringstar.memory, "free_memory", lambda device: 1_000_000)
    for fraction, world, limit in ((None, 1, 800_000), (0.5, 2, 250_000)):
        ring = runtime(tiny_folder("llama"), CacheConfig(memory_fraction=fraction), world)
        assert {engine.pool.limit for engine in ring.group.engines.values()} == {limit}


def test_a_container_has_less_than_its_host(monkeypatch, tmp_path):
    limit, usage = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(ringstar.memory, "_GROUPS", ((str(limit), str(usage)),))
    memory = namedtuple("memory", "available")(available=5000)
    monkeypatch.setattr(ringstar.memory.psutil, "virtual_memory", lambda: memory)
    assert free_memory(torch.device("cpu")) == 5000
    limit.write_text("4000\n")
    usage.write_text("1500\n")
    assert free_memory(torch.device("cpu")) == 2500
    limit.write_text("max\n")
    assert free_memory(torch.device("cpu")) == 5000


@given(st.integers(1, 10**15))
def test_sizes(number):
    assert byte_size(number) == byte_size(str(number)) == number
    assert byte_size("1.5GiB") == 3 << 29 and byte_size("2 MB") == 2_000_000


def test_loading_takes_no_more_than_there_is(tmp_path):
    """gemma2 has pages of two kinds: room for an answer to one must not be the other's."""
    folder = tiny_folder("gemma2")
    ring = runtime(folder, CacheConfig(reuse=False))
    ring.save(ring.encode(documents(1)[0]), str(tmp_path))
    loaded = 0
    for tokens in range(30, 110, 2):
        small = runtime(folder, budget(tokens))
        try:
            document = small.load(str(tmp_path))
            loaded += 1
            check(small, folder, document)
        except UserError as error:
            assert error.key == "cache.max_bytes"  # noqa: PT017
        within(small)
    assert 0 < loaded < 40
