"""Simulated ranks, as most tests want them, and what they answer."""

from __future__ import annotations

from typing import Any

from ringstar import CacheConfig, LongContext
from ringstar.document import Document
from tests.support.models import expected, over_bound

# every document is encoded, whatever was encoded before
ANEW = CacheConfig(reuse=False)


def simulated(folder: str, world: int, **options: Any) -> LongContext:
    """A runtime of `world` ranks with a thread each."""
    options = {"threads_per_rank": 1, "cache": ANEW, **options}
    return LongContext.from_pretrained(folder, transport="threads", world_size=world, **options)


def assert_exact(
    ring: LongContext, document: Document, folder: str, question: list[int], new_tokens: int
) -> None:
    """What is answered about a document is what one device says about its ids."""
    want = expected(folder, [*document.ids, *question], new_tokens)
    answer = ring.ask(document, question, max_new_tokens=new_tokens)
    assert over_bound(answer.first_logits, want) <= 1
    assert answer.ids == want.ids
