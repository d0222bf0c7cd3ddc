"""An encoded document, and the shelf of all that a runtime has."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ringstar.config import StrategyConfig
from ringstar.metrics import RankMetrics
from ringstar.shard import TextShard

if TYPE_CHECKING:
    from ringstar.runtime import LongContext

_BLOCK = 64  # tokens that are looked up at once


@dataclass(frozen=True, eq=False)
class Document:
    """An encoded document: its KV stays sharded over the ranks that made it.

    `encode_s` is the slowest rank's, `metrics` every rank's, `shards` those of the ranks in this
    process.  Of documents that were encoded together, `encode_s` and `metrics.bytes_sent` are
    those of all.  `cached_tokens` were encoded already, as the beginning of another document, and
    `encoded_by` is how many ranks encoded it, which may be others than those that have it.
    `kv_error`, with `cache.dtype`, is how far keys and values are from what was computed: root mean
    squares, relative, of the rank where that is most, of what was encoded last.
    """

    ids: Sequence[int] = field(repr=False)
    strategy: StrategyConfig
    encode_s: float
    metrics: RankMetrics
    shards: list[TextShard] = field(repr=False)
    owner: LongContext = field(repr=False)
    encoded_by: int
    cached_tokens: int = 0
    kv_error: tuple[float, float] | None = None

    @property
    def tokens(self) -> int:
        """How many it has."""
        return len(self.ids)

    @property
    def evicted(self) -> bool:
        """Whether its KV is gone: it made room for others, or was forgotten."""
        return any(shard.evicted for shard in self.shards)

    def pin(self) -> None:
        """Keep it where it is: it makes no room for others."""
        self.owner.shelf.pinned.add(self)

    def unpin(self) -> None:
        """Let it make room for others again."""
        self.owner.shelf.pinned.discard(self)

    def forget(self) -> None:
        """Give its memory back now; it can be used no more."""
        self.owner.shelf.remove(self)
        for shard in self.shards:
            shard.evict()


@dataclass(frozen=True, slots=True)
class _Entry:
    """A document of which somebody may have a reference, and, if it stays, one of the shelf's."""

    theirs: Callable[[], Document | None]
    own: Document | None

    def document(self) -> Document | None:
        return self.theirs() or self.own


class Shelf:
    """Documents in the order in which they were last used, found by how they begin.

    With `keeps` they stay although nobody else has them any more, until they make room for others;
    without it the shelf only knows those that somebody has.
    """

    def __init__(self, *, keeps: bool):
        self.pinned: set[Document] = set()
        self.keeps = keeps
        self._by_use: dict[int, _Entry] = {}
        self._by_block: dict[int, list[int]] = {}

    def add(self, document: Document) -> None:
        """The one that was used last."""
        key, own = _key(document), replace(document) if self.keeps else None
        self._by_use.pop(key, None)  # of one that nobody has any more
        self._by_use[key] = _Entry(weakref.ref(document), own)
        for block in _blocks(document.ids) if self.keeps else ():
            self._by_block.setdefault(block, []).append(key)

    def use(self, document: Document) -> None:
        """It is used last now."""
        entry = self._by_use.pop(_key(document), None)
        if entry is not None:
            self._by_use[_key(document)] = entry

    def remove(self, document: Document) -> None:
        """It is not to be found any more."""
        self.pinned.discard(document)
        key = _key(document)
        if self._by_use.pop(key, None) is None or not self.keeps:
            return
        for block in _blocks(document.ids):
            others = [each for each in self._by_block.pop(block, []) if each != key]
            if others:
                self._by_block[block] = others

    def victims(self, but: Iterable[Document] = ()) -> list[Document]:
        """What may make room for others, least recently used first."""
        kept = {_key(document) for document in (*but, *self.pinned)}
        self._drop_gone()
        documents = [entry.document() for entry in list(self._by_use.values())]
        return [each for each in documents if each is not None and _key(each) not in kept]

    def is_held(self, document: Document) -> bool:
        """Whether somebody else had one of its documents when it was got."""
        entry = self._by_use.get(_key(document))
        return entry is None or entry.own is not document

    def beginning(
        self, ids: Sequence[int], fits: Callable[[Document, int], bool]
    ) -> tuple[Document, int] | None:
        """The document that has most tokens in common with the beginning of `ids`, and how many.

        Blocks of 64 tokens are looked up by their hash and those before; `fits(document, tokens)`
        says whether so much of it can be used.
        """
        self._drop_gone()
        levels: list[list[int]] = []
        for block in _blocks(ids):
            if block not in self._by_block:
                break
            levels.append(self._by_block[block])
        for keys in reversed(levels):  # whoever has more blocks in common has more tokens
            entries = [self._by_use[key] for key in keys if key in self._by_use]
            found = [entry.document() for entry in entries]
            documents = [document for document in found if document is not None]
            pairs = [(document, _in_common(document.ids, ids)) for document in documents]
            fitting = [pair for pair in pairs if pair[1] and fits(*pair)]
            if fitting:
                return max(fitting, key=lambda pair: pair[1])
        return None

    def _drop_gone(self) -> None:
        """Forget those that nobody has, or whose KV is gone; ranks in threads do so at once."""
        for key, entry in list(self._by_use.items()):
            document = entry.document()
            if document is None:
                self._by_use.pop(key, None)
            elif not document.shards or document.evicted:
                self.remove(document)


def _key(document: Document) -> int:
    """The same for all that have this KV, for as long as one of them is there."""
    return id(document.shards)


def _blocks(ids: Sequence[int]) -> Iterator[int]:
    """A hash for each full block and all before it, then one for the whole if it is no block."""
    seen = 0
    for start in range(0, len(ids), _BLOCK):
        seen = hash((seen, *ids[start : start + _BLOCK]))
        yield seen


def _in_common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(ids), len(others)))
