"""python -m pytest tests/ringstar/test_star_families.py

Star Attention of every family, with the features that make it itself, against the oracle of
test_star_exact.py, within its bound.  Windows are as long as the longest text, the shortest that
star can take; with shorter ones it is refused.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import ringstar.passes
import starattn.encode
from ringstar import LongContext, UserError
from ringstar.config import (
    Config,
    EncodeConfig,
    ModelConfig,
    RingConfig,
    RopeConfig,
    StarConfig,
    TransportConfig,
)
from ringstar.models import TINY
from ringstar.models.rotary import Rotary
from ringstar.passes import ExtendPass, ReplicatedPass
from tests.support.models import (
    DYNAMIC,
    LONGROPE,
    OTHERS,
    random_ids,
    relative_error,
    tiny_folder,
)
from tests.support.runtime import ANEW
from tests.support.star_oracle import (
    Anchored,
    StarAnswer,
    anchored,
    first_anchor,
    star,
    star_in_one_forward,
)

BOUND, GREEDY = 1e-5, 32
SHARES = ("world", "rank", "none")
WHOLE = 8192  # tokens of a chunk that holds any document here
TEXT = 142  # positions of the longest text here: document, question and answer
SHORT = 21  # a window that hides part of it
WIDE = {"sliding_window": TEXT}
SWITCHED = {"use_sliding_window": True, **WIDE}  # for families whose windows are off by default


def wide(family: str) -> dict[str, Any]:
    """The window of a family's small model, if it has one, as long as the text."""
    return WIDE if TINY[family].get("sliding_window") else {}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, wide(family)) for family in OTHERS},
    "mistral": ("mistral", WIDE),
    "mixtral without windows": ("mixtral", {"sliding_window": None}),
    "qwen2": ("qwen2", {**SWITCHED, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**SWITCHED, "max_window_layers": 1}),
    "qwen3_moe with windows": ("qwen3_moe", SWITCHED),
    "smollm3 with windows": ("smollm3", SWITCHED),
    "phi3 longrope": ("phi3", {**LONGROPE, **WIDE}),
    "llama dynamic": ("llama", DYNAMIC),
}
WINDOWED = [name for name, (_, changes) in CASES.items() if changes.get("sliding_window")]
BY_LENGTH = ("phi3 longrope", "llama dynamic")


@dataclass(frozen=True)
class Size:
    """Lengths in tokens, on so many ranks."""

    world: int
    document: int
    question: int
    block: int
    anchor: int
    chunk_tokens: int
    share: str = "world"

    @property
    def ids(self) -> list[int]:
        return random_ids(self.document, seed=1)

    @property
    def question_ids(self) -> list[int]:
        return random_ids(self.question, seed=2)

    @property
    def blocks(self) -> tuple[Anchored, ...]:
        return anchored(self.document, self.block, first_anchor(self.ids, self.anchor))

    @property
    def strategy(self) -> StarConfig:
        return StarConfig(block_size=self.block, anchor_size=self.anchor, share_anchor=self.share)


# with 32 new tokens just as long as the windows; chunks end inside anchors and inside blocks
LONG = (
    Size(2, 101, 9, 17, 17, 11),
    Size(3, 101, 9, 13, 5, WHOLE),
    Size(4, 101, 9, 26, 26, 7),
)
# within 80 positions, where longrope has its other frequencies; of 4 ranks one has nothing
FEW = (Size(2, 47, 3, 10, 4, 11), Size(3, 39, 30, 9, 9, WHOLE), Size(4, 25, 12, 9, 3, 7))


def folder_of(name: str, **changes: Any) -> str:
    family, own = CASES[name]
    return tiny_folder(family, **{**own, **changes})


@functools.cache
def runtime(name: str, world: int, chunk_tokens: int = WHOLE, **changes: Any) -> LongContext:
    config = Config(
        model=ModelConfig(path=folder_of(name, **changes), allow_beyond_limit=name in BY_LENGTH),
        # beyond its limit as within it: the model's own angles, which the oracle has
        rope=RopeConfig(precision="float32"),
        strategy=StarConfig(),
        transport=TransportConfig("threads", world, threads_per_rank=1),
        encode=EncodeConfig(chunk_tokens),
        cache=ANEW,
    )
    return LongContext.from_config(config)


def oracle(
    name: str, size: Size, new_tokens: int = 0, dtype: torch.dtype = torch.float32
) -> StarAnswer:
    given = (folder_of(name), size.ids, size.question_ids, size.blocks)
    return star(*given, new_tokens, dtype, rope_by_length=name in BY_LENGTH)


def error(name: str, size: Size, new_tokens: int = 0) -> float:
    """Of the logits at every position of the question, against float32 and float64.

    Unless 0, so many greedy tokens are held against the oracle's.
    """
    ours, length = runtime(name, size.world, size.chunk_tokens), size.document + size.question
    document = ours.encode(size.ids, strategy=size.strategy, length=length)
    logits_QV = ours.logits(document, size.question_ids, size.question)
    want, exact = oracle(name, size, new_tokens), oracle(name, size, dtype=torch.float64)
    pairs = [(logits_QV, want.logits_QV), (logits_QV, exact.logits_QV)]
    if new_tokens:
        answer = ours.ask(document, size.question_ids, max_new_tokens=new_tokens)
        assert answer.ids == want.ids, size
        pairs.append((answer.first_logits, exact.first_V))
    return max(relative_error(got, wanted) for got, wanted in pairs)


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_is_one_masked_forward(name):
    """And its float32 is within the bound of its float64."""
    size, dtypes = LONG[1], (torch.float32, torch.float64)
    given = (folder_of(name), size.ids, size.question_ids, size.blocks)
    got = [oracle(name, size, dtype=dtype).logits_QV for dtype in dtypes]
    for logits_QV, dtype in zip(got, dtypes, strict=True):
        assert relative_error(logits_QV, star_in_one_forward(*given, dtype)) < 2e-6
    assert relative_error(*got) <= BOUND / 2


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(len(LONG)), ids=lambda turn: f"{LONG[turn].world} ranks")
@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_oracle(name, turn):
    answers, few = ((turn + list(CASES).index(name) + more) % len(SHARES) for more in range(2))
    for number, share in enumerate(SHARES):
        new_tokens = GREEDY if number == answers else 0
        assert error(name, replace(LONG[turn], share=share), new_tokens) <= BOUND, share
    assert error(name, replace(FEW[turn], share=SHARES[few])) <= BOUND, SHARES[few]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", BY_LENGTH)
def test_blocks_have_the_rope_of_the_whole_text(name, share):
    """Of 75 tokens and a question past 80; and what one text did is forgotten by the next."""
    past, within = Size(3, 75, 10, 13, 6, 11, share), Size(3, 60, 7, 7, 7, 11, share)
    for size in (past, within, past):
        assert error(name, size) <= BOUND, size
    if name == "phi3 longrope":
        ours = runtime(name, 3)
        document = ours.encode(past.ids, strategy=past.strategy)
        with pytest.raises(UserError, match=r"encode it with length=85 for this question"):
            ours.ask(document, past.question_ids, max_new_tokens=2)


# -- windows -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_window_that_star_is_judged_by_is_the_layers_own(name, monkeypatch):
    """A family whose windows are overlooked would be wrong instead of refused."""
    asked, attend = set(), ReplicatedPass.attend

    def noted(self, *args, window, **rest):
        asked.add(window)
        return attend(self, *args, window=window, **rest)

    monkeypatch.setattr(ReplicatedPass, "attend", noted)
    ours = runtime(name, 1)
    document = ours.encode(random_ids(5), strategy=RingConfig(), length=7)
    ours.logits(document, random_ids(2))
    assert asked - {None} == {ours.files.window} - {None}
    assert (ours.files.window is not None) == (name in WINDOWED)


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_that_hide_positions_are_refused(name):
    ours = runtime(name, 2, sliding_window=SHORT)
    refusal = rf"strategy=star: the model's sliding window of {SHORT} tokens hides part of"
    with pytest.raises(UserError, match=f"{refusal} 22 positions"):
        ours.encode(random_ids(SHORT + 1))
    document = ours.encode(random_ids(15))
    assert len(ours.ask(document, random_ids(4), max_new_tokens=2).ids) == 2  # 21 positions
    with pytest.raises(UserError, match=f"{refusal} 22 positions"):
        ours.ask(document, random_ids(4), max_new_tokens=3)
    with pytest.raises(UserError, match=f"{refusal} 22 positions"):
        ours.logits(document, random_ids(7))


# -- faults ------------------------------------------------------------------------------

FAULTY = Size(3, 75, 10, 13, 6, WHOLE)  # past 80 with its question alone


def without(kind, **what):
    """One kind of pass computes all layers without what its model asks for."""

    def change(patch):
        right = kind.attend
        patch(kind, "attend", lambda self, *args, **options: right(self, *args, **options | what))

    return change


def sinks_of_block_and_of_anchor(patch):
    """In each of the two partial results, as if each were a softmax of its own."""
    once = ringstar.passes.add_sinks
    twice = lambda out, lse, sinks: once(once(out, lse, sinks), lse, sinks)  # noqa: E731
    patch(ringstar.passes, "add_sinks", twice)


def anchor_without_softcap(patch):
    right = starattn.encode.accumulate_tiles

    def bare(q, kv, given, into, attend):
        anchor = kv.tokens == FAULTY.anchor
        bare = functools.partial(attend, softcap=None) if anchor else attend
        right(q, kv, given, into, bare)

    patch(starattn.encode, "accumulate_tiles", bare)


def half_the_window_in_questions(patch):
    right = ringstar.passes.tiles
    half = lambda new, held, window: right(new, held, window and window // 2)  # noqa: E731
    patch(ringstar.passes, "tiles", half)


def rope_of_the_other_layers(patch):
    right = Rotary.plan

    def swapped(self, *args):
        planned = right(self, *args)
        return dict(zip(planned, reversed(planned.values()), strict=True))

    patch(Rotary, "plan", swapped)


def rope_by_one_ranks_positions(patch):
    right = Rotary.plan

    def local(self, positions_T, like, length):
        return right(self, positions_T, like, int(positions_T.max()) + 1)

    patch(Rotary, "plan", local)


FAULTS = {
    "no sinks in blocks": ("gpt_oss", without(ExtendPass, sinks=None)),
    "no sinks in questions": ("gpt_oss", without(ReplicatedPass, sinks=None)),
    "sinks of block and of anchor": ("gpt_oss", sinks_of_block_and_of_anchor),
    "no softcap in blocks": ("gemma2", without(ExtendPass, softcap=None)),
    "anchor without softcap": ("gemma2", anchor_without_softcap),
    "no softcap in questions": ("gemma2", without(ReplicatedPass, softcap=None)),
    "granite scaled as others": ("granite", without(ExtendPass, scale=0.25)),
    "rope of the other layers": ("gemma3_text", rope_of_the_other_layers),
    "windows in questions": ("olmo3", half_the_window_in_questions),
    "longrope by one rank's positions": ("phi3 longrope", rope_by_one_ranks_positions),
    "dynamic rope by one rank's positions": ("llama dynamic", rope_by_one_ranks_positions),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught(fault, monkeypatch):
    name, break_it = FAULTS[fault]
    assert error(name, FAULTY) <= BOUND
    break_it(monkeypatch.setattr)
    assert error(name, FAULTY) >= 10 * BOUND
