"""What Star Attention must answer, on one device, from plain Hugging Face forwards.

Each block is one forward over `[anchor ; block]`, of which only the block's KV is kept; the
question is one dense causal forward over all kept KV.  Visibility is an explicit mask in every
forward: Hugging Face takes positions that jump for packed sequences if it is given none.  It is
also given no windows: the oracle is for texts that no window hides a part of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from tests.support.models import fresh


@dataclass(frozen=True)
class Anchored:
    """One block of the document, and what it is computed behind."""

    start: int
    stop: int
    anchor_ids: tuple[int, ...] = ()
    anchor_positions: tuple[int, ...] = ()


@dataclass(frozen=True)
class StarAnswer:
    """`logits_QV`: at each question position; the last row gives the first new token."""

    logits_QV: Tensor
    ids: list[int]

    @property
    def first_V(self) -> Tensor:
        return self.logits_QV[-1]


Anchor = Callable[[int], tuple[Sequence[int], Sequence[int]]]


def block_edges(tokens: int, block: int) -> list[tuple[int, int]]:
    """Blocks of `block` tokens from 0; the last takes what is left."""
    return [(start, min(tokens, start + block)) for start in range(0, tokens, block)]


def anchored(tokens: int, block: int, anchor: Anchor) -> tuple[Anchored, ...]:
    """Block 0 has no anchor; `anchor(i)` gives the ids and positions of block i's."""
    blocks = []
    for index, (start, stop) in enumerate(block_edges(tokens, block)):
        ids, at = anchor(index) if index else ((), ())
        blocks.append(Anchored(start, stop, tuple(ids), tuple(at)))
    return tuple(blocks)


def first_anchor(ids: Sequence[int], anchor: int) -> Anchor:
    """The document's first `anchor` tokens, where they stand."""
    return lambda index: (ids[:anchor], range(anchor))


def star(
    folder: str,
    ids: Sequence[int],
    question: Sequence[int],
    blocks: tuple[Anchored, ...],
    new_tokens: int,
    dtype: torch.dtype = torch.float32,
    *,
    rope_by_length: bool = False,
) -> StarAnswer:
    """Logits at the question's positions and `new_tokens` greedy tokens.

    `rope_by_length`: the model's frequencies depend on how long the text is, and every forward
    has those of the whole text up to its own last token; blocks those of document and question.
    """
    return _star(folder, tuple(ids), tuple(question), blocks, new_tokens, dtype, rope_by_length)


@functools.cache
@torch.inference_mode()
def _star(
    folder: str,
    ids: tuple[int, ...],
    question: tuple[int, ...],
    blocks: tuple[Anchored, ...],
    new_tokens: int,
    dtype: torch.dtype,
    rope_by_length: bool,
) -> StarAnswer:
    cache, read = DynamicCache(), len(ids) + len(question)
    length = read if rope_by_length else None
    for layer, (k, v) in enumerate(kept_kv(folder, ids, blocks, dtype, length)):
        cache.update(k.clone(), v.clone(), layer)
    logits_QV = _forward(folder, dtype, question, range(len(ids), read), cache, length)
    new, last_V = [], logits_QV[-1]
    for step in range(new_tokens):
        new.append(int(last_V.argmax()))
        position = read + step
        length = position + 1 if rope_by_length else None
        last_V = _forward(folder, dtype, (new[-1],), (position,), cache, length)[-1]
    return StarAnswer(logits_QV, new)


@functools.cache
@torch.inference_mode()
def kept_kv(
    folder: str,
    ids: tuple[int, ...],
    blocks: tuple[Anchored, ...],
    dtype: torch.dtype,
    length: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """(k, v) of each layer, (1, Hkv, tokens, D): of the blocks alone, in order."""
    caches = [_block_cache(folder, ids, block, dtype, length) for block in blocks]
    own = [block.stop - block.start for block in blocks]

    def joined(layer: int, kind: str) -> Tensor:
        held = [getattr(cache.layers[layer], kind) for cache in caches]
        return torch.cat([kv[:, :, -n:] for kv, n in zip(held, own, strict=True)], dim=2)

    layers = range(len(caches[0].layers))
    return [(joined(layer, "keys"), joined(layer, "values")) for layer in layers]


def _block_cache(
    folder: str,
    ids: tuple[int, ...],
    block: Anchored,
    dtype: torch.dtype,
    length: int | None,
) -> DynamicCache:
    cache = DynamicCache()
    tokens = (*block.anchor_ids, *ids[block.start : block.stop])
    positions = (*block.anchor_positions, *range(block.start, block.stop))
    _forward(folder, dtype, tokens, positions, cache, length)
    return cache


def _forward(
    folder: str,
    dtype: torch.dtype,
    tokens: Sequence[int],
    positions: Sequence[int],
    cache: DynamicCache,
    length: int | None = None,
) -> Tensor:
    """Logits (tokens, vocab); every token sees all of `cache`, itself and those before it.

    With `length`, Hugging Face's frequencies are those of a text of so many positions.  It takes
    them from the largest position in a forward, so one more token is there, at the last
    position; it comes last, so that nothing sees it, and is forgotten.
    """
    own, held = len(tokens), cache.get_seq_length()
    if length is not None:
        tokens, positions = (*tokens, 0), (*positions, length - 1)
    visible = torch.ones(len(tokens), held + len(tokens), dtype=torch.bool).tril(held)
    logits_TV = fresh(folder, dtype)(
        torch.tensor([tokens]),
        attention_mask=_additive(visible, dtype),
        position_ids=torch.tensor([list(positions)]),
        past_key_values=cache,
        use_cache=True,
    ).logits[0]
    if len(tokens) > own:
        cache.crop(own - len(tokens))  # so many back
    return logits_TV[:own]


def _additive(visible_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, 1, T, K): 0 where a key is seen, the dtype's least number elsewhere."""
    mask = torch.zeros(visible_TK.shape, dtype=dtype)
    return mask.masked_fill(~visible_TK, torch.finfo(dtype).min)[None, None]


@torch.inference_mode()
def star_in_one_forward(
    folder: str,
    ids: Sequence[int],
    question: Sequence[int],
    blocks: tuple[Anchored, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The same logits (question, vocab), the slow way.

    No cache: one row holds every anchor, every block and the question, and a mask says who sees
    whom.  Rope that depends on the length sees that of the whole text by itself.
    """
    rows: list[tuple[Sequence[int], Sequence[int], int, bool]] = []
    for number, block in enumerate(blocks):
        own = range(block.start, block.stop)
        rows.append((block.anchor_ids, block.anchor_positions, number, True))
        rows.append((ids[block.start : block.stop], own, number, False))
    after = range(len(ids), len(ids) + len(question))
    rows.append((question, after, len(blocks), False))
    owners = torch.tensor([owner for tokens, _, owner, _ in rows for _ in tokens])
    dropped = torch.tensor([is_anchor for tokens, _, _, is_anchor in rows for _ in tokens])
    asks = owners[:, None] == len(blocks)
    visible = ((owners[:, None] == owners) | (asks & ~dropped)).tril()
    logits_TV = fresh(folder, dtype)(
        torch.tensor([[token for tokens, *_ in rows for token in tokens]]),
        attention_mask=_additive(visible, dtype),
        position_ids=torch.tensor([[position for _, at, *_ in rows for position in at]]),
        use_cache=False,
    ).logits[0]
    return logits_TV[-len(question) :]
