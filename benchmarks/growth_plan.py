"""What an encode should cost, from the runtime's own plans: integers, nothing measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ringattn import Costs, RingStrategy
from seqpar import Span, ThreadWorld, Work, token_count
from starattn import StarStrategy

HEADS, KV_HEADS, DIM, ITEM_BYTES = 4, 2, 64, 4
# of the model; the hidden size is HEADS · DIM
LAYERS, INTERMEDIATE = 2, 768
# of star, whatever the length: what is fixed for its cost to be linear
BLOCK = 1024
COSTS = Costs(HEADS, KV_HEADS, DIM, ITEM_BYTES)


@dataclass(frozen=True, slots=True)
class Job:
    """One encode: attention alone on tensors of one layer, or a whole model of LAYERS."""

    work: Literal["attention", "model"]
    strategy: Literal["ring", "star"]
    tokens: int
    world: int

    @property
    def layers(self) -> int:
        return LAYERS if self.work == "model" else 1


@dataclass(frozen=True, slots=True)
class Planned:
    """Floating point operations of all ranks; bytes of each rank, in rank order."""

    flops: int
    sent: list[int]
    kv: list[int]


def planned(job: Job) -> Planned:
    """The cost of a job as its plan says."""
    ranks = [list(_passes(job, rank)) for rank in range(job.world)]
    works = [work for passes in ranks for work, _, _ in passes]
    return Planned(
        job.layers * sum(_flops(work, job.work == "model") for work in works),
        [job.layers * sum(sent for _, sent, _ in passes) for passes in ranks],
        [job.layers * sum(kept for _, _, kept in passes) * COSTS.kv_bytes for passes in ranks],
    )


def _flops(work: Work, with_weights: bool) -> int:
    """Of one layer: 4·H·D for each visible pair, and twice its weights for each token."""
    hidden = HEADS * DIM
    weights = hidden * (2 * HEADS + 2 * KV_HEADS) * DIM + 3 * hidden * INTERMEDIATE
    return 4 * HEADS * DIM * work.pairs + (2 * weights * work.tokens if with_weights else 0)


def _passes(job: Job, rank: int) -> Iterator[tuple[Work, int, int]]:
    """The work of each forward pass, bytes that it sends for one layer, tokens that it keeps."""
    transport = ThreadWorld(job.world).transports[rank]
    whole = Span(0, job.tokens, ((),) * job.world)
    settings: dict[str, Any] = {"chunk_tokens": job.tokens}
    if job.strategy == "ring":
        for ring in RingStrategy(transport, **settings).plan([whole])[1]:
            kept = sum(token_count(part.kept) for part in ring.parts)
            yield ring.work, ring.plan.bytes_sent(COSTS), kept
        return
    settings |= {"block_size": BLOCK, "anchor_size": BLOCK}
    for star in StarStrategy(transport, **settings).plan([whole])[1]:
        # the anchor's KV, one copy for each other rank
        copies = job.world - 1 if star.step.shares and rank == 0 else 0
        yield star.work, copies * BLOCK * COSTS.kv_bytes, token_count(star.kept)
