"""Pages of KV in slabs, within a budget of bytes.

A slab is one piece of memory for each layer, in which neighbouring pages are neighbouring tokens:
what lies in one row of pages is read as a view, never gathered.  Slabs are made when they are
needed and given back when no text has a page in them.

Source of pages, block tables and copy-on-write: Kwon et al., arXiv 2309.06180, section 4.

B batch (1), T tokens, K key/value heads, D head dim.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
from torch import Tensor

from localflash import KV, DenseKV, quantise
from ringstar.models import LayerShape, Shapes
from ringstar.paging.ledger import Ledger
from ringstar.paging.rounding import Rounding
from seqpar import Run, token_count


class CacheFull(Exception):
    """There is no room for more pages within the budget."""


@dataclass
class Budget:
    """Bytes that the slabs of one rank may take in all; `limit` None: any."""

    limit: int | None = None
    used: int = 0
    # weakly: each refers to this, and memory must go with the last of its users
    groups: WeakSet[PageGroup] = field(default_factory=WeakSet)

    @property
    def left(self) -> int:
        return 1 << 62 if self.limit is None else self.limit - self.used

    def spare(self, group: PageGroup) -> int:
        """What is left for this group if the others get what was planned for them."""
        return self.left - sum(each.awaited_nbytes for each in self.groups if each is not group)


@dataclass(frozen=True)
class Storage:
    """How KV is kept, read and sent: in the model's dtype, or quantised.

    `kind` is None, or `torch.int8` or `torch.float8_e4m3fn`, with a scale for each token and head.
    """

    dtype: torch.dtype
    device: torch.device
    kind: torch.dtype | None = None

    def packed(self, k_BTKD: Tensor, v_BTKD: Tensor) -> KV:
        """New KV in this form."""
        if self.kind is None:
            return DenseKV(k_BTKD, v_BTKD)
        return quantise(k_BTKD, v_BTKD, self.kind)

    def room(self, shape: LayerShape, tokens: int) -> KV:
        """Memory for so many tokens of a layer."""
        none = [torch.empty(1, 0, shape.kv_heads, dim, dtype=self.dtype) for dim in shape.dims]
        like = self.packed(*none)
        return like.of(tuple(self._room(tensor, tokens) for tensor in like.tensors))

    def token_bytes(self, shape: LayerShape) -> int:
        """Of one token of a layer."""
        one = [torch.empty(1, 1, shape.kv_heads, dim, dtype=self.dtype) for dim in shape.dims]
        return self.packed(*one).nbytes

    def _room(self, like: Tensor, tokens: int) -> Tensor:
        """In shape (1, T, K, ...); on a CPU in memory (1, K, T, ...)."""
        order = [0, 2, 1, 3] if self._heads_first else [0, 1, 2, 3]
        return torch.empty_permuted(
            (1, tokens, *like.shape[2:]),
            order[: like.ndim],
            dtype=like.dtype,
            device=self.device,
        )

    @property
    def _heads_first(self) -> bool:
        # The CPU's kernel reads head after head: attention of one token over 4,080 others (3 KV
        # heads of 64 float32, one thread) takes 0.57 of the time if a head lies in one piece; that
        # of many tokens takes the same. What gloo sends is gathered then, which is little beside
        # what a CPU computes with it. NCCL sends from where KV lies.
        return self.device.type == "cpu"


@dataclass(frozen=True)
class Slab:
    """Memory of pages from number `first` on, for each layer."""

    first: int
    layers: dict[int, KV]


class PageGroup:
    """The pages of the layers that have one window.

    A page has room for `page_tokens` tokens in each of these layers.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], page_tokens: int, storage: Storage, budget: Budget
    ):
        self.shapes, self.page_tokens = shapes, page_tokens
        self.token_bytes = sum(map(storage.token_bytes, shapes))
        self.page_bytes = page_tokens * self.token_bytes
        self.ledger = Ledger()
        self._storage, self._budget = storage, budget
        self._planned = 0  # pages that there will be, taken or free
        budget.groups.add(self)
        self._slabs: list[Slab] = []
        # pages of texts that nobody has any more: these may die in any thread
        self._orphans: deque[list[Run]] = deque()

    def pages(self, tokens: int) -> int:
        """How many hold so many tokens."""
        return -(-tokens // self.page_tokens)

    def plan(self, pages: int) -> None:
        """So many will be taken next, and nothing else before them."""
        self._planned = self.ledger.pages - self.ledger.free + pages

    @property
    def awaited_nbytes(self) -> int:
        """Bytes that slabs are still to take for what was planned."""
        return max(0, self._planned - self.ledger.pages) * self.page_bytes

    def take(self, pages: int, after: int | None = None, ahead: int = 0) -> list[Run]:
        """So many pages, in one row if that can be, best right after page `after`.

        `ahead` more will be wanted in that row later.  Raises CacheFull.
        """
        self.settle()
        taken = self._following(after, pages) if after is not None else []
        pages -= token_count(tuple(taken))
        if not pages:
            return taken
        place = self.ledger.find(pages + ahead) or self._spare_slab(pages, ahead)
        place = place or self.ledger.find(pages)
        if place is not None:
            return [*taken, self.ledger.take(Run(place.start, place.start + pages))]
        try:
            return taken + self._fragments(pages)
        except CacheFull:
            self.release(taken)
            raise

    def fresh(self, pages: int, ahead: int) -> Run | None:
        """So many pages in a new slab, with `ahead` free ones after them; None if over budget."""
        slab = self._spare_slab(pages + ahead, 0)
        return None if slab is None else self.ledger.take(Run(slab.start, slab.start + pages))

    def lacking(self, pages: int) -> int:
        """How many of so many pages would need new memory."""
        self.settle()
        return max(0, pages - self.ledger.free)

    def share(self, pages: Sequence[Run]) -> None:
        """One more text has these."""
        for run in pages:
            self.ledger.share(run)

    def release(self, pages: Sequence[Run]) -> None:
        """A text has these no longer; memory in which nobody has any is given back."""
        before = self.ledger.pages
        for run in pages:
            gone = self.ledger.release(run)
            self._slabs = [slab for slab in self._slabs if slab.first not in gone]
        self._budget.used -= (before - self.ledger.pages) * self.page_bytes

    def bury(self, pages: list[Run]) -> None:
        """A text is gone that had these; safe in any thread, and at any time."""
        if pages:
            self._orphans.append(pages)

    def settle(self) -> None:
        """Take back what texts had that are gone."""
        while self._orphans:
            self.release(self._orphans.popleft())

    def kv(self, layer: int, slots: Run) -> KV:
        """The tokens at these places of one slab, without a copy."""
        if not len(slots):
            return self._storage.room(next(s for s in self.shapes if s.layer == layer), 0)
        page = slots.start // self.page_tokens
        index = bisect_right(self._slabs, page, key=lambda slab: slab.first) - 1
        slab = self._slabs[index]
        first = slab.first * self.page_tokens
        return slab.layers[layer].slice(slots.start - first, slots.stop - first)

    def _following(self, page: int, pages: int) -> list[Run]:
        """As many of so many pages as are free right after this one."""
        free = min(pages, self.ledger.follows(page))
        return [self.ledger.take(Run(page + 1, page + 1 + free))] if free else []

    def _spare_slab(self, pages: int, ahead: int) -> Run | None:
        """Memory for so many pages, and as many of those `ahead` as the budget has to spare."""
        affordable = self._budget.spare(self) // self.page_bytes
        return self._add_slab(min(pages + ahead, affordable)) if affordable >= pages else None

    def _add_slab(self, pages: int) -> Run:
        tokens = pages * self.page_tokens
        layers = {shape.layer: self._storage.room(shape, tokens) for shape in self.shapes}
        slab = self.ledger.add_slab(pages)  # once there is memory for it
        self._slabs.append(Slab(slab.start, layers))
        self._budget.used += len(slab) * self.page_bytes
        return slab

    def _fragments(self, pages: int) -> list[Run]:
        """Pages from wherever some are free, and from what memory is left."""
        missing = pages - self.ledger.free
        if missing > 0:
            needed, left = missing * self.page_bytes, self._budget.left
            if needed > left:
                raise CacheFull(f"{needed:,} bytes of KV more are needed, {left:,} are left")
            self._add_slab(missing)
        taken: list[Run] = []
        while pages:
            place = self.ledger.largest()
            taken.append(self.ledger.take(Run(place.start, min(place.stop, place.start + pages))))
            pages -= len(taken[-1])
        return taken


class PagePool:
    """All pages of one rank, by the window of the layers that they are for."""

    def __init__(
        self, shapes: Shapes, storage: Storage, page_tokens: int, limit: int | None = None
    ):
        self.storage, self.rounding, self._budget = storage, Rounding(), Budget(limit)
        self.groups = {
            window: PageGroup(each, page_tokens, storage, self._budget)
            for window, each in shapes.items()
        }

    @property
    def limit(self) -> int | None:
        """Bytes that all slabs may take."""
        return self._budget.limit

    def missing(self, pages: Mapping[int | None, int]) -> int:
        """Bytes over the budget that so many pages more would take; 0: there is room."""
        lacking = sum(
            group.lacking(pages.get(window, 0)) * group.page_bytes
            for window, group in self.groups.items()
        )
        return max(0, lacking - self._budget.left) if lacking else 0

    def plan(self, pages: Mapping[int | None, int]) -> None:
        """So many will be taken next: no window's layers get what others will need."""
        for window, group in self.groups.items():
            group.plan(pages.get(window, 0))

    def settle(self) -> None:
        """Take back what texts had that are gone."""
        for group in self.groups.values():
            group.settle()

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of all slabs, with the pages in them that are free."""
        self.settle()
        return self._budget.used

    @property
    def free_nbytes(self) -> int:
        """Bytes of the pages in slabs that no text has."""
        return sum(group.ledger.free * group.page_bytes for group in self.groups.values())
