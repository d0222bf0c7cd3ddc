"""The ranks of this process: their engines, and the documents that they hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from ringstar.config import CacheConfig
from ringstar.document import Document, Shelf
from ringstar.engine import OnProgress, RankEngine
from ringstar.errors import UserError
from ringstar.memory import make_place
from ringstar.ranks import Ranks, run_or_refuse
from ringstar.room import Victim, Victims
from ringstar.shard import TextShard
from seqpar import Transport

log = logging.getLogger("ringstar")

T = TypeVar("T")


class Group:
    """What the parts of a LongContext share.

    With simulated ranks there is an engine for each of them, otherwise one.
    """

    def __init__(self, ranks: Ranks, cache: CacheConfig):
        self.ranks, self.rank = ranks, ranks.transports[0].rank
        self.engines: dict[int, RankEngine] = {}
        self.places = [make_place(cache, each.device) for each in ranks.transports]
        self.shelf = Shelf(keeps=cache.reuse)
        self._said: set[str] = set()

    def start(self, make_engine: Callable[[Transport], RankEngine]) -> None:
        """Give every rank its engine."""
        made = self.run(make_engine)
        self.engines = {t.rank: each for t, each in zip(self.ranks.transports, made, strict=True)}

    def run(self, rank_fn: Callable[[Transport], T]) -> list[T]:
        """Run `rank_fn` on each rank; results in rank order."""
        return run_or_refuse(self.ranks, rank_fn)

    @property
    def any_engine(self) -> RankEngine:
        """For what is the same on all."""
        return next(iter(self.engines.values()))

    def index(self, transport: Transport) -> int:
        """Which of the ranks of this process it is."""
        return next(i for i, each in enumerate(self.ranks.transports) if each is transport)

    def victims(self, transport: Transport, but: Sequence[Document] = ()) -> Victims:
        """What may make room on this rank, with those that are in use left out."""
        index = self.index(transport)

        def find() -> list[Victim]:
            return [
                Victim(document.shards[index], self.shelf.is_held(document))
                for document in self.shelf.victims(but)
            ]

        # without `keeps` what nobody has is gone already, wherever its KV was
        return Victims(find, self.places[index], keeps=self.shelf.keeps)

    def at_hand(
        self, transport: Transport, document: Document, phase: str
    ) -> tuple[RankEngine, TextShard, Victims]:
        """This rank's engine, its share of a document, back in its pages, and what may go for it.

        All ranks make this call, for `phase`, which begins here.  Raises UserError if there is no
        room for the document.
        """
        transport.publish(phase)
        engine, shard = self.engines[transport.rank], document.shards[self.index(transport)]
        victims = self.victims(transport, [document])
        engine.bring_back(shard, victims)
        return engine, shard, victims

    def say(self, *lines: str) -> None:
        """Log what was decided, on rank 0, each line once."""
        if self.rank == 0:
            for line in lines:
                if line not in self._said:
                    log.info(line)
                self._said.add(line)

    def close(self) -> None:
        """Leave the group of ranks."""
        for transport in self.ranks.transports:
            transport.close()


def check_held(document: Document, owner: object) -> None:
    """Raise UserError unless `owner` holds the KV of this document."""
    if document.owner is not owner:
        raise UserError("document", None, "was encoded by another LongContext: encode it here")
    if not document.shards:
        raise UserError("document", None, "was appended to: use what append returned")
    if document.evicted:
        why = (
            "made room for others, or was forgotten: encode it again; Document.pin() keeps one"
            " in its place, cache.offload=disk puts them aside, cache.max_bytes holds more"
        )
        raise UserError("document", f"{document.tokens} tokens", why)


def on_rank_0(transport: Transport, report: OnProgress | None) -> OnProgress:
    """What to call with progress: on other ranks, nobody."""
    return report if report is not None and transport.rank == 0 else lambda _: None
