"""What an encode should cost, from the runtime's own plans: integers, nothing measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ringattn import Costs, RingStrategy
from ringattn.strategy import RingExtension
from seqpar import Span, ThreadWorld, Tile, Work, token_count
from starattn import StarStrategy
from starattn.strategy import StarExtension

HEADS, KV_HEADS, DIM, ITEM_BYTES = 4, 2, 64, 4
# of the model; the hidden size is HEADS · DIM
LAYERS, INTERMEDIATE = 2, 768
# of star, whatever the length: what is fixed for its cost to be linear
BLOCK = 1024
COSTS = Costs(
    heads=HEADS, head_dim=DIM, itemsize=ITEM_BYTES, kv_bytes=2 * KV_HEADS * DIM * ITEM_BYTES
)


@dataclass(frozen=True, slots=True)
class Job:
    """One encode by `ring` or `star`: `attention` alone, of one layer, or a `model` of LAYERS."""

    work: str
    strategy: str
    tokens: int
    world: int

    @property
    def layers(self) -> int:
        return LAYERS if self.work == "model" else 1


@dataclass(frozen=True, slots=True)
class Planned:
    """Floating point operations of all ranks; computed tokens, and bytes, of each rank."""

    flops: int
    tokens: list[int]
    sent: list[int]
    kv: list[int]


def planned(job: Job) -> Planned:
    """The cost of a job as its plan says."""
    ranks = [list(_passes(job, rank)) for rank in range(job.world)]
    works = [work for passes in ranks for work, _, _ in passes]
    return Planned(
        job.layers * sum(_flops(work, job.work == "model") for work in works),
        [sum(work.tokens for work, _, _ in passes) for passes in ranks],
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
    for extension in _plan(job, rank):
        kept = sum(token_count(part.kept) for part in extension.parts)
        if isinstance(extension, RingExtension):
            yield extension.work, extension.plan.bytes_sent(COSTS), kept
            continue
        # the anchor's KV, one copy for each other rank
        copies = job.world - 1 if extension.step.shares and rank == 0 else 0
        yield extension.work, copies * BLOCK * COSTS.kv_bytes, kept


def _plan(job: Job, rank: int) -> list[Any]:
    """A rank's forward passes, as the strategy itself plans them."""
    transport = ThreadWorld(job.world).transports[rank]
    whole = Span(0, job.tokens, ((),) * job.world)
    if job.strategy == "ring":
        return list(RingStrategy(transport, chunk_tokens=job.tokens).plan([whole])[1])
    star = StarStrategy(transport, block_size=BLOCK, anchor_size=BLOCK, chunk_tokens=job.tokens)
    return star.plan([whole])[1]


def attention_tiles(job: Job, rank: int) -> list[Tile]:
    """The kernel calls of a rank for one layer."""
    found: list[Tile] = []
    for extension in _plan(job, rank):
        if isinstance(extension, StarExtension):
            step = extension.step
            found += [*step.new, *step.past, *step.anchor]
        else:
            found += [tile for step in extension.plan.new_steps() for tile in step.tiles]
    return found


def buffer_bytes(job: Job, rank: int) -> int:
    """What transfers take on a rank besides the KV that it owns: a ring's two, star's anchor."""
    if job.strategy == "star":
        shares = any(extension.step.shares for extension in _plan(job, rank))
        return BLOCK * COSTS.kv_bytes if shares else 0
    (extension,) = _plan(job, rank)
    (text,) = extension.plan.texts
    return text.pass_bytes(COSTS) - token_count(text.own) * COSTS.partial_bytes


def model_peak(job: Job, rank: int, room: int, slice_tokens: int, attention: int) -> int:
    """The most bytes that live at once on a rank, in a layer of the model.

    What stays all the time is KV with `room` for so many tokens more, transfer buffers, cos and
    sin, ids.  On top of that there are three moments: rotating queries and keys, attention (which
    takes `attention` bytes by itself), the feed-forward of a second slice.  How many tensors of
    the hidden size live at each was counted in transformers' llama, and is the same at every
    length; inverse frequencies and the like, under 1 KB, are left out.
    """
    hidden, tokens = HEADS * DIM * ITEM_BYTES, planned(job).tokens[rank]
    buffers = buffer_bytes(job, rank)
    stays = (tokens + room) * LAYERS * COSTS.kv_bytes + tokens * (2 * DIM * ITEM_BYTES + 8)
    rotating = 7 * hidden * tokens
    attending = attention - buffers + 5 * hidden * tokens
    feeding = hidden * (3 * tokens + 14 * min(slice_tokens, tokens))
    return stays + buffers + max(rotating, attending, feeding)
