"""One rank's part of encoding a document and answering questions about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localflash import Backend
from ringstar.config import GenerationConfig
from ringstar.models import BoundModel, PositionEmbeddings
from ringstar.paging import Needs, PagePool
from ringstar.passes import ExtendPass, ReplicatedPart, ReplicatedPass, turn_runs
from ringstar.room import Victims, make_room
from ringstar.sampling import NO_TOKEN, Sampler
from ringstar.scores import next_token_scores
from ringstar.shard import TextShard
from ringstar.strategies import Extension, Strategy
from ringstar.unified import UnifiedMax
from seqpar import Part, Transport, positions, side_by_side

OnProgress = Callable[[float], None]
# takes what a pass computed of texts, and its last layer's output (tokens, hidden size)
OnPass = Callable[[Sequence[Part], Tensor], None]
DUMMY_ID = 0
NOBODY = Victims()


@dataclass(frozen=True, slots=True)
class EncodeCost:
    """What it took this rank to encode one document or several: seconds, bytes.

    `kv_error` is that of keys and of values which were rounded to be kept: root mean squares,
    relative; None if they were not rounded.
    """

    seconds: float
    bytes_sent: int
    kv_error: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One generated token, and, with the first, what it was chosen from."""

    token: int
    at_s: float
    first_logits: Tensor | None


class RankEngine:
    """Runs forward passes on one rank; every rank makes the same calls."""

    def __init__(
        self,
        model: BoundModel,
        transport: Transport,
        pool: PagePool,
        kernel: str | Backend,
        answer_tokens: int,
        *,
        unified_max: bool = False,
    ):
        self.model, self.pool, self._transport = model, pool, transport
        self._kernel = kernel
        self._unified = UnifiedMax() if unified_max else None
        self._answer_tokens = answer_tokens
        self._room = _share(answer_tokens, transport.world_size)

    def new_text(self, length: int = 0) -> TextShard:
        """A text without tokens; `length` counts the positions that it will have, if known."""
        return TextShard(self._transport.world_size, self.pool, length)

    def fork(
        self, shard: TextShard, tokens: int, length: int, victims: Victims = NOBODY
    ) -> TextShard:
        """A text that begins with the first `tokens` of another, whose KV it shares.

        Raises UserError if there is no room for what must be copied.
        """
        make_room(self._transport, self.pool, shard.cache.fork_needs(tokens), victims)
        return shard.fork(tokens, length)

    def encode(
        self,
        shards: Sequence[TextShard],
        new: Sequence[Sequence[int]],
        strategy: Strategy,
        on_progress: OnProgress,
        victims: Victims = NOBODY,
        on_pass: OnPass | None = None,
    ) -> EncodeCost:
        """Encode what documents have that is new, together; KV stays with the ranks that made it.

        Raises UserError, before anything is computed, if there is no room.
        """
        started, sent = time.perf_counter(), self._transport.counters.bytes_sent
        lengths = [shard.length for shard in shards]
        self._transport.check_agreement("document", list(map(list, new)), lengths)
        todo = [number for number, ids in enumerate(new) if ids]
        if todo:
            some, ids = [shards[number] for number in todo], [new[number] for number in todo]
            self.extend(some, ids, strategy, on_progress, victims=victims, on_pass=on_pass)
        for shard in shards:
            shard.keep()
        _finish_device_work(self._transport.device)
        sent = self._transport.counters.bytes_sent - sent
        seconds = time.perf_counter() - started
        return EncodeCost(seconds, sent, self.pool.rounding.take())

    def extend(
        self,
        shards: Sequence[TextShard],
        new: Sequence[Sequence[int]],
        strategy: Strategy,
        on_progress: OnProgress,
        length: int = 0,
        victims: Victims = NOBODY,
        on_pass: OnPass | None = None,
    ) -> None:
        """Encode new tokens of each text, spread over ranks, after what is there.

        `length` counts the positions of the whole texts, if they are longer than known so far.
        """
        owned, plan = strategy.plan([s.span(len(ids)) for s, ids in zip(shards, new, strict=True)])
        self._reserve_encode(shards, plan, victims)
        for shard, ids in zip(shards, new, strict=True):
            shard.length = max(shard.length, shard.tokens + len(ids), length)
        progress = _Progress(self.model, plan, on_progress)
        for number, extension in enumerate(plan, 1):
            self._transport.publish(f"encode chunk {number} of {len(plan)}")
            hidden_TC = self._extend(shards, new, extension, progress)
            if on_pass is not None:
                on_pass(extension.parts, hidden_TC)
        for shard, ids, runs in zip(shards, new, owned, strict=True):
            shard.cache.settle(self._room)
            shard.grow(len(ids), runs)
            shard.ready = shard.tokens  # what was reserved beyond is given back

    def _reserve_encode(
        self, shards: Sequence[TextShard], plan: Sequence[Extension], victims: Victims
    ) -> None:
        """Pages for all passes, and beside them room for an answer, if there is some."""
        passes = [
            [((), shard.tokens)]
            + [(p.kept, p.encoded) for step in plan for p in step.parts if p.text == number]
            for number, shard in enumerate(shards)
        ]
        pairs = list(zip(shards, passes, strict=True))
        needs = sum((shard.cache.encode_needs(kept) for shard, kept in pairs), Needs())
        make_room(self._transport, self.pool, needs, victims)
        ahead = self.room_beside(needs, shards)
        for shard, kept in pairs:
            shard.cache.reserve_encode(kept, ahead)
            shard.cache.forget(shard.tokens)

    def bring_back(self, shard: TextShard, victims: Victims = NOBODY) -> None:
        """Put a text's KV into pages, if it was put away."""
        needs = shard.return_needs()
        make_room(self._transport, self.pool, needs, victims)
        shard.bring_back(self.room_beside(needs, [shard]))

    def room_beside(self, needs: Needs, shards: Sequence[TextShard]) -> int:
        """Tokens of an answer that each of these may have room for beside what it needs, or 0."""
        room = sum((shard.cache.needs(self._room) for shard in shards), Needs())
        return 0 if self.pool.missing(needs + room) else self._room

    def reserve(
        self,
        shards: Sequence[TextShard],
        tokens: int,
        ahead: int,
        victims: Victims = NOBODY,
    ) -> None:
        """Room for so many replicated tokens more of each text, and `ahead` single ones.

        What windows hide from them is dropped.  Raises UserError if there is no room.
        """
        world, needs = self._transport.world_size, Needs()
        most = _share(tokens, world) + _share(ahead, world)
        for shard in shards:
            needs += shard.cache.encode_needs([((), shard.tokens)]) + shard.cache.needs(most)
        make_room(self._transport, self.pool, needs, victims)
        for shard in shards:
            shard.cache.reserve(most)
            shard.ready = shard.tokens + tokens + ahead

    def generate(
        self,
        shard: TextShard,
        query_ids: Sequence[int],
        settings: GenerationConfig,
        victims: Victims = NOBODY,
    ) -> Generator[GeneratedToken, None, None]:
        """Answer tokens to a question after what is there, for as long as the caller asks.

        All that is read stays: the last token that was given is not.  Raises UserError, before
        anything is computed, if there is no room.
        """
        self._transport.check_agreement("question", list(query_ids), settings)
        sampler = Sampler(settings)
        new = list(query_ids)
        self.reserve([shard], len(new), settings.max_new_tokens, victims)
        first = True
        while True:
            logits = self.read([shard], [new])[0]
            token = self._agree(logits, sampler)
            yield GeneratedToken(token, time.perf_counter(), logits if first else None)
            new, first = [token], False
            self._transport.check_running()
            if self._transport.phase != "decode":
                self._transport.publish("decode")

    def logits(
        self, shard: TextShard, query_ids: Sequence[int], last: int, victims: Victims = NOBODY
    ) -> Tensor:
        """Logits (last, vocab) float32 at the last of `query_ids`; nothing is left behind."""
        self._transport.check_agreement("question", list(query_ids), last)
        shard.rewind()
        self.reserve([shard], len(query_ids), 0, victims)
        try:
            return self.read([shard], [query_ids], last)
        finally:
            shard.rewind()

    def score(
        self,
        shard: TextShard,
        before: Sequence[int],
        ids: Sequence[int],
        again: int = 0,
        victims: Victims = NOBODY,
    ) -> Tensor:
        """How likely `ids` are after what is there and `before`; nothing is left behind.

        `again` of `before` are the last tokens that are there.  (2, len(ids)) as in
        `next_token_scores`, the same on every rank.
        """
        self._transport.check_agreement("continuation", list(before), list(ids), again)
        shard.rewind()
        read = [*before, *ids[:-1]]
        self.reserve([shard], len(read), 0, victims)
        try:
            inputs, wanted = self._reading([shard], [read], len(ids), again=again)
            hidden_TC = self.model.forward(*inputs, logits=None)[wanted]
        finally:
            shard.rewind()
        found = next_token_scores(self.model, hidden_TC, self._tensor(ids))
        if self._transport.world_size > 1:
            self._transport.broadcast(found, root=0).wait()
        return found

    def read(
        self,
        shards: Sequence[TextShard],
        new: Sequence[Sequence[int]],
        last: int = 1,
        *,
        length: int = 0,
        growing: bool = False,
    ) -> Tensor:
        """Read a few new tokens of each text on every rank, after what is there.

        `length` is as in `extend`.  `growing`: what is read stays, and more will follow.

        Float32 logits (texts · last, vocab) at the last tokens of each text, in order.
        """
        inputs, wanted = self._reading(shards, new, last, length=length, growing=growing)
        return self.model.forward(*inputs, logits=wanted)

    def _reading(
        self,
        shards: Sequence[TextShard],
        new: Sequence[Sequence[int]],
        last: int,
        *,
        length: int = 0,
        growing: bool = False,
        again: int = 0,
    ) -> tuple[tuple[Tensor, Tensor, ReplicatedPass], list[int]]:
        """What the model takes to read so much, and where the last of each text are in that.

        The first `again` of `new` are there already: they are read once more, and not kept twice.
        """
        world, rank = self._transport.world_size, self._transport.rank
        rows = side_by_side([len(ids) for ids in new])
        if any(s.tokens + len(ids) > s.ready for s, ids in zip(shards, new, strict=True)):
            self._reserve_more(shards, max(map(len, new)), growing)
        parts, plans = [], []
        for shard, ids, row in zip(shards, new, rows, strict=True):
            there, kept = shard.tokens, len(ids) - again
            start, stop = there - again, there + kept
            turns = [turn_runs(there, kept, other, world) for other in range(world)]
            shard.cache.append(turns[rank])
            shard.grow(kept, turns)
            parts.append(ReplicatedPart(start, row, turns[rank], shard.cache))
            plans.append((self._tensor(range(start, stop)), max(stop, length)))
        positions_T = torch.cat([positions_T for positions_T, _ in plans])
        context = ReplicatedPass(
            self._rotary(plans), parts, self._transport, self._kernel, self._unified
        )
        wanted = [index for row in rows for index in range(row.stop - last, row.stop)]
        token_ids = self._tensor([token for ids in new for token in ids])
        return (token_ids, positions_T, context), wanted

    def _reserve_more(self, shards: Sequence[TextShard], tokens: int, growing: bool) -> None:
        """A text that grows token by token gets room for many at once, and forgets now and then."""
        for shard in shards if growing else ():
            shard.cache.forget(shard.tokens)
        self.reserve(shards, tokens, self._answer_tokens if growing else 0)

    def same_rope(self, length: int, other: int) -> bool:
        """Whether texts of these lengths are encoded alike."""
        return self.model.rotary.same(length, other)

    def _extend(
        self,
        shards: Sequence[TextShard],
        new: Sequence[Sequence[int]],
        extension: Extension,
        progress: _Progress,
    ) -> Tensor:
        """One forward pass; a rank with nothing to compute runs one dummy token.

        The last layer's output (tokens, hidden size), the dummy's with it.
        """
        parts = [(shards[part.text], part) for part in extension.parts]
        for shard, part in parts:
            shard.cache.append(part.kept)
        plans = [(self._tensor(positions(part.positions)), shard.length) for shard, part in parts]
        if not any(part.positions for _, part in parts):
            plans = [(self._tensor([0]), parts[0][0].length)]
        context = ExtendPass(
            self._rotary(plans),
            extension,
            [shard.cache for shard, _ in parts],
            self._kernel,
            progress.layer_done(extension),
        )
        token_ids = self._tensor(extension.token_ids(new) or [DUMMY_ID])
        positions_T = torch.cat([positions_T for positions_T, _ in plans])
        hidden_TC = self.model.forward(token_ids, positions_T, context, logits=None)
        for shard, part in parts:
            shard.cache.forget(part.encoded)
        return hidden_TC

    def _agree(self, logits_V: Tensor, sampler: Sampler) -> int:
        """Rank 0 chooses and tells the others, so that ranks never differ about an end."""
        mine = sampler(logits_V) if self._transport.rank == 0 else 0
        token = self._tensor([mine])
        if self._transport.world_size > 1:
            self._transport.broadcast(token, root=0).wait()
        if int(token) == NO_TOKEN:
            raise RuntimeError("the model gave logits that are not finite")
        return int(token)

    def _rotary(self, plans: Sequence[tuple[Tensor, int]]) -> PositionEmbeddings:
        """cos and sin of texts side by side, each (positions_T, length of the whole text)."""
        like = torch.empty(0, dtype=self.model.dtype, device=self.model.device)
        return self.model.rotary.plan_texts(plans, like)

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.model.device)


def _share(tokens: int, world: int) -> int:
    """The most that one rank gets of `tokens` that are dealt evenly."""
    return -(-tokens // world)


class _Progress:
    """The share of this rank's floating point operations that is done, after each layer."""

    def __init__(self, model: BoundModel, plan: Sequence[Extension], report: OnProgress):
        self._report, self._done = report, 0.0
        self._per_token, self._per_pair = model.flops_per_token()
        self._total = sum(map(self._cost, plan)) * model.layers

    def layer_done(self, extension: Extension) -> Callable[[], None]:
        share = self._cost(extension) / self._total if self._total else 0.0

        def report() -> None:
            self._done += share
            self._report(min(1.0, self._done))

        return report

    def _cost(self, extension: Extension) -> float:
        work = extension.work
        return work.tokens * self._per_token + work.pairs * self._per_pair


def _finish_device_work(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
