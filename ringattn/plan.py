"""What a ring does for one extension of a document: pure integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import Tensor

from localflash import KV
from seqpar import (
    Runs,
    Step,
    Tile,
    clip,
    packed_steps,
    ring_steps,
    side_by_side,
    tiles,
    token_count,
    token_nbytes,
    travels,
    visible,
)

PastBy = Literal["none", "kv", "queries"]

# every layer asks for the same plan again; a long encode has a few plans for each chunk
_remembered = lru_cache(maxsize=256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What decides how the past is reached: what one token costs on the wire in one layer.

    `itemsize`: bytes of a number of the queries; `kv_bytes`: of a token's KV in the form in which
    it travels, scales included.
    """

    heads: int
    head_dim: int
    itemsize: int
    kv_bytes: int

    @staticmethod
    def of(q_BTHD: Tensor, kv: KV) -> Costs:
        """Those of such queries and of KV in this form, of however many tokens."""
        heads, head_dim = q_BTHD.shape[2:]
        return Costs(
            heads=heads,
            head_dim=head_dim,
            itemsize=q_BTHD.element_size(),
            kv_bytes=token_nbytes(kv),
        )

    @property
    def query_bytes(self) -> int:
        """Bytes of one token's queries on the wire, in the model's dtype."""
        return self.heads * self.head_dim * self.itemsize

    @property
    def partial_bytes(self) -> int:
        """Bytes of one token's partial: float32 out and lse."""
        return self.heads * (self.head_dim + 1) * 4


@dataclass(frozen=True, slots=True)
class QueryStep:
    """One step of passing queries round: the rank holds the queries of `owner`.

    It passes `send` of them on and receives `receive`; it computes `tiles` against its own
    past KV and, where there are any, returns the partial to the owner; `returned` tells
    whether a partial of this rank's own queries comes back at this step.
    """

    owner: int
    send: int
    receive: int
    tiles: tuple[Tile, ...]
    returned: bool


@dataclass(frozen=True)
class ExtendPlan:
    """New tokens `new[r]` of every rank r, after the `past[r]` that it already holds."""

    rank: int
    new: tuple[Runs, ...]
    past: tuple[Runs, ...]

    @property
    def own(self) -> Runs:
        return self.new[self.rank]

    @property
    def start(self) -> int:
        """The first of the new positions."""
        return min(run.start for runs in self.new for run in runs)

    @property
    def stop(self) -> int:
        """One past the last of them."""
        return 1 + max(run.last for runs in self.new for run in runs)

    def past_seen(self, window: int | None) -> tuple[Runs, ...]:
        """What ranks still hold of the past: all, or what the window shows to the new tokens."""
        if window is None:
            return self.past
        return _clipped(self.past, self.start - window + 1)

    def new_steps(self, window: int | None = None) -> tuple[Step, ...]:
        """New queries against new KV, passing KV."""
        return _steps(self.rank, self.new, self.new, window)

    def past_kv_steps(self, window: int | None = None) -> tuple[Step, ...]:
        """New queries against past KV, passing KV."""
        return _steps(self.rank, self.new, self.past_seen(window), window)

    def past_query_steps(self, window: int | None = None) -> tuple[QueryStep, ...]:
        """New queries against past KV, passing queries and returning partials."""
        return _query_steps(self.rank, self.new, self.past_seen(window), window)

    def past_by(self, costs: Costs, window: int | None = None) -> PastBy:
        """Pass KV or queries, whichever moves fewer bytes over all ranks; the same on each."""
        past = self.past_seen(window)
        if not any(past):
            return "none"
        kv, queries = _past_traffic(self.new, past, costs, window)
        return "kv" if kv <= queries else "queries"

    def pass_bytes(self, costs: Costs, kernel_bytes: int = 0) -> int:
        """What a ring pass over the new KV allocates on this rank, at most, in bytes.

        Two transfer buffers of the largest share, the running float32 partial, and what the
        local kernel takes for its largest tile, widened KV included.  New KV is in one piece:
        pieces would be gathered to be sent.  Nothing here depends on the number of ranks (from 2
        up) or on the length of the document, for given shares.  The paper's 6·b·c·h counts
        16-bit activations of blocks with as many KV heads as query heads.
        """
        receives = any(step.receive for step in self.new_steps())
        buffers = 2 * largest_share(self.new) * costs.kv_bytes if receives else 0
        return buffers + token_count(self.own) * costs.partial_bytes + kernel_bytes

    def bytes_sent(self, costs: Costs, window: int | None = None) -> int:
        """What this rank sends for one layer of this extension, if it is alone."""
        new = sum(step.send for step in self.new_steps(window)) * costs.kv_bytes
        return new + self.past_bytes_sent(costs, window)

    def past_bytes_sent(self, costs: Costs, window: int | None = None) -> int:
        """The part of it that is for the past."""
        past_by = self.past_by(costs, window)
        if past_by == "kv":
            return sum(step.send for step in self.past_kv_steps(window)) * costs.kv_bytes
        if past_by == "queries":
            return _query_traffic(self.past_query_steps(window), self.new, self.rank, costs)
        return 0


@dataclass(frozen=True)
class PackedPlan:
    """Several texts extended in one pass: new tokens side by side, each after its own past."""

    texts: tuple[ExtendPlan, ...]

    @property
    def rank(self) -> int:
        return self.texts[0].rank

    @property
    def rows(self) -> list[slice]:
        """Where this rank's new tokens of each text are."""
        return side_by_side([token_count(text.own) for text in self.texts])

    @property
    def largest_new(self) -> int:
        """New tokens, of all texts, of the rank that has most."""
        shares = zip(*(map(token_count, text.new) for text in self.texts), strict=True)
        return max(sum(share) for share in shares)

    def new_steps(self, window: int | None = None) -> tuple[Step, ...]:
        """New queries against new KV of the same text, passing KV of all texts at once."""
        return _packed(self.texts, window)

    def bytes_sent(self, costs: Costs, window: int | None = None) -> int:
        """What this rank sends for one layer of this pass."""
        new = sum(step.send for step in self.new_steps(window)) * costs.kv_bytes
        return new + sum(text.past_bytes_sent(costs, window) for text in self.texts)


def largest_share(shares: tuple[Runs, ...]) -> int:
    """Tokens of the rank that has most: what a transfer buffer must hold."""
    return max(token_count(runs) for runs in shares)


@_remembered
def _clipped(past: tuple[Runs, ...], start: int) -> tuple[Runs, ...]:
    return tuple(clip(runs, start) for runs in past)


@_remembered
def _packed(texts: tuple[ExtendPlan, ...], window: int | None) -> tuple[Step, ...]:
    new = [text.new for text in texts]
    return packed_steps(texts[0].rank, new, new, [text.new_steps(window) for text in texts])


@_remembered
def _steps(
    rank: int, queries: tuple[Runs, ...], keys: tuple[Runs, ...], window: int | None
) -> tuple[Step, ...]:
    return ring_steps(rank, list(queries), list(keys), window)


@_remembered
def _query_steps(
    rank: int, new: tuple[Runs, ...], past: tuple[Runs, ...], window: int | None
) -> tuple[QueryStep, ...]:
    world = len(new)
    send, receive = (
        travels(holder % world, new, _reads(new, past, window)) for holder in (rank, rank - 1)
    )
    return tuple(
        QueryStep(
            owner=(rank - step) % world,
            send=send[step],
            receive=receive[step],
            tiles=tiles(new[(rank - step) % world], past[rank], window),
            returned=step > 0 and visible(new[rank], past[(rank + step) % world], window),
        )
        for step in range(world)
    )


def _reads(
    new: tuple[Runs, ...], past: tuple[Runs, ...], window: int | None
) -> Callable[[int, int], bool]:
    """Whether the queries of `owner` see any past key of `reader`."""
    return lambda owner, reader: visible(new[owner], past[reader], window)


@_remembered
def _past_traffic(
    new: tuple[Runs, ...], past: tuple[Runs, ...], costs: Costs, window: int | None
) -> tuple[int, int]:
    """Bytes that all ranks together send for the past: passing KV, passing queries."""
    reads, ranks = _reads(new, past, window), range(len(new))
    kv = sum(sum(travels(r, past, lambda source, reader: reads(reader, source))) for r in ranks)
    queries = sum(sum(travels(r, new, reads)) for r in ranks)
    returned = sum(
        token_count(new[owner]) for owner in ranks for r in ranks if r != owner and reads(owner, r)
    )
    passed = queries * costs.query_bytes + returned * costs.partial_bytes
    return kv * costs.kv_bytes, passed


def _query_traffic(
    steps: tuple[QueryStep, ...], new: tuple[Runs, ...], rank: int, costs: Costs
) -> int:
    passed = sum(step.send for step in steps) * costs.query_bytes
    returned = sum(
        token_count(new[step.owner]) for step in steps if step.tiles and step.owner != rank
    )
    return passed + returned * costs.partial_bytes
