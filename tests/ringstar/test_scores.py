"""python -m pytest tests/ringstar/test_scores.py

Log-probabilities of continuations and of whole texts, against one device's eager Hugging Face
model on the same ids.
"""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from ringstar import LongContext, Score, UserError, scores
from ringstar.config import Config, ModelConfig, StarConfig
from seqpar.process import ProcessWorld
from tests.support.chat import LINES, chat_folder
from tests.support.models import (
    DYNAMIC,
    FAMILIES,
    LONGROPE,
    OTHERS,
    eager,
    fresh,
    random_ids,
    tiny_folder,
)
from tests.support.ranks import in_processes
from tests.support.star_oracle import Anchored, anchored, first_anchor, kept_kv, star

BOUND = 1e-5
LAYOUTS = ("zigzag", "striped", "contiguous")


def runtime(folder: str, world: int, layout: str = "zigzag", chunk_tokens: int = 8192, **more):
    return LongContext.from_pretrained(
        folder,
        transport="threads",
        world_size=world,
        layout=layout,
        chunk_tokens=chunk_tokens,
        threads_per_rank=1,
        **more,
    )


@torch.inference_mode()
def wanted(folder: str, ids: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `ids[start:]` on one device, and which were its first choice."""
    logits = fresh(folder)(torch.tensor([ids[:-1]])).logits[0, start - 1 :].double()
    target = torch.tensor(ids[start:])
    return logits.log_softmax(-1)[range(len(target)), target], logits.argmax(-1) == target


def check(score: Score, folder: str, ids: list[int], start: int) -> None:
    """Of `ids[start:]`."""
    logprobs, greedy = wanted(folder, ids, start)
    assert score.ids == ids[start:]
    assert score.logprobs.dtype == torch.float32 and score.greedy.dtype == torch.bool
    assert (score.logprobs - logprobs).abs().max() <= BOUND * logprobs.abs().max()
    assert score.greedy.equal(greedy)
    assert score.logprob == pytest.approx(float(logprobs.sum()), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(-float(logprobs.mean())), rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_texts_are_scored_as_on_one_device(world, layout):
    """Several together, in chunks that hold parts of some; from the second token on, or later."""
    folder, few = tiny_folder("qwen3"), 4
    ring = runtime(folder, world, layout, chunk_tokens=few)
    texts = [random_ids(tokens) for tokens in (61, 2, world + 1, few * world)]
    for text, score in zip(texts, ring.score_texts(texts), strict=True):
        check(score, folder, text, 1)
    starts = [17, 1, world, 3]
    found = ring.score_texts(texts, starts=starts)
    for text, start, score in zip(texts, starts, found, strict=True):
        check(score, folder, text, start)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_family_scores_as_on_one_device(family):
    """Softcaps and scales of logits are the model's own."""
    folder, ids, more = tiny_folder(family), random_ids(40), random_ids(6, seed=1)
    ring = runtime(folder, 2, chunk_tokens=9)
    check(ring.score_text(ids), folder, ids, 1)
    for each in ([more[0]], more):
        (score,) = ring.score(ids, [each])
        check(score, folder, ids + each, len(ids))
        (score,) = ring.score(ring.encode(ids), [each], after=[5, 6])
        check(score, folder, [*ids, 5, 6, *each], len(ids) + 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_continuations_follow_an_encoded_document(world, layout):
    """Its last token is read again, and kept once: the document is what it was."""
    folder = tiny_folder("llama")
    ring = runtime(folder, world, layout)
    for tokens in (1, 2, world, 47):
        ids = random_ids(tokens)
        document = ring.encode(ids)
        before = ring.logits(document, [3])
        continuations = [random_ids(count, seed=9) for count in (1, 2, 30)]
        found = ring.score(document, continuations)
        for more, score in zip(continuations, found, strict=True):
            check(score, folder, ids + more, tokens)
        assert ring.logits(document, [3]).equal(before)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(1, 4))
def test_where_a_text_is_cut_changes_nothing(tokens, more, after, slices):
    """Document, what is after it, continuation: the same text, whoever reads which part."""
    folder, ids = tiny_folder("qwen3"), random_ids(tokens + after + more)
    ring = _ring_of_two()
    document, between, rest = ids[:tokens], ids[tokens : tokens + after], ids[tokens + after :]
    kept = scores._LOGITS_BYTES
    scores._LOGITS_BYTES = slices * 4 * ring.files.vocab_size  # so many rows at once
    try:
        for given_as in (document, ring.encode(document)):
            (score,) = ring.score(given_as, [rest], after=between)
            check(score, folder, ids, tokens + after)
        check(ring.score_texts([ids], starts=[tokens])[0], folder, ids, tokens)
    finally:
        scores._LOGITS_BYTES = kept


@functools.cache
def _ring_of_two() -> LongContext:
    return runtime(tiny_folder("qwen3"), 2, chunk_tokens=7)


@pytest.mark.parametrize("share", ["world", "rank", "none"])
@pytest.mark.parametrize(("world", "block", "anchor"), [(2, 20, 20), (5, 20, 6), (3, 16, 0)])
def test_star_scores_what_its_blocks_see(world, block, anchor, share):
    """Of each token what the block of the token before it gives it; anchors are not counted."""
    folder, ids = tiny_folder("llama"), random_ids(61)
    config = StarConfig(block_size=block, anchor_size=anchor, share_anchor=share)
    ours = runtime(folder, world, strategy=config, chunk_tokens=7)
    logits_TV = torch.cat(
        [_own_logits(folder, ids, one) for one in _blocks(ids[:-1], block, anchor)]
    ).double()
    logprobs = logits_TV.log_softmax(-1)[range(60), ids[1:]]
    score = ours.score_text(ids)
    assert (score.logprobs - logprobs).abs().max() <= BOUND * logprobs.abs().max()
    assert (score.greedy == (logits_TV.argmax(-1) == torch.tensor(ids[1:]))).all()
    exact, _ = wanted(folder, ids, 1)
    assert (score.logprobs[:block] - exact[:block]).abs().max() < 1e-4
    assert (score.logprobs - exact).abs().max() > 0.1


@pytest.mark.parametrize("world", [1, 3])
def test_a_continuation_sees_all_that_star_kept(world):
    folder, ids, more = tiny_folder("llama"), random_ids(50), random_ids(5, seed=3)
    ours = runtime(folder, world, strategy=StarConfig(block_size=16, anchor_size=8))
    blocks, document = _blocks(ids, 16, 8), ours.encode(ids)
    (score,) = ours.score(document, [more], after=[7, 8])
    want = star(folder, ids, [7, 8, *more[:-1]], blocks, 0).logits_QV[1:]
    _near(score, want, more)
    (score,) = ours.score(document, [more])
    _near(score, _read_again(folder, ids, more, blocks), more)


def _near(score: Score, logits_TV: torch.Tensor, ids: list[int]) -> None:
    logprobs = logits_TV.double().log_softmax(-1)[range(len(ids)), ids]
    assert (score.logprobs - logprobs).abs().max() <= BOUND * logprobs.abs().max()


def _blocks(ids: list[int], block: int, anchor: int) -> tuple[Anchored, ...]:
    return anchored(len(ids), block, first_anchor(ids, anchor))


@torch.inference_mode()
def _own_logits(folder: str, ids: list[int], block: Anchored) -> torch.Tensor:
    """Of a block's own tokens, in one forward behind its anchor."""
    tokens = [*block.anchor_ids, *ids[block.start : block.stop]]
    at = [*block.anchor_positions, *range(block.start, block.stop)]
    mask = torch.zeros(len(at), len(at)).masked_fill(
        ~torch.ones(len(at), len(at), dtype=torch.bool).tril(), torch.finfo(torch.float32).min
    )
    out = eager(folder)(
        torch.tensor([tokens]), attention_mask=mask[None, None], position_ids=torch.tensor([at])
    )
    return out.logits[0, len(block.anchor_ids) :]


@torch.inference_mode()
def _read_again(
    folder: str, ids: list[int], more: list[int], blocks: tuple[Anchored, ...]
) -> torch.Tensor:
    """The document's last token a second time, and what follows; its KV is the first time's."""
    cache, read = DynamicCache(), [ids[-1], *more[:-1]]
    for layer, (k, v) in enumerate(kept_kv(folder, tuple(ids), blocks, torch.float32)):
        cache.update(k.clone(), v.clone(), layer)
    visible = torch.ones(len(read), len(ids) + len(read), dtype=torch.bool).tril(len(ids))
    visible[:, len(ids)] = False
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    positions = torch.arange(len(ids) - 1, len(ids) - 1 + len(read))[None]
    return eager(folder)(
        torch.tensor([read]),
        attention_mask=mask[None, None],
        position_ids=positions,
        past_key_values=cache,
    ).logits[0]


def _in_a_process(transport, folder, ids, more):
    config = Config(model=ModelConfig(path=folder))
    ours = LongContext.from_config(config, ProcessWorld(transport))
    found = [ours.score_text(ids), *ours.score(ours.encode(ids), [more])]
    return [(score.logprobs.tolist(), score.greedy.tolist()) for score in found]


def test_every_process_has_every_score():
    folder, ids, more = tiny_folder("qwen2"), random_ids(30), random_ids(3, seed=1)
    first, *others = in_processes(3, _in_a_process, folder, ids, more)
    assert all(other == first for other in others)
    (text, _), (continuation, _) = first
    for got, (all_ids, start) in ((text, (ids, 1)), (continuation, (ids + more, 30))):
        want, _ = wanted(folder, all_ids, start)
        assert (torch.tensor(got) - want).abs().max() < 1e-4


def test_texts_have_nothing_of_a_chat_around_them():
    ours = runtime(chat_folder(), 2)
    tokenizer, text, more = ours.files.tokenizer, LINES[0], " She was the Aurora."
    ids = tokenizer.encode(text)
    assert ours.score_text(text).ids == ids[1:]
    one, other, space = ours.score(text, [more, tokenizer.encode(more), "\n"])
    assert one.ids == other.ids and one.logprob == other.logprob
    check(one, chat_folder(), ids + one.ids, len(ids))
    check(space, chat_folder(), ids + space.ids, len(ids))
    question = ours.files.query_ids("Who left?")
    document = ours.encode(text)
    answer = ours.ask(document, question, max_new_tokens=4)
    (score,) = ours.score(document, [answer.ids], after=question)
    assert score.is_greedy and score.greedy.tolist() == [True] * len(answer.ids)


def test_what_cannot_be_scored_is_refused():
    ours = runtime(tiny_folder("llama"), 2)
    document, limit = ours.encode([1, 2, 3]), ours.files.max_positions
    assert ours.score(document, []) == [] and ours.score_texts([]) == []
    assert len(ours.score_text([1] * (limit + 1)).ids) == limit  # the last is not read
    with pytest.raises(UserError, match="the model's limit is"):
        ours.score_text([1] * (limit + 2))
    with pytest.raises(UserError, match="continuations=ab: needed is a list"):
        ours.score(document, "ab")
    with pytest.raises(UserError, match="continuation: is empty"):
        ours.score(document, [[1], []])
    with pytest.raises(UserError, match="token ids must be from 0"):
        ours.score(document, [[1]], after=[10**6])
    with pytest.raises(UserError, match="positions, but the model's limit is"):
        ours.score(document, [[1] * (limit - 1)])
    ours.score(document, [[1] * (limit - 2)])  # the last of them is not read
    for text, start in (([1], 1), ([1, 2], 2), ([1, 2], 0)):
        with pytest.raises(UserError, match="text=from token"):
            ours.score_texts([text], starts=[start])


def test_a_window_has_forgotten_what_the_last_token_saw():
    folder, ids = tiny_folder("mistral", sliding_window=8), random_ids(30)
    ours = runtime(folder, 2)
    with pytest.raises(UserError, match="window of 8 have forgotten"):
        ours.score(ours.encode(ids), [[1, 2]])
    for found in (
        ours.score(ids, [[1, 2]]),
        ours.score(ours.encode(ids[:-1]), [[1, 2]], after=ids[-1:]),
    ):
        check(found[0], folder, [*ids, 1, 2], 30)
    (score,) = ours.score(ours.encode(ids[:7]), [[1, 2]])  # nothing is hidden yet
    check(score, folder, [*ids[:7], 1, 2], 7)


def test_rope_by_length_is_that_of_the_text_that_is_read():
    folder, ids = tiny_folder("llama", **DYNAMIC), random_ids(90)
    ours = runtime(folder, 2, allow_beyond_limit=True)
    check(ours.score_text(ids), folder, ids, 1)
    (score,) = ours.score(ids[:80], [ids[80:]])
    logits = fresh(folder)(torch.tensor([ids[:-1]])).logits[0, 79:]
    _near(score, logits, ids[80:])
    with pytest.raises(UserError, match="depends on the length of the text"):
        ours.score(ours.encode(ids[:80]), [ids[80:]])


def test_continuations_that_rope_keeps_apart_are_refused_before_the_encode(monkeypatch):
    folder, ids = tiny_folder("phi3", **LONGROPE), random_ids(76)
    ours = runtime(folder, 2, allow_beyond_limit=True)
    ours.score(ids, [ids[:6], ids[:9]])
    monkeypatch.setattr(ours, "encode", None)
    with pytest.raises(UserError, match="would be encoded for 79 tokens and for 84"):
        ours.score(ids, [ids[:9], ids[:4]])


def test_what_is_no_number_is_a_fault():
    rows = torch.tensor([[-1.0, torch.nan], [1, 0]])
    with pytest.raises(RuntimeError, match="logits that are not finite"):
        scores.score_of([1, 2], rows)


def test_curves_cut_a_score_into_pieces():
    score = Score([1, 2, 3, 4, 5], torch.tensor([-1.0, -1, -2, -2, -3]), torch.ones(5).bool())
    assert score.perplexities(2) == [
        (3, pytest.approx(math.exp(4 / 3))),
        (5, pytest.approx(math.exp(2.5))),
    ]
    assert [end for end, _ in score.perplexities(9)] == [1, 2, 3, 4, 5]
    assert score.perplexity == pytest.approx(math.exp(9 / 5))
    hopeless = Score([1], torch.tensor([-1e4]), torch.zeros(1).bool())
    assert hopeless.perplexity == math.inf and not hopeless.is_greedy
