"""Fields that the results of several commands have; `docs/results.md` describes each."""

from __future__ import annotations

from typing import Any

from ringstar.config import StrategyConfig
from ringstar.runtime import LongContext
from ringstar.strategies import blocks_of


def strategy_fields(strategy: StrategyConfig, tokens: int, world_size: int) -> dict[str, Any]:
    """How a document of so many tokens is encoded; None for what the strategy does not have."""
    blocks = blocks_of(strategy, tokens, world_size)
    return {
        "strategy": strategy.name,
        "layout": getattr(strategy, "layout", None),
        "block_size": blocks.size if blocks else None,
        "anchor_size": blocks.anchor if blocks else None,
    }


def runtime_fields(runtime: LongContext) -> dict[str, Any]:
    """What computed it."""
    return {
        "world_size": runtime.world_size,
        "transport": runtime.transport,
        "kernel": runtime.kernel,
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "device": str(runtime.device),
    }
