"""Hugging Face's `generate` over ranks: what of it works, and what is refused by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from ringstar.errors import UserError
from ringstar.models.past import ShardedPast

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_ONE_STREAM = "greedy search and sampling keep one text for each prompt; allowed: these two"
# arguments of `generate` that would have a second model, or a loop of their own
_ARGUMENTS = {
    "assistant_model": "assisted decoding takes tokens back from the KV; allowed: none",
    "custom_generate": "a loop of its own may take tokens back; allowed: none",
    "inputs_embeds": "ranks deal token ids; allowed: input_ids",
    "negative_prompt_ids": "guidance reads every text twice; allowed: none",
}
# what stopping criteria were made from; transformers hands it on, and no model reads it
_FOR_STOPPING = ("tokenizer", "assistant_tokenizer")
# settings of a GenerationConfig and the values that they may have
_SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    # the last is what transformers itself takes for none
    "cache_implementation": (
        (None, "dynamic", "hybrid"),
        "KV is sharded; allowed: none",
    ),
    "guidance_scale": ((None, 1, 1.0), "guidance reads every text twice; allowed: none"),
    "output_attentions": ((None, False), "weights of attention are never made; allowed: false"),
    "output_hidden_states": (
        (None, False),
        "each rank has some tokens' only; allowed: false",
    ),
    "prefill_chunk_size": ((None,), "allowed: none; chunk_tokens of attach cuts a prompt"),
}


def check_generation(
    model: Any,
    generate: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    *,
    clocks: int,
    check_length: Callable[[int], None],
) -> dict[str, Any]:
    """Raise UserError for a call of `generate` that cannot be what one device returns.

    `clocks` is how many processes decide when to stop; `check_length` is asked about the tokens
    that will be read at most.  Returns the keywords to call it with.
    """
    bound = inspect.signature(generate).bind(*args, **kwargs).arguments
    given = {**bound.pop("kwargs", {}), **bound}
    for name, why in _ARGUMENTS.items():
        if given.get(name) is not None:
            raise UserError(name, type(given[name]).__name__, why)
    settings = _settings(model, given)
    mode = settings.get_generation_mode(given.get("assistant_model"))
    if mode not in _MODES:
        raise UserError("generate", mode.value, _ONE_STREAM)
    for name, (allowed, why) in _SETTINGS.items():
        if getattr(settings, name, None) not in allowed:
            raise UserError(name, getattr(settings, name), why)
    if settings.max_time is not None and clocks > 1:
        why = "the clocks of ranks differ, so that one would stop before another; allowed: none"
        raise UserError("max_time", settings.max_time, why)
    prompt = given.get("inputs", given.get("input_ids"))
    if isinstance(prompt, Tensor):
        new = settings.max_new_tokens
        whole = settings.max_length if new is None else prompt.shape[-1] + new
        check_length((whole or 1) - 1)
    kwargs = {**kwargs, "cache_implementation": None}
    if given.get("past_key_values") is not None:
        if settings.use_cache is False:
            raise UserError("use_cache", False, "past_key_values were given; allowed: one of them")
        return kwargs
    return kwargs if settings.use_cache is False else {**kwargs, "past_key_values": ShardedPast()}


def _settings(model: Any, given: dict[str, Any]) -> Any:
    """The GenerationConfig that a call will have, by transformers' own order.

    First what is given by keyword, then a config that is given, then the model's.
    """
    merged = copy.deepcopy(given.get("generation_config")) or GenerationConfig()
    for name, value in model.generation_config.to_dict().items():
        if getattr(merged, name, None) is None:
            setattr(merged, name, value)
    merged.update(**{key: given[key] for key in given if key != "generation_config"})
    return merged


def check_call(arguments: dict[str, Any]) -> None:
    """Raise UserError for what a forward pass over ranks has no answer to."""
    for name, value in arguments.items():
        if value is None or (value is False and name != "is_causal") or name in _FOR_STOPPING:
            continue
        if name == "is_causal" and value is True:
            continue
        why = _ARGUMENTS.get(name) or "a model that is spread over ranks does not take it"
        raise UserError(name, type(value).__name__, why)


def sharded_past(past: Any, owner: str, world: int) -> ShardedPast:
    """The past that a call brings, or a new one; UserError for one of another attached model.

    `owner` tells these apart; this one has `world` ranks.
    """
    if past is None:
        past = ShardedPast()
    if not isinstance(past, ShardedPast):
        why = (
            "does not hold what ranks have; leave it out, or pass ringstar.ShardedPast(), or the"
            " past_key_values that the model returned"
        )
        raise UserError("past_key_values", type(past).__name__, why)
    if not past.whole:
        why = "a call that extended it was interrupted; reset() empties it"
        raise UserError("past_key_values", "unfinished", why)
    if past.shards and past.owner != owner:
        made_by = max(len(shard.owned) for shards in past.shards.values() for shard in shards)
        why = f"was made by another attached model, of {made_by} ranks (this one has {world})"
        raise UserError("past_key_values", "of others", why)
    past.owner = owner
    return past


def new_tokens(
    input_ids: Any,
    mask: Any,
    positions: Any,
    past: ShardedPast,
    seen: Sequence[int],
    window: int | None,
    by_length: bool,
) -> list[list[int]]:
    """The new tokens of each text, without those that the mask hides.

    `seen` are the tokens that each text has in `past`, `window` is that of some layer, and
    `by_length` says whether rope depends on how long a text is.  Raises UserError for ids, a mask
    or positions that do not say which texts there are, or hide a text's last token.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        raise UserError("input_ids", None, "allowed: token ids (batch, tokens), at least one each")
    batch, tokens = input_ids.shape
    if seen and len(seen) != batch:
        raise UserError("input_ids", f"{batch} texts", f"past_key_values hold {len(seen)}")
    starts = list(seen) or [0] * batch
    real_BT = _real(mask, batch, tokens, past.columns, starts)
    if not _padded_in_front(mask):
        _check_gaps(positions, window)
    if by_length and positions is None and not real_BT.all():
        why = "needed with padding: this model's rope depends on the length of each text"
        raise UserError("position_ids", None, why)
    _check_positions(positions, real_BT, starts)
    return [row[real].tolist() for row, real in zip(input_ids.cpu(), real_BT, strict=True)]


def _real(mask: Any, batch: int, tokens: int, columns: int, starts: list[int]) -> Tensor:
    """Which of the new columns are tokens, as bool (batch, tokens); the others are padding."""
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device="cpu")
    if not isinstance(mask, Tensor) or mask.shape != (batch, columns + tokens):
        shape = tuple(getattr(mask, "shape", ()))
        why = f"allowed: (batch, tokens) = ({batch}, {columns + tokens}), of 0 and 1"
        raise UserError("attention_mask", shape, why)
    seen = mask.ne(0).cpu()
    if not seen[:, -1].all():
        raise UserError("attention_mask", "hides last tokens", "allowed: padding on the left")
    if columns and seen[:, :columns].sum(1).tolist() != starts:
        raise UserError("attention_mask", "hides past tokens", "allowed: the past as it was read")
    return seen[:, columns:]


def _padded_in_front(mask: Any) -> bool:
    """Whether each text is one piece, the tokens of its past among it."""
    return mask is None or bool((mask.ne(0).long().diff(dim=1) >= 0).all())


def _check_gaps(positions: Any, window: int | None) -> None:
    """Padding between tokens, which transformers counts for a window and for default positions."""
    if window is not None:
        why = "a sliding window counts it; allowed: padding in front of whole texts"
        raise UserError("attention_mask", "padding between tokens", why)
    if positions is None:
        raise UserError("position_ids", None, "needed where padding stands between tokens")


def _check_positions(positions: Any, real_BT: Tensor, starts: list[int]) -> None:
    """Positions must be those that tokens have in their own text."""
    if positions is None:
        return
    asked = torch.as_tensor(positions).cpu()
    if asked.ndim > 2 or asked.shape[-1] != real_BT.shape[1]:
        raise UserError("position_ids", tuple(asked.shape), f"allowed: {tuple(real_BT.shape)}")
    asked = asked.expand(real_BT.shape)
    for row, real, start in zip(asked, real_BT, starts, strict=True):
        if row[real].tolist() != list(range(start, start + int(real.sum()))):
            why = "allowed: those of each text's own tokens, counted from 0"
            raise UserError("position_ids", row[real].tolist()[:8], why)


def wanted_logits(keep: Any, new: Sequence[Sequence[int]], columns: int) -> int:
    """How many of each text's last tokens get logits; UserError for too many, or for all."""
    padded = any(len(ids) < columns for ids in new)
    most = 1 if padded else columns
    if columns == 1 and isinstance(keep, int) and keep == 0:
        return 1
    if not isinstance(keep, int) or not 1 <= keep <= most:
        why = (
            f"allowed: {f'1 to {most}' if most > 1 else 1}; all tokens' (0, the default of a bare"
            " call) would have to come from all ranks"
        )
        raise UserError("logits_to_keep", keep, why)
    return keep


def causal_output(logits_BTV: Tensor, past: ShardedPast | None) -> CausalLMOutputWithPast:
    """As a model's own forward returns it."""
    return CausalLMOutputWithPast(logits=logits_BTV, past_key_values=past)
