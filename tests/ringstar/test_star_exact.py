"""python -m pytest tests/ringstar/test_star_exact.py

Star Attention against its own definition: `tests/support/star_oracle.py`, one device and plain
Hugging Face.  Logits at every question position, greedy tokens, and what it costs: tokens,
pairs, exchanges, bytes.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ringstar.passes
from ringstar import LongContext
from ringstar.config import Config, EncodeConfig, ModelConfig, StarConfig, TransportConfig
from ringstar.models import BoundModel
from seqpar.process import ProcessWorld
from starattn import CONTENTS, POSITIONS, Anchor, make_blocks
from tests.support.models import (
    FAMILIES,
    VOCAB,
    expected,
    random_ids,
    relative_error,
    tiny_folder,
)
from tests.support.ranks import in_processes, in_threads
from tests.support.runtime import ANEW
from tests.support.star_oracle import (
    Anchored,
    anchored,
    block_edges,
    first_anchor,
    star,
    star_in_one_forward,
)

BOUND, GREEDY = 1e-5, 8
LAYERS, KV_HEADS, HEAD_DIM, ITEM = 2, 2, 16, 4
WHOLE = 8192  # tokens of a chunk that holds any document here
SHARES = ("world", "rank", "none")


@dataclass(frozen=True)
class Case:
    document: int
    block: int
    anchor: int
    world: int = 3
    question: int = 5
    share: str = "auto"
    content: str = "first"
    positions: str = "own"
    token: int | None = None
    chunk_tokens: int = WHOLE
    family: str = "llama"

    @property
    def ids(self) -> list[int]:
        return random_ids(self.document, seed=1)

    @property
    def question_ids(self) -> list[int]:
        return random_ids(self.question, seed=2)

    @property
    def config(self) -> StarConfig:
        return StarConfig(
            block_size=self.block,
            anchor_size=self.anchor,
            share_anchor=self.share,
            anchor_content=self.content,
            anchor_positions=self.positions,
            anchor_token=self.token,
        )

    @property
    def shareable(self) -> bool:
        return self.content != "previous" and self.positions == "own"


@functools.cache
def runtime(family: str, world: int, chunk_tokens: int = WHOLE) -> LongContext:
    config = Config(
        model=ModelConfig(path=tiny_folder(family)),
        strategy=StarConfig(),
        transport=TransportConfig("threads", world, threads_per_rank=1),
        encode=EncodeConfig(chunk_tokens),
        cache=ANEW,
    )
    return LongContext.from_config(config)


def anchors(case: Case) -> tuple[Anchored, ...]:
    """What stands before each block, by the rules.

    Only what is drawn is asked of `starattn.Anchor`, which tests/starattn judges.
    """
    ids, blocks = case.ids, make_blocks(case.document, case.world, case.block, case.anchor)
    drawn = Anchor(case.content, case.positions, case.token)  # type: ignore[arg-type]

    def before(index: int) -> tuple[Sequence[int], Sequence[int]]:
        previous = (index - 1) * case.block
        source = previous if case.content == "previous" else 0
        content = {
            "constant": [case.token] * case.anchor,
            "first": ids[: case.anchor],
            "previous": ids[previous : previous + case.anchor],
        }.get(case.content) or drawn.token_ids(index, blocks, ids, VOCAB)
        start = {"own": source, "previous": previous}.get(case.positions)
        at = drawn.run(index, blocks) if start is None else range(start, start + case.anchor)
        return content, list(at)

    return anchored(case.document, case.block, before)


def check(case: Case, new_tokens: int = GREEDY) -> None:
    """Every question position, and, unless 0, so many greedy tokens."""
    star_runtime = runtime(case.family, case.world, case.chunk_tokens)
    document = star_runtime.encode(case.ids, strategy=case.config)
    logits_QV = star_runtime.logits(document, case.question_ids, case.question)
    if not new_tokens:
        return verify(case, logits_QV, logits_QV[-1], [])
    answer = star_runtime.ask(document, case.question_ids, max_new_tokens=new_tokens)
    return verify(case, logits_QV, answer.first_logits, answer.ids)


def verify(case: Case, logits_QV: torch.Tensor, first_V: torch.Tensor, ids: list[int]) -> None:
    given = (tiny_folder(case.family), case.ids, case.question_ids, anchors(case))
    want, twin = star(*given, len(ids)), star(*given, 0, torch.float64)
    error = relative_error(logits_QV, want.logits_QV)
    assert error <= BOUND, f"{case}: {error:.1e}"
    assert relative_error(first_V, want.first_V) <= BOUND, case
    assert ids == want.ids, case
    # the oracle's own float32 error against its float64 twin is what the bound allows for
    assert relative_error(want.logits_QV, twin.logits_QV) <= BOUND, case
    assert relative_error(logits_QV, twin.logits_QV) <= BOUND, case


# -- the oracle itself -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_with_one_block_is_dense(family):
    folder, ids, question = tiny_folder(family), random_ids(40, seed=1), random_ids(6, seed=2)
    got = star(folder, ids, question, anchored(40, 40, first_anchor(ids, 40)), GREEDY)
    want = expected(folder, ids + question, GREEDY)
    assert relative_error(got.first_V, want.logits_V) < 1e-6
    assert got.ids == want.ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("block", "anchor"), [(13, 13), (10, 3), (10, 0)])
def test_the_oracle_is_one_masked_forward(family, block, anchor):
    folder, ids, question = tiny_folder(family), random_ids(41, seed=1), random_ids(5, seed=2)
    blocks = anchored(41, block, first_anchor(ids, anchor))
    for dtype in (torch.float32, torch.float64):
        got = star(folder, ids, question, blocks, 0, dtype).logits_QV
        want = star_in_one_forward(folder, ids, question, blocks, dtype)
        assert relative_error(got, want) < 2e-6


# -- equal to the oracle -----------------------------------------------------------------

COUNTS = (1, 2, 3, 5, 8)
QUESTIONS = (1, 2, 7, 19, 70)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_oracle(family, world):
    """Odd lengths; anchors of nothing, a third of a block, a block; every way of sharing."""
    turn = world + list(FAMILIES).index(family)
    for number, count in enumerate(COUNTS):
        block = 9 + number
        # the last block is shorter by this; an anchor is at most the document
        left_out = (turn + number) % 3 * 2 if count > 1 else 0
        question = QUESTIONS[(turn + number) % len(QUESTIONS)]
        case = Case(count * block - left_out, block, 0, world, question, family=family)
        assert len(block_edges(case.document, case.block)) == count
        check(case, 1)
        for anchor in (block // 3, block):
            for place, share in enumerate(SHARES):
                greedy = GREEDY if place == (turn + number + anchor) % 3 else 0
                check(replace(case, anchor=anchor, share=share), greedy)


@pytest.mark.parametrize("document", [1, 2, 3, 5])
def test_documents_of_few_tokens(document):
    for block in {1, 2, document} - {b for b in (2,) if b > document}:
        for world in (1, 3, 4):
            check(Case(document, block, min(1, block), world, 2), 2)


def test_the_remainder_may_be_one_token_or_shorter_than_the_anchor():
    for document in (31, 32, 39):
        for share in SHARES:
            check(Case(document, 10, 10, share=share), 3)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 30])
def test_in_several_chunks(chunk_tokens, share):
    """Chunks smaller than the anchor and larger, that end inside anchors and inside blocks."""
    case = Case(50, 13, 13, 2, 4, share, chunk_tokens=chunk_tokens, family="qwen3")
    check(case, 3)
    check(replace(case, document=43, block=9, anchor=5, world=1), 3)
    check(replace(case, document=61, block=11, anchor=4, world=3), 3)
    check(replace(case, document=25, block=12, anchor=12, world=4), 2)  # a rank has nothing


def test_block_and_anchor_as_by_default():
    """A block for each rank, an anchor as long as a block."""
    for world, document in ((1, 30), (2, 31), (3, 31), (4, 9)):
        star_runtime, block = runtime("llama", world), -(-document // world)
        case = Case(document, block, block, world)
        answer = star_runtime.ask(
            star_runtime.encode(case.ids), case.question_ids, max_new_tokens=3
        )
        want = star(tiny_folder("llama"), case.ids, case.question_ids, anchors(case), 3)
        assert relative_error(answer.first_logits, want.first_V) <= BOUND
        assert answer.ids == want.ids


def test_long_documents():
    check(Case(1021, 128, 32, 4, 9), GREEDY)
    check(Case(1021, 300, 300, 3, 9, chunk_tokens=100), GREEDY)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_combination(data):
    world, document = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 90))
    block = data.draw(st.integers(min(document, -(-document // 12)), document))
    case = Case(
        document,
        block,
        data.draw(st.integers(0, block)),
        world,
        data.draw(st.integers(1, 70)),
        content=data.draw(st.sampled_from([c for c in CONTENTS if c != "constant"])),
        positions=data.draw(st.sampled_from(POSITIONS)),
        chunk_tokens=data.draw(st.sampled_from([2, 5, 16, WHOLE])),
        family=data.draw(st.sampled_from(list(FAMILIES))),
    )
    shares = ("auto", *SHARES) if case.shareable else ("auto", "none")
    check(replace(case, share=data.draw(st.sampled_from(shares))), 2)


@pytest.mark.parametrize("share", SHARES)
def test_one_block_is_dense_attention(share):
    folder = tiny_folder("qwen2")
    for world, chunk_tokens in ((1, WHOLE), (3, WHOLE), (3, 7)):
        star_runtime = runtime("qwen2", world, chunk_tokens)
        for ids, question in ((random_ids(1), random_ids(3)), (random_ids(57), random_ids(9))):
            size = len(ids)
            settings = StarConfig(block_size=size, anchor_size=size, share_anchor=share)
            document = star_runtime.encode(ids, strategy=settings)
            answer = star_runtime.ask(document, question, max_new_tokens=GREEDY)
            want = expected(folder, ids + question, GREEDY)
            assert relative_error(answer.first_logits, want.logits_V) <= BOUND
            assert answer.ids == want.ids


def test_what_is_shared_changes_nothing():
    """The ways of sharing differ from one another by rounding alone."""
    case = Case(77, 13, 6, 4, 11)
    said = []
    for share in SHARES:
        star_runtime = runtime(case.family, case.world)
        document = star_runtime.encode(case.ids, strategy=replace(case.config, share_anchor=share))
        said.append(star_runtime.logits(document, case.question_ids, case.question))
    assert max(relative_error(logits, said[-1]) for logits in said) < 2e-6


def test_a_document_can_be_asked_again_and_nothing_is_left_behind():
    star_runtime, case = runtime("llama", 3), Case(40, 9, 4)
    document = star_runtime.encode(case.ids, strategy=case.config)
    held = [shard.cache.nbytes for shard in document.shards]
    first = star_runtime.ask(document, case.question_ids, max_new_tokens=12)
    star_runtime.ask(document, random_ids(30, seed=3), max_new_tokens=5)
    scored = star_runtime.logits(document, case.question_ids, case.question)
    again = star_runtime.ask(document, case.question_ids, max_new_tokens=12)
    assert again.ids == first.ids
    assert torch.equal(again.first_logits, first.first_logits)
    assert relative_error(scored[-1], first.first_logits) < 1e-6
    assert held == [shard.cache.nbytes for shard in document.shards] == document.metrics.kv_bytes


# -- ablations ---------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("content", CONTENTS)
def test_ablations(content, positions):
    token = 11 if content == "constant" else None
    case = Case(58, 12, 7, content=content, positions=positions, token=token, family="qwen3")
    for share in SHARES if case.shareable else ("none",):
        check(replace(case, share=share), 0)
    check(replace(case, anchor=12, world=2, chunk_tokens=5), 3)


def test_ablations_are_not_all_the_same():
    case, seen = Case(58, 12, 7, content="first"), []
    for content in CONTENTS:
        for positions in POSITIONS:
            token = 11 if content == "constant" else None
            seen.append(anchors(replace(case, content=content, positions=positions, token=token)))
    # content=previous stands at its own positions, which are the previous block's
    assert len(set(seen)) == len(CONTENTS) * len(POSITIONS) - 1
    logits = [star(tiny_folder("llama"), case.ids, [5], blocks, 0).first_V for blocks in seen]
    nearest = min(
        relative_error(a, b) for a, b in itertools.combinations(logits, 2) if not a.equal(b)
    )
    assert nearest > 100 * BOUND


def test_the_most_frequent_token_is_the_constant():
    ids = [7, 3, 9, 3, 5, 3, 9, 1, 0, 2, 4, 6]
    star_runtime, blocks = runtime("llama", 2), anchored(12, 4, lambda _: ([3] * 2, range(2)))
    chosen = StarConfig(block_size=4, anchor_size=2, anchor_content="constant")
    answer = star_runtime.ask(star_runtime.encode(ids, strategy=chosen), [8, 1], max_new_tokens=3)
    want = star(tiny_folder("llama"), ids, [8, 1], blocks, 3)
    assert relative_error(answer.first_logits, want.first_V) <= BOUND
    assert answer.ids == want.ids


# -- real processes ----------------------------------------------------------------------


def process_cases(world: int) -> list[Case]:
    wide = Case(57, 11, 5, world, 7)
    return [
        *(replace(wide, share=share) for share in SHARES),
        *(replace(wide, share=share, chunk_tokens=4, anchor=11) for share in SHARES),
        *(Case(19, 10, 6, world, 3, share) for share in SHARES),  # ranks that have nothing
        replace(wide, content="shuffled"),
        replace(wide, content="previous"),
        replace(wide, positions="random"),
    ]


def answers(transport: Any, folder: str, world: int) -> list[tuple]:
    said = []
    for case in process_cases(world):
        config = Config(
            model=ModelConfig(path=folder),
            strategy=case.config,
            encode=EncodeConfig(case.chunk_tokens),
            cache=ANEW,
        )
        ours = LongContext.from_config(config, ProcessWorld(transport))
        document = ours.encode(case.ids)
        answer = ours.ask(document, case.question_ids, max_new_tokens=3)
        scored = ours.logits(document, case.question_ids, case.question)
        # numpy: a tensor would be shared with a process that has ended when it is read
        logits = (scored.numpy(), answer.first_logits.numpy())
        said.append((*logits, answer.ids, document.metrics.bytes_sent))
    return said


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_real_processes_say_the_same(world):
    folder = tiny_folder("llama")
    processes = in_processes(world, answers, folder, world)
    threads = in_threads(world, answers, folder, world)
    for number, case in enumerate(process_cases(world)):
        scored, first, ids, _ = processes[0][number]
        verify(case, torch.from_numpy(scored), torch.from_numpy(first), ids)
        for one, other in zip(processes, threads, strict=True):
            real, simulated = one[number], other[number]
            assert (real[0] == simulated[0]).all(), case
            assert (real[1] == simulated[1]).all(), case
            assert real[2:] == simulated[2:], case


# -- what it costs -----------------------------------------------------------------------


def triangle(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def blocks_of(case: Case, rank: int) -> list[tuple[int, int]]:
    """(number, tokens) of the blocks of a rank: neighbouring runs of them."""
    sizes = [stop - start for start, stop in block_edges(case.document, case.block)]
    first, last = (-(-r * len(sizes) // case.world) for r in (rank, rank + 1))
    return [(number, sizes[number]) for number in range(first, last)]


def tokens_expected(case: Case, rank: int) -> int:
    """What goes through each layer of a rank in phase 1."""
    own = blocks_of(case, rank)
    kept, later = sum(size for _, size in own), [number for number, _ in own if number]
    if case.share == "none":
        return kept + case.anchor * len(later)
    if case.share == "rank":
        made = bool(later) and not (rank == 0 and case.content == "first")
        return kept + case.anchor * made
    shares = case.anchor > 0 and any(blocks_of(case, other) for other in range(1, case.world))
    made = rank == 0 and case.content != "first" and (shares or bool(later))
    idle = shares and not own  # a dummy token, to take part in the broadcast
    return kept + case.anchor * made + idle


def pairs_expected(case: Case, rank: int) -> int:
    """Queries times the keys that they see, in one layer of phase 1."""
    own, a = blocks_of(case, rank), case.anchor
    seen = sum(triangle(size) + a * size * (number > 0) for number, size in own)
    computed = tokens_expected(case, rank) - sum(size for _, size in own)
    return seen + (computed // a if a and own else 0) * triangle(a)


COUNTED = [
    Case(58, 12, 7, 3),  # 5 blocks: 2, 2, 1
    Case(58, 12, 12, 2),
    Case(58, 12, 5, 1),
    Case(96, 12, 4, 4),
    Case(25, 9, 9, 4, 4),  # 3 blocks: a rank has nothing
    Case(58, 12, 0, 3),
    Case(30, 30, 10, 3),  # one block
    Case(58, 12, 7, 3, content="shuffled"),
    Case(25, 9, 5, 2, content="random"),
]


class Watch:
    """Counts by rank what simulated ranks do: their threads bear their number."""

    def __init__(self, patch: pytest.MonkeyPatch, world: int):
        self.tokens, self.pairs = [0] * world, [0] * world
        forward, attend = BoundModel.forward, ringstar.passes.localflash.attend

        def counted_forward(model: Any, ids_T: Any, *args: Any, **options: Any) -> Any:
            self.tokens[self._rank()] += len(ids_T)
            return forward(model, ids_T, *args, **options)

        def counted_attend(q: Any, k: Any, v: Any, band: Any, **options: Any) -> Any:
            self.pairs[self._rank()] += seen(q.shape[1], k.shape[1], band)
            return attend(q, k, v, band, **options)

        patch.setattr(BoundModel, "forward", counted_forward)
        patch.setattr(ringstar.passes.localflash, "attend", counted_attend)

    @staticmethod
    def _rank() -> int:
        return int(threading.current_thread().name.removeprefix("rank "))


def seen(queries: int, keys: int, band: Any) -> int:
    """Pairs of a query and a key that a band leaves visible, one by one."""
    if band is None:
        return queries * keys
    assert band.window is None
    rows = [band.q_start + band.q_step * i for i in range(queries)]
    columns = [band.k_start + band.k_step * j for j in range(keys)]
    return sum(column <= row for row in rows for column in columns)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("chunk_tokens", [WHOLE, 5])
@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_what_phase_one_computes_and_sends(case, chunk_tokens, share, monkeypatch):
    case = replace(case, share=share, chunk_tokens=chunk_tokens)
    ours, ranks = runtime(case.family, case.world, chunk_tokens), range(case.world)
    before = counters(ours)
    watch = Watch(monkeypatch, case.world)
    document = ours.encode(case.ids, strategy=case.config)
    assert watch.tokens == [tokens_expected(case, rank) for rank in ranks]
    assert watch.pairs == [LAYERS * pairs_expected(case, rank) for rank in ranks]
    sent, calls = since(before, counters(ours))
    readers = any(blocks_of(case, rank) for rank in ranks[1:])
    copies = case.world - 1 if share == "world" and readers else 0
    anchor = 2 * case.anchor * KV_HEADS * HEAD_DIM * ITEM  # k and v of one layer
    assert sent == document.metrics.bytes_sent == [LAYERS * anchor * copies] + [0] * len(ranks[1:])
    broadcasts = {"broadcast": LAYERS} if copies and case.anchor else {}
    assert calls == [broadcasts] * case.world


def test_the_counted_formulas_by_hand():
    """Three ranks hold blocks 0-1, 2-3 and 4 of 12, 12, 12, 12, 10 tokens; anchors of 7."""
    case = Case(58, 12, 7, 3)
    shared = [replace(case, share=share) for share in SHARES]
    tokens = [[tokens_expected(one, rank) for rank in range(3)] for one in shared]
    assert tokens == [[24, 24, 10], [24, 31, 17], [31, 38, 17]]
    pairs = [[pairs_expected(one, rank) for rank in range(3)] for one in shared]
    behind = 78 + 7 * 12  # a block of 12 behind an anchor
    assert pairs[0] == [78 + behind, 2 * behind, 55 + 70]
    assert pairs[1] == [78 + behind, 2 * behind + 28, 55 + 70 + 28]
    assert pairs[2] == [78 + behind + 28, 2 * (behind + 28), 55 + 70 + 28]
    ablated = replace(case, content="shuffled", share="world")
    assert [tokens_expected(ablated, rank) for rank in range(3)] == [31, 24, 10]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("share", SHARES)
def test_phase_two_gathers_once_for_each_layer_and_step(share, world):
    case, ours = Case(50, 9, 4, world, 6, share), runtime("llama", world)
    document = ours.encode(case.ids, strategy=case.config)
    for steps in (1, 2, 7):  # the question's step and those of generated tokens
        before = counters(ours)
        ours.ask(document, case.question_ids, max_new_tokens=steps)
        _, calls = since(before, counters(ours))
        wanted = {"all_gather": LAYERS * steps, "broadcast": steps} if world > 1 else {}
        assert calls == [wanted] * world
    before = counters(ours)
    ours.logits(document, case.question_ids, 3)
    _, calls = since(before, counters(ours))
    assert calls == [{"all_gather": LAYERS} if world > 1 else {}] * world


Counts = list[tuple[int, Counter]]


def counters(ours: LongContext) -> Counts:
    held = [transport.counters for transport in ours.ranks.transports]
    return [(counters.bytes_sent, Counter(counters.calls)) for counters in held]


def since(before: Counts, after: Counts) -> tuple[list[int], list[dict[str, int]]]:
    """Bytes sent and calls made by each rank between two readings."""
    both = list(zip(before, after, strict=True))
    return [b[0] - a[0] for a, b in both], [dict(b[1] - a[1]) for a, b in both]
