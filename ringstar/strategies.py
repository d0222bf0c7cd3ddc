"""The contract of a strategy, and the factory that makes one by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from localflash import KV, Partial
from ringattn import RingStrategy
from ringstar.config import EncodeConfig, RingConfig, StarConfig, StrategyConfig
from ringstar.errors import UserError
from seqpar import Attend, Part, Runs, Span, Transport, Work
from starattn import Anchor, Blocks, StarStrategy, make_blocks


class Extension(Protocol):
    """Some new tokens of one or more texts, encoded in one forward pass of this rank."""

    @property
    def parts(self) -> Sequence[Part]:
        """What this rank computes of each text, in this order; the same texts on every rank."""
        ...

    @property
    def work(self) -> Work: ...

    def token_ids(self, ids: Sequence[Sequence[int]]) -> list[int]:
        """The tokens at the positions of `parts`; `ids[i]` are those of span i."""
        ...

    def attend(
        self,
        layer: int,
        q_BTHD: Tensor,
        new: KV,
        pasts: Sequence[KV],
        *,
        window: int | None,
        attend: Attend,
    ) -> Partial:
        """One layer's attention for the tokens of this pass; float32, complete over all keys.

        `new` is the KV of those tokens, `pasts` what this rank kept of each text before them.
        """
        ...


class Strategy(Protocol):
    """How new tokens of texts are encoded after what each rank already holds of them."""

    def plan(self, spans: Sequence[Span]) -> tuple[Sequence[tuple[Runs, ...]], Sequence[Extension]]:
        """What each rank keeps of each span, and this rank's passes, one after another."""
        ...


def make_strategy(
    config: StrategyConfig, encode: EncodeConfig, transport: Transport, vocab_size: int
) -> Strategy:
    """One line per strategy."""
    if isinstance(config, RingConfig):
        return RingStrategy(
            transport,
            layout=config.layout,  # type: ignore[arg-type]  # checked by config.check
            chunk_tokens=encode.chunk_tokens,
            past_by=config.past_by,  # type: ignore[arg-type]
        )
    if isinstance(config, StarConfig):
        return StarStrategy(
            transport,
            block_size=config.block_size,
            anchor_size=config.anchor_size,
            share=chosen_share(config)[0],  # type: ignore[arg-type]
            anchor=anchor_of(config),
            chunk_tokens=encode.chunk_tokens,
            vocab_size=vocab_size,
        )
    # dense is a ring of one: nothing travels
    return RingStrategy(transport, layout="contiguous", chunk_tokens=encode.chunk_tokens)


def anchor_of(config: StarConfig) -> Anchor:
    return Anchor(
        config.anchor_content,  # type: ignore[arg-type]  # checked by config.check
        config.anchor_positions,  # type: ignore[arg-type]
        config.anchor_token,
        config.anchor_seed,
    )


def chosen_share(config: StarConfig) -> tuple[str, str]:
    """How often an anchor's KV is computed, and why; raises UserError if it cannot be shared."""
    of_block = anchor_of(config).of_block
    if config.share_anchor != "auto":
        if of_block and config.share_anchor != "none":
            what = f"strategy.{of_block} gives each block its own anchor; allowed: none, auto"
            raise UserError("strategy.share_anchor", config.share_anchor, what)
        return config.share_anchor, "as asked"
    if of_block:
        return "none", f"{of_block} differs from block to block"
    return "world", "the anchor is the same for all blocks"


def blocks_of(config: StrategyConfig, tokens: int, world: int) -> Blocks | None:
    """Star's blocks of a document, None for other strategies; UserError for unfit sizes."""
    if not isinstance(config, StarConfig):
        return None
    try:
        return make_blocks(tokens, world, config.block_size, config.anchor_size)
    except ValueError as error:
        key, _, rest = str(error).partition("=")
        value, _, why = rest.partition(": ")
        raise UserError(f"strategy.{key}", value, why) from error


def check_document(config: StrategyConfig, tokens: int, world: int, vocab_size: int) -> None:
    """Raise UserError for a strategy that cannot encode a document of `tokens`."""
    blocks_of(config, tokens, world)
    if isinstance(config, StarConfig):
        chosen_share(config)
        token = config.anchor_token
        if token is not None and token >= vocab_size:
            allowed = f"token ids must be from 0 to {vocab_size - 1}"
            raise UserError("strategy.anchor_token", token, allowed)


def describe(config: StrategyConfig, tokens: int, world: int) -> str:
    """How a document of `tokens` is encoded, and why so: for people."""
    blocks = blocks_of(config, tokens, world)
    if isinstance(config, RingConfig):
        return f"strategy ring, layout {config.layout}"
    if blocks is None or not isinstance(config, StarConfig):
        return f"strategy {config.name}"
    if blocks.count == 1:
        return f"strategy star, one block of all {tokens:,} tokens: exact"
    size = "as asked" if config.block_size else f"a block for each of {world} ranks"
    text = f"strategy star, {blocks.count} blocks of {blocks.size:,} tokens ({size}), "
    if not blocks.anchor:
        return text + "no anchor"
    share, why = chosen_share(config)
    how = {
        "world": "computed once and broadcast",
        "rank": "computed once on each rank",
        "none": "computed for each block",
    }
    return f"{text}anchor of {blocks.anchor:,} tokens {how[share]} ({why})"
