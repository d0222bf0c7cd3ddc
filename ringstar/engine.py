"""One rank's part of encoding a document and answering questions about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringstar.cache import ShardedCache, State
from ringstar.config import GenerationConfig
from ringstar.models import BoundModel, PositionEmbeddings
from ringstar.passes import ExtendPass, ReplicatedPass, turn_runs
from ringstar.sampling import NO_TOKEN, Sampler
from ringstar.strategies import Extension, Strategy
from ringstar.unified import UnifiedMax
from seqpar import Runs, Transport, positions, token_count

OnProgress = Callable[[float], None]
DUMMY_ID = 0


@dataclass
class DocumentShard:
    """What one rank holds of an encoded document: `owned[r]` is what each rank r holds.

    `length` is that of the whole text, which some rotary embeddings depend on; `state` is what
    the cache holds of the document alone.
    """

    cache: ShardedCache
    tokens: int
    length: int
    owned: tuple[Runs, ...]
    state: State
    encode_s: float
    bytes_sent: int


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
        kernel: str,
        answer_tokens: int,
        *,
        unified_max: bool = False,
    ):
        self._model, self._transport = model, transport
        self._kernel = kernel
        self._unified = UnifiedMax() if unified_max else None
        self._room = _share(answer_tokens, transport.world_size)

    def encode(
        self, ids: Sequence[int], strategy: Strategy, on_progress: OnProgress, length: int = 0
    ) -> DocumentShard:
        """Encode a document of at least one token; its KV stays with the ranks that made it.

        `length` counts the positions of the whole text, if that is longer than the document.
        """
        length = max(length, len(ids))
        started, sent = time.perf_counter(), self._transport.counters.bytes_sent
        self._transport.check_agreement("document", list(ids))
        owned, plan = strategy.plan(0, len(ids), ((),) * self._transport.world_size)
        cache = ShardedCache()
        cache.reserve(sum(token_count(extension.kept) for extension in plan) + self._room)
        progress = _Progress(self._model, plan, on_progress)
        for number, extension in enumerate(plan, 1):
            self._transport.publish(f"encode chunk {number} of {len(plan)}")
            self._extend(ids, extension, cache, length, progress)
            cache.forget(extension.encoded)
        cache.fit(self._room)
        _finish_device_work(self._transport.device)
        took = time.perf_counter() - started
        sent = self._transport.counters.bytes_sent - sent
        return DocumentShard(cache, len(ids), length, owned, cache.state, took, sent)

    def generate(
        self, shard: DocumentShard, query_ids: Sequence[int], settings: GenerationConfig
    ) -> Generator[GeneratedToken, None, None]:
        """Answer tokens, for as long as the caller asks; the document is left as it was."""
        self._transport.check_agreement("question", list(query_ids), settings)
        sampler = Sampler(settings)
        shard.cache.truncate(shard.state)
        start, new = shard.tokens, list(query_ids)
        shard.cache.make_room(self._most_kept(len(new), settings))
        self._transport.publish("question")
        first = True
        try:
            while True:
                logits = self._replicated(new, start, shard.cache, 1)[0]
                token = self._agree(logits, sampler)
                yield GeneratedToken(token, time.perf_counter(), logits if first else None)
                start, new, first = start + len(new), [token], False
                if self._transport.phase != "decode":
                    self._transport.publish("decode")
        finally:
            shard.cache.truncate(shard.state)

    def score(self, shard: DocumentShard, query_ids: Sequence[int], last: int) -> Tensor:
        """Logits (last, vocab) float32 at the last of `query_ids`; nothing is left behind."""
        self._transport.check_agreement("continuation", list(query_ids), last)
        self._transport.publish("score")
        shard.cache.truncate(shard.state)
        try:
            return self._replicated(query_ids, shard.tokens, shard.cache, last)
        finally:
            shard.cache.truncate(shard.state)

    def _most_kept(self, query_tokens: int, settings: GenerationConfig) -> int:
        """The most tokens of a question and its answer that one rank may have to keep."""
        world = self._transport.world_size
        return _share(query_tokens, world) + _share(settings.max_new_tokens, world)

    def same_rope(self, length: int, other: int) -> bool:
        """Whether texts of these lengths are encoded alike."""
        return self._model.rotary.same(length, other)

    def _extend(
        self,
        ids: Sequence[int],
        extension: Extension,
        cache: ShardedCache,
        length: int,
        progress: _Progress,
    ) -> None:
        cache.append(extension.kept)
        positions_T = self._tensor(positions(extension.positions) or [0])
        context = ExtendPass(
            self._rotary(positions_T, length),
            extension,
            cache,
            self._kernel,
            progress.layer_done(extension),
        )
        token_ids = self._tensor(extension.token_ids(ids) or [DUMMY_ID])
        self._model.forward(token_ids, positions_T, context, logits=0)

    def _replicated(
        self, new: Sequence[int], start: int, cache: ShardedCache, logits: int
    ) -> Tensor:
        rank, world = self._transport.rank, self._transport.world_size
        own = turn_runs(start, len(new), rank, world)
        cache.append(own)
        positions_T = self._tensor(list(range(start, start + len(new))))
        context = ReplicatedPass(
            self._rotary(positions_T, start + len(new)),
            start,
            len(new),
            own,
            cache,
            self._transport,
            self._kernel,
            self._unified,
        )
        return self._model.forward(self._tensor(new), positions_T, context, logits=logits)

    def _agree(self, logits_V: Tensor, sampler: Sampler) -> int:
        """Rank 0 chooses and tells the others, so that ranks never differ about an end."""
        mine = sampler(logits_V) if self._transport.rank == 0 else 0
        token = self._tensor([mine])
        if self._transport.world_size > 1:
            self._transport.broadcast(token, root=0).wait()
        if int(token) == NO_TOKEN:
            raise RuntimeError("the model gave logits that are not finite")
        return int(token)

    def _rotary(self, positions_T: Tensor, length: int) -> PositionEmbeddings:
        like = torch.empty(0, dtype=self._model.dtype, device=self._model.device)
        return self._model.rotary.plan(positions_T, like, length)

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._model.device)


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
