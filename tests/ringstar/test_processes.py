"""python -m pytest tests/ringstar/test_processes.py

Depth over real processes: one start of the ranks per world size runs all its cases.
"""

import math

import pytest
import torch

from ringattn import Costs, ExtendPlan
from ringstar import LongContext
from ringstar.config import Config, ModelConfig, RingConfig
from seqpar import Layout
from seqpar.process import ProcessWorld
from tests.support.models import FAMILIES, expected, random_ids, relative_error, tiny_folder
from tests.support.ranks import in_processes, in_threads
from tests.support.runtime import ANEW

LAYOUTS = ("zigzag", "striped", "contiguous")
BOUND, GREEDY = 1e-5, 32
PAGE = 4  # tokens of a page
ROOM = 8  # tokens kept free for question and answer


def cases(world):
    """(family, layout, chunk_tokens, document, query)"""
    lengths = (1, 2, max(1, world - 1), world, 55, 101)
    for number, family in enumerate(FAMILIES):
        for turn, layout in enumerate(LAYOUTS):
            for document in lengths:
                yield family, layout, 8192, document, (1, 2, 70)[(turn + document) % 3]
            yield family, layout, 5 + number, 83, 4
    for layout in LAYOUTS:
        yield "llama", layout, 300, 1201, 9


def folders():
    return {family: tiny_folder(family) for family in FAMILIES}


def answers(transport, where, world):
    """First logits and tokens of every case; the model of a family is loaded once."""
    results = []
    runtimes = {
        family: LongContext.from_config(
            Config(model=ModelConfig(path=folder), cache=ANEW), ProcessWorld(transport)
        )
        for family, folder in where.items()
    }
    for family, layout, chunk_tokens, document, query in cases(world):
        runtime = runtimes[family]
        runtime.config.encode.chunk_tokens = chunk_tokens
        encoded = runtime.encode(random_ids(document, seed=1), strategy=RingConfig(layout=layout))
        new = GREEDY if document > 10 else 2
        answer = runtime.ask(encoded, random_ids(query, seed=2), max_new_tokens=new)
        results.append((answer.first_logits.numpy(), answer.ids))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8])
def test_equal_to_one_device(world):
    where = folders()
    ranks = in_processes(world, answers, where, world)
    for case, *given in zip(cases(world), *ranks, strict=True):
        family, _, _, document, query = case
        ids = random_ids(document, seed=1) + random_ids(query, seed=2)
        want = expected(where[family], ids, GREEDY if document > 10 else 2)
        for logits, tokens in given:  # every rank says the same
            assert relative_error(torch.from_numpy(logits), want.logits_V) <= BOUND, case
            assert tokens == want.ids, case


def each_layout(transport, folder):
    return [one_answer(transport, folder, layout) for layout in LAYOUTS]


def one_answer(transport, folder, layout):
    config = Config(model=ModelConfig(path=folder), strategy=RingConfig(layout=layout))
    config.encode.chunk_tokens = 20
    runtime = LongContext.from_config(config, ProcessWorld(transport))
    answer = runtime.ask(runtime.encode(random_ids(90)), random_ids(5), max_new_tokens=4)
    return answer.first_logits, answer.metrics


def test_transports_agree_bitwise_and_count_alike():
    folder = tiny_folder("llama")
    starts = (start(3, each_layout, folder) for start in (in_processes, in_threads))
    for ranks in zip(*starts, strict=True):
        for layout, given, simulated in zip(LAYOUTS, *ranks, strict=True):
            (logits, metrics), (its_logits, its_metrics) = given, simulated
            assert torch.equal(logits, its_logits), layout
            assert metrics.kv_bytes == its_metrics.kv_bytes, layout
            assert metrics.bytes_sent == its_metrics.bytes_sent, layout


def encoded_bytes(transport, folder, layout, document):
    config = Config(model=ModelConfig(path=folder), strategy=RingConfig(layout=layout))
    config.encode.answer_tokens, config.cache.page_tokens = ROOM, PAGE
    runtime = LongContext.from_config(config, ProcessWorld(transport))
    encoded = runtime.encode(random_ids(document))
    (shard,) = encoded.shards
    return shard.cache.pool.allocated_nbytes, encoded.metrics.bytes_sent[transport.rank]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [2, 4])
def test_kv_is_really_sharded(world, layout):
    document, layers = 120, 2
    costs = Costs(heads=4, head_dim=16, itemsize=4, kv_bytes=2 * 2 * 16 * 4)
    ranks = in_threads(world, encoded_bytes, tiny_folder("llama"), layout, document)
    runs = tuple(Layout(layout, 0, document, world).runs(rank) for rank in range(world))
    for rank, (held, sent) in enumerate(ranks):
        share = document // world * costs.kv_bytes  # of one layer
        pages = math.ceil(document / world / PAGE) + math.ceil(ROOM / world / PAGE)
        assert held == layers * pages * PAGE * costs.kv_bytes >= layers * share
        plan = ExtendPlan(rank, runs, ((),) * world)
        assert sent == layers * plan.bytes_sent(costs)
