"""python -m pytest tests/ringstar/test_append.py

Documents that grow: as if all had been encoded at once.
"""

import pytest

from ringstar import UserError
from ringstar.config import StarConfig
from ringstar.engine import RankEngine
from tests.support.chat import chat_folder
from tests.support.models import DYNAMIC, expected, over_bound, random_ids, tiny_folder
from tests.support.runtime import simulated

QUESTION, NEW = random_ids(9, seed=4), 16
PARTS = (30, 1, 47, 5)


def runtime(folder, world=3, layout="zigzag", **options):
    return simulated(folder, world, layout=layout, **options)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_oss", "smollm3"])
@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
def test_as_if_encoded_at_once(family, layout):
    """Chunks of 7 a rank, one token, fewer tokens than ranks; asked in between."""
    folder = tiny_folder(family)
    for world in (1, 2, 4):
        ring = runtime(folder, world, layout, chunk_tokens=7)
        ids, document = [], None
        for number, tokens in enumerate(PARTS):
            more = random_ids(tokens, seed=number)
            document = ring.append(document, more) if document else ring.encode(more)
            ids += more
            assert document.tokens == len(ids) and document.ids == ids
            answer = ring.ask(document, QUESTION, max_new_tokens=NEW)
            want = expected(folder, ids + QUESTION, NEW)
            assert over_bound(answer.first_logits, want) <= 1
            assert answer.ids == want.ids
        assert sum(document.metrics.kv_bytes) == sum(ring.encode(ids).metrics.kv_bytes)


def test_only_what_is_new_is_computed():
    ring, seen = runtime(tiny_folder("llama"), 2), []
    document = ring.encode(random_ids(60))
    ring.ask(document, QUESTION, max_new_tokens=3)
    model = ring.group.engines[0].model.model.model
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ring.append(document, random_ids(20))
    hook.remove()
    assert sum(seen) == 20


def test_a_loaded_document_grows_at_another_world_size_and_is_saved(tmp_path):
    folder, head, more = tiny_folder("gemma2"), random_ids(70), random_ids(40, seed=9)
    ring = runtime(folder, 2)
    ring.save(ring.encode(head), str(tmp_path))
    other = runtime(folder, 3, "striped", chunk_tokens=6)
    other.save(other.append(other.load(str(tmp_path)), more), str(tmp_path))
    want = expected(folder, head + more + QUESTION, NEW)
    for world in (1, 3, 4):
        last = runtime(folder, world)
        answer = last.ask(last.load(str(tmp_path)), QUESTION, max_new_tokens=NEW)
        assert over_bound(answer.first_logits, want) <= 1
        assert answer.ids == want.ids


def test_what_one_rank_encoded_grows_over_several(tmp_path):
    folder, head, more = tiny_folder("llama"), random_ids(70), random_ids(40, seed=9)
    dense = simulated(folder, 1, strategy="dense")
    dense.save(dense.encode(head), str(tmp_path))
    ring = runtime(folder, 3)
    longer = ring.append(ring.load(str(tmp_path)), more)
    want = expected(folder, head + more + QUESTION, NEW)
    answer = ring.ask(longer, QUESTION, max_new_tokens=NEW)
    assert over_bound(answer.first_logits, want) <= 1 and answer.ids == want.ids


def test_only_what_was_begun_uses_a_document_up(monkeypatch):
    ring = runtime(tiny_folder("llama"))
    document = ring.encode(random_ids(60))

    def busy(rank_fn):
        raise RuntimeError("rank 0 of an interrupted run is still computing: try again")

    with monkeypatch.context() as patch:
        patch.setattr(ring.ranks, "run", busy)
        with pytest.raises(RuntimeError, match="try again"):
            ring.append(document, [1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(RankEngine, "extend", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ring.append(document, [1, 2])
    with pytest.raises(UserError, match="was appended to"):
        ring.append(document, [1, 2])


def test_text_is_appended_as_it_stands():
    ring = runtime(chat_folder(), 2)
    document = ring.append(ring.encode("The ship left"), " at dawn")
    assert ring.files.decode(document.ids).endswith("The ship left at dawn")
    assert document.ids == ring.files.context_ids("The ship left at dawn")


def test_what_cannot_be_appended_is_refused():
    ring = runtime(tiny_folder("llama"))
    document = ring.encode(random_ids(60))
    with pytest.raises(UserError, match="more: is empty"):
        ring.append(document, [])
    with pytest.raises(UserError, match="more=97: token ids must be"):
        ring.append(document, [97])
    with pytest.raises(UserError, match="the model's limit is 8192"):
        ring.append(document, [1] * 8192)
    longer = ring.append(document, [1, 2])  # which the refusals left alone
    with pytest.raises(UserError, match="document: was appended to: use what append returned"):
        ring.ask(document, [1])
    assert ring.ask(longer, [1], max_new_tokens=1).ids
    star = ring.encode(random_ids(60), strategy=StarConfig())
    with pytest.raises(UserError, match=r"document\.strategy=star: its blocks are parts"):
        ring.append(star, [1])
    grows = runtime(tiny_folder("llama", **DYNAMIC), allow_beyond_limit=True)
    with pytest.raises(UserError, match="depends on the length of the text: encode the whole anew"):
        grows.append(grows.encode(random_ids(60)), random_ids(30))
