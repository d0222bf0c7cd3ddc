"""What users give, checked before anything is computed: token ids, lengths, kernels."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch

import localflash
from ringstar.config import Config, StarConfig, StrategyConfig, check, token_size
from ringstar.errors import UserError
from ringstar.models import ModelFacts, ModelFiles, attention_heads, choose_dtype
from ringstar.ranks import check_strategy
from ringstar.strategies import check_document

Text = str | Sequence[int]


def token_ids(
    key: str, given: Text, tokenize: Callable[[str], list[int]], vocab_size: int
) -> list[int]:
    """Token ids of what a user gave as text or as ids; raises UserError."""
    if isinstance(given, str):
        ids = tokenize(given) if given.strip() else []
    elif isinstance(given, bytes):
        raise UserError(key, None, "bytes are no text: decode them first")
    else:
        try:
            ids = [operator.index(token) for token in given]
        except TypeError as error:
            raise UserError(key, None, f"token ids must be integers ({error})") from error
    check_ids(key, ids, vocab_size)
    return ids


def check_texts(key: str, given: Sequence[Text]) -> None:
    """Raise UserError for one text in place of several: each letter would be one."""
    if isinstance(given, str | bytes):
        raise UserError(key, None, "is one text, and a list of them is needed")


def check_ids(key: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise UserError unless there are ids and all are in the vocabulary."""
    if not ids:
        raise UserError(key, None, "is empty; at least one token is needed")
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise UserError(key, outside, f"token ids must be from 0 to {vocab_size - 1}")


def check_any_length(strategy: StrategyConfig) -> None:
    """Raise UserError for sizes of star that fit only texts of some length."""
    if not isinstance(strategy, StarConfig) or strategy.block_size is not None:
        return
    if strategy.anchor_size is not None and token_size(strategy.anchor_size):
        why = "blocks are as long as a text allows, and texts may be short; give block_size too"
        raise UserError("strategy.anchor_size", strategy.anchor_size, why)


def check_fits(
    config: Config, files: ModelFiles, world_size: int, context: int, query: int = 0, new: int = 0
) -> None:
    """Raise UserError for token counts that this model, strategy or ranks cannot take."""
    check(config)
    check_strategy(config, world_size)
    check_document(config.strategy, context, world_size, files.vocab_size)
    check_positions(config.strategy, files, context + query + new)
    _check_rope_jump(files, context + query, new if query else 0)
    total, limit = context + query + new, files.max_positions
    if total > limit and not config.model.allow_beyond_limit:
        parts = f"{context} tokens" + (f" + question {query} + answer {new}" if query else "")
        raise UserError(
            "document",
            parts,
            f"{total} positions, but the model's limit is {limit};"
            " model.allow_beyond_limit=true overrides",
        )


def _check_rope_jump(files: ModelFiles, read: int, new: int) -> None:
    """Past that length everything before it would have to be encoded again."""
    after = files.rope_jumps_after
    if after is not None and read <= after < read + new - 1:
        raise UserError(
            "generation.max_new_tokens",
            new,
            f"after {read} positions the answer would cross {after}, where this model's rotary"
            f" embedding (longrope) changes; allowed: up to {after - read + 1}",
        )


def check_positions(strategy: StrategyConfig, files: ModelFacts, positions: int) -> None:
    """Star Attention is wrong where a layer's sliding window hides positions: a UserError."""
    window = files.window
    if isinstance(strategy, StarConfig) and window is not None and window < positions:
        raise UserError(
            "strategy",
            "star",
            f"the model's sliding window of {window} tokens hides part of {positions:,} positions"
            " and the anchor with them; use strategy=ring",
        )


def choose_kernel(config: Config, files: ModelFacts, device: torch.device) -> localflash.Choice:
    """The local attention for this model on `device`; raises UserError if it cannot run there."""
    dtype, _ = choose_dtype(config.model, files.config, device)
    name = config.kernel.name
    try:
        choice = localflash.choose(
            name,
            device=device,
            dtype=dtype,
            head_dim=attention_heads(files.config)[2],
            softcap=getattr(files.config, "attn_logit_softcapping", None),
        )
    except ValueError as error:
        raise UserError("kernel", name, str(error).removeprefix(f"kernel={name}: ")) from error
    if config.kernel.unified_max and choice.backend.attend_unified is None:
        has = ", ".join(n for n, backend in localflash.BACKENDS.items() if backend.attend_unified)
        lacks = f"kernel {choice.backend.name} has none; allowed with kernel={has}"
        raise UserError("kernel.unified_max", "true", lacks)
    if config.kernel.unified_max and dtype == torch.float16:
        raise UserError("kernel.unified_max", "true", localflash.UNIFIED_IN_FLOAT16)
    return choice
