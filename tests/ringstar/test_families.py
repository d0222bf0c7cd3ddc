"""python -m pytest tests/ringstar/test_families.py

Every other family, with the features that make it itself, against one device: as test_exact.py.
The bound is 1e-5, or 20 times what the family's own float32 differs from its float64.
"""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import ringstar.passes
from ringattn import Costs, RingStrategy
from ringstar import UserError
from ringstar.models.geometry import OneToken
from ringstar.models.rotary import Rotary
from seqpar import Span, positions
from tests.support.models import (
    DYNAMIC,
    LONGROPE,
    OTHERS,
    expected,
    over_bound,
    random_ids,
    tiny_folder,
)
from tests.support.runtime import simulated

GREEDY, CHUNK = 32, 11
# documents and questions: within a window of 21, across it, across chunks of 11 a rank
LENGTHS = ((5, 1), (47, 3), (101, 30))
CASES = {name: (name, {}) for name in OTHERS} | {
    "phi3 longrope": ("phi3", LONGROPE),
    "llama dynamic": ("llama", DYNAMIC),
    "gemma2 without softcap": ("gemma2", {"attn_logit_softcapping": None}),
}


def runtime(folder, world, layout="zigzag", chunk_tokens=CHUNK):
    return simulated(
        folder, world, layout=layout, chunk_tokens=chunk_tokens, allow_beyond_limit=True
    )


def given(ring, document, query, new_tokens=GREEDY):
    ids, question = random_ids(document, seed=1), random_ids(query, seed=2)
    encoded = ring.encode(ids, length=document + query)
    return ring.ask(encoded, question, max_new_tokens=new_tokens)


def wanted(folder, document, query, new_tokens=GREEDY):
    return expected(folder, random_ids(document, seed=1) + random_ids(query, seed=2), new_tokens)


def error_over_bound(folder, answer, document, query, new_tokens=GREEDY):
    want = wanted(folder, document, query, new_tokens)
    return over_bound(answer.first_logits, want)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_one_device(name, world):
    family, changes = CASES[name]
    folder = tiny_folder(family, **changes)
    for layout in ("zigzag", "striped", "contiguous"):
        ring = runtime(folder, world, layout)
        for document, query in LENGTHS:
            new = GREEDY if document > 5 and name != "phi3 longrope" else 4
            answer = given(ring, document, query, new)
            assert error_over_bound(folder, answer, document, query, new) <= 1, (layout, document)
            assert answer.ids == wanted(folder, document, query, new).ids, (layout, document)


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_a_document_is_encoded_for_a_length(name):
    """What one text did to the frequencies is forgotten by the next; another length is refused."""
    family, changes = CASES[name]
    folder = tiny_folder(family, **changes)
    ring = runtime(folder, 2)
    for document, query in ((150, 4), (30, 4), (150, 4)):
        answer = given(ring, document, query, 4)
        assert error_over_bound(folder, answer, document, query, 4) <= 1
    encoded = ring.encode(random_ids(77))
    with pytest.raises(UserError, match=r"encode it with length=87 for this question"):
        ring.ask(encoded, random_ids(10), max_new_tokens=2)


@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
@pytest.mark.parametrize("chunk_tokens", [CHUNK, 8192])
def test_layers_with_a_window_keep_what_it_shows(layout, chunk_tokens):
    """gemma2: a window of 21 in one layer, none in the other."""
    world, tokens, window, of_token = 3, 101, 21, 2 * 2 * 16 * 4
    ring = runtime(tiny_folder("gemma2"), world, layout, chunk_tokens)
    document = ring.encode(random_ids(tokens))
    seen = set(range(tokens - window + 1, tokens))
    kept = [set(positions(shard.cache.of(window).runs)) for shard in document.shards]
    assert set().union(*kept) == seen and sum(map(len, kept)) == len(seen)
    for rank, shard in enumerate(document.shards):
        whole = shard.cache.of(None).tokens
        assert document.metrics.kv_bytes[rank] == (whole + len(kept[rank])) * of_token
        room = -(-ring.config.encode.answer_tokens // world)
        allocated = shard.cache.of(window).allocated_nbytes
        assert allocated <= (len(kept[rank]) + room) * of_token
    first = ring.ask(document, random_ids(7), max_new_tokens=9)
    assert ring.ask(document, random_ids(7), max_new_tokens=9).ids == first.ids


@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
@pytest.mark.parametrize("chunk_tokens", [CHUNK, 8192])
def test_ring_steps_that_no_window_reaches_are_skipped(layout, chunk_tokens):
    """mixtral: a window of 21 in both layers; 40 tokens a rank."""
    world, tokens, window = 4, 160, 21
    ring = runtime(tiny_folder("mixtral"), world, layout, chunk_tokens)
    document = ring.encode(random_ids(tokens))
    costs = Costs(heads=4, head_dim=16, itemsize=4, kv_bytes=2 * 2 * 16 * 4)
    for rank in range(world):
        place = SimpleNamespace(rank=rank, world_size=world)
        strategy = RingStrategy(place, layout=layout, chunk_tokens=chunk_tokens)
        plans = [extension.plan for extension in strategy.plan([Span(0, tokens, ((),) * world)])[1]]
        sent, whole = (2 * sum(p.bytes_sent(costs, w) for p in plans) for w in (window, None))
        assert document.metrics.bytes_sent[rank] == sent <= whole
        if layout == "contiguous" and chunk_tokens > tokens:  # only the next rank sees it
            assert sum(step.send > 0 for step in plans[0].new_steps(window)) == (rank < world - 1)
            assert sum(bool(step.tiles) for step in plans[0].new_steps(window)) == 1 + (rank > 0)


def other_window(by):
    """Every pass sees a window that is `by` tokens off, that which says what is kept too."""

    def change(monkeypatch):
        for kind in (ringstar.passes.ExtendPass, ringstar.passes.ReplicatedPass, OneToken):
            attend = kind.attend

            def wrong(self, *args, attend=attend, window, **rest):
                return attend(self, *args, window=window and window + by, **rest)

            monkeypatch.setattr(kind, "attend", wrong)

    return change


def sinks_in_each_partial(monkeypatch):
    once = ringstar.passes.add_sinks
    twice = lambda out, lse, sinks: once(once(out, lse, sinks), lse, sinks)  # noqa: E731
    monkeypatch.setattr(ringstar.passes, "add_sinks", twice)


def no_sinks(monkeypatch):
    monkeypatch.setattr(ringstar.passes, "add_sinks", lambda out, lse, sinks: out)


def softcap_before_scale(monkeypatch):
    bound = ringstar.passes._bound
    wrong = lambda kernel, scale, softcap: bound(kernel, scale, softcap * scale)  # noqa: E731
    monkeypatch.setattr(ringstar.passes, "_bound", wrong)


def length_of_one_rank(monkeypatch):
    plan = Rotary.plan

    def local(self, positions_T, like, length):
        return plan(self, positions_T, like, int(positions_T.max()) + 1)

    monkeypatch.setattr(Rotary, "plan", local)


FAULTS = {
    "window one too long": ("mixtral", other_window(1)),
    "window one too short": ("mixtral", other_window(-1)),
    "window of some layers one too long": ("gemma2", other_window(1)),
    "sinks in each partial": ("gpt_oss", sinks_in_each_partial),
    "no sinks": ("gpt_oss", no_sinks),
    "softcap before scale": ("gemma2", softcap_before_scale),
    "longrope by one rank's positions": ("phi3 longrope", length_of_one_rank),
    "dynamic rope by one rank's positions": ("llama dynamic", length_of_one_rank),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught(monkeypatch, fault):
    name, break_it = FAULTS[fault]
    family, changes = CASES[name]
    folder = tiny_folder(family, **changes)
    check = partial(error_over_bound, folder, document=70, query=15, new_tokens=2)
    assert check(given(runtime(folder, 2), 70, 15, 2)) <= 1
    break_it(monkeypatch)
    assert check(given(runtime(folder, 2), 70, 15, 2)) > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_config_that_names_no_dtype_leaves_it_to_the_weights(dtype, tmp_path):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: weight.to(dtype) for name, weight in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": None}))
    ring = simulated(str(folder), 2)
    assert ring.dtype == dtype
    assert len(ring.ask(ring.encode(random_ids(9)), [5], max_new_tokens=2).ids) == 2
