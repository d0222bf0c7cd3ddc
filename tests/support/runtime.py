"""Simulated ranks, as most tests want them."""

from __future__ import annotations

from typing import Any

from ringstar import CacheConfig, LongContext

# every document is encoded, whatever was encoded before
ANEW = CacheConfig(reuse=False)


def simulated(folder: str, world: int, **options: Any) -> LongContext:
    """A runtime of `world` ranks with a thread each."""
    options = {"threads_per_rank": 1, "cache": ANEW, **options}
    return LongContext.from_pretrained(folder, transport="threads", world_size=world, **options)
