"""One rank's part of encoding a document and answering questions about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringstar.cache import ShardedCache
from ringstar.config import GenerationConfig
from ringstar.models import BoundModel
from ringstar.passes import ExtendPass, ReplicatedPass, turn_runs
from ringstar.sampling import NO_TOKEN, Sampler
from ringstar.strategies import Extension, Strategy
from seqpar import Run, Runs, Transport, positions, token_count

OnProgress = Callable[[float], None]
DUMMY_ID = 0


@dataclass
class DocumentShard:
    """What one rank holds of an encoded document: `owned[r]` is what each rank r holds."""

    cache: ShardedCache
    tokens: int
    owned: tuple[Runs, ...]
    runs: Runs
    encode_s: float


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
        strategy: Strategy,
        kernel: str,
        answer_tokens: int,
    ):
        self._model, self._transport = model, transport
        self._strategy, self._kernel = strategy, kernel
        self._room = _share(answer_tokens, transport.world_size)

    def encode(self, ids: Sequence[int], on_progress: OnProgress) -> DocumentShard:
        """Encode a document of at least one token; its KV stays with the ranks that made it."""
        started = time.perf_counter()
        self._transport.check_agreement("document", list(ids))
        world, rank = self._transport.world_size, self._transport.rank
        owned: tuple[Runs, ...] = ((),) * world
        plan = list(self._strategy.extensions(0, len(ids), owned))
        cache = ShardedCache()
        cache.reserve(sum(token_count(extension.own) for extension in plan) + self._room)
        progress = _Progress(self._model, plan, on_progress)
        for number, extension in enumerate(plan, 1):
            self._transport.publish(f"encode chunk {number} of {len(plan)}")
            self._extend(ids, extension, cache, progress)
            owned = tuple(a + b for a, b in zip(owned, extension.owned, strict=True))
        _finish_device_work(self._transport.device)
        took = time.perf_counter() - started
        return DocumentShard(cache, len(ids), owned, owned[rank], took)

    def generate(
        self, shard: DocumentShard, query_ids: Sequence[int], settings: GenerationConfig
    ) -> Generator[GeneratedToken, None, None]:
        """Answer tokens, for as long as the caller asks; the document is left as it was."""
        self._transport.check_agreement("question", list(query_ids), settings)
        sampler = Sampler(settings)
        shard.cache.truncate(shard.runs)
        start, new = shard.tokens, list(query_ids)
        shard.cache.reserve(shard.cache.tokens + self._most_kept(len(new), settings))
        self._transport.publish("question")
        first = True
        try:
            while True:
                logits = self._replicated(new, start, shard.cache)
                token = self._agree(logits, sampler)
                yield GeneratedToken(token, time.perf_counter(), logits if first else None)
                start, new, first = start + len(new), [token], False
                if self._transport.phase != "decode":
                    self._transport.publish("decode")
        finally:
            shard.cache.truncate(shard.runs)

    def _most_kept(self, query_tokens: int, settings: GenerationConfig) -> int:
        """The most tokens of a question and its answer that one rank may have to keep."""
        world = self._transport.world_size
        return _share(query_tokens, world) + _share(settings.max_new_tokens, world)

    def _extend(
        self, ids: Sequence[int], extension: Extension, cache: ShardedCache, progress: _Progress
    ) -> None:
        own = positions(extension.own)
        at = cache.append(extension.own)
        mine = own or [extension.start]
        token_ids = [ids[position] for position in own] or [DUMMY_ID]
        positions_T = self._tensor(mine)
        context = ExtendPass(
            self._rotary(positions_T),
            extension,
            cache,
            at,
            self._kernel,
            progress.layer_done(extension),
        )
        self._model.forward(self._tensor(token_ids), positions_T, context, logits=False)

    def _replicated(self, new: Sequence[int], start: int, cache: ShardedCache) -> Tensor:
        rank, world = self._transport.rank, self._transport.world_size
        own = turn_runs(start, len(new), rank, world)
        positions_T = self._tensor(list(range(start, start + len(new))))
        context = ReplicatedPass(
            self._rotary(positions_T),
            start,
            len(new),
            own,
            cache,
            cache.append(own),
            self._transport,
            self._kernel,
        )
        logits = self._model.forward(self._tensor(new), positions_T, context, logits=True)
        assert logits is not None
        return logits

    def _agree(self, logits_V: Tensor, sampler: Sampler) -> int:
        """Rank 0 chooses and tells the others, so that ranks never differ about an end."""
        mine = sampler(logits_V) if self._transport.rank == 0 else 0
        token = self._tensor([mine])
        if self._transport.world_size > 1:
            self._transport.broadcast(token, root=0).wait()
        if int(token) == NO_TOKEN:
            raise RuntimeError("the model gave logits that are not finite")
        return int(token)

    def _rotary(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, dtype=self._model.dtype, device=self._model.device)
        return self._model.rotary.plan(positions_T, like)

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._model.device)


def _share(tokens: int, world: int) -> int:
    """The most that one rank gets of `tokens` that are dealt evenly."""
    return -(-tokens // world)


class _Progress:
    """The share of an encode's floating point operations that is done, after each layer."""

    def __init__(self, model: BoundModel, plan: Sequence[Extension], report: OnProgress):
        self._layers, self._report, self._done = model.layers, report, 0.0
        weights, per_key = model.flops_per_token()
        self._costs = {
            (e.start, e.stop): len(Run(e.start, e.stop)) * (weights + per_key * _mean_keys(e))
            for e in plan
        }
        self._total = sum(self._costs.values()) * self._layers

    def layer_done(self, extension: Extension) -> Callable[[], None]:
        share = self._costs[extension.start, extension.stop] / self._total

        def report() -> None:
            self._done += share
            self._report(min(1.0, self._done))

        return report


def _mean_keys(extension: Extension) -> float:
    return (extension.start + extension.stop) / 2


def _finish_device_work(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
