"""Which pages are free, and how many texts share the others: pure integers.

Pages are numbered; those of one slab follow one another, and lie so in memory.  Between two slabs
a number is left out, so that neighbours in number are always neighbours in memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter

from seqpar import Run


class Ledger:
    """The pages of one kind."""

    def __init__(self) -> None:
        self.slabs: dict[int, int] = {}  # the first page of each, and how many it has
        self._free: list[tuple[int, int]] = []  # (first, past the last), in order
        self._shared: Counter[int] = Counter()  # holders beyond the first
        self._next = 0

    @property
    def pages(self) -> int:
        """All that there are."""
        return sum(self.slabs.values())

    @property
    def free(self) -> int:
        return sum(stop - start for start, stop in self._free)

    def add_slab(self, pages: int) -> Run:
        """More pages, which are free."""
        slab = Run(self._next, self._next + pages)
        self._next += pages + 1
        self.slabs[slab.start] = pages
        self._free.append((slab.start, slab.stop))
        return slab

    def find(self, pages: int, after: int | None = None) -> Run | None:
        """So many free pages in a row: right after page `after`, or where they fit best."""
        places = [(start, stop) for start, stop in self._free if stop - start >= pages]
        if not places:
            return None
        start = next((start for start, _ in places if after is not None and start == after + 1), -1)
        if start < 0:
            start = min(places, key=lambda place: place[1] - place[0])[0]
        return Run(start, start + pages)

    def follows(self, page: int) -> int:
        """How many free pages there are right after this one."""
        return next((stop - start for start, stop in self._free if start == page + 1), 0)

    def largest(self) -> Run:
        """The longest row of free pages; there are some."""
        return Run(*max(self._free, key=lambda place: place[1] - place[0]))

    def take(self, pages: Run) -> Run:
        """These pages, which are free, are held from now on."""
        index = bisect_left(self._free, (pages.start + 1, 0)) - 1
        start, stop = self._free.pop(index)
        assert start <= pages.start and pages.stop <= stop, "pages that are not free"
        for rest in ((start, pages.start), (pages.stop, stop)):
            if rest[0] < rest[1]:
                insort(self._free, rest)
        return pages

    def share(self, pages: Run) -> None:
        """One more text holds these."""
        self._shared.update(pages)

    def is_shared(self, page: int) -> bool:
        return page in self._shared

    def release(self, pages: Run) -> list[int]:
        """A text holds these no longer; the slabs that nobody holds a page of, which are gone."""
        for page in pages:
            if page not in self._shared:
                self._set_free(page)
            elif self._shared[page] == 1:
                del self._shared[page]
            else:
                self._shared[page] -= 1
        return self._drop_empty()

    def _set_free(self, page: int) -> None:
        """Merge it with what is free on either side."""
        index = bisect_left(self._free, (page, 0))
        start, stop = page, page + 1
        if index < len(self._free) and self._free[index][0] == stop:
            stop = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            start = self._free.pop(index - 1)[0]
        insort(self._free, (start, stop))

    def _drop_empty(self) -> list[int]:
        empty = [
            (start, stop) for start, stop in self._free if self.slabs.get(start) == stop - start
        ]
        for start, stop in empty:
            self._free.remove((start, stop))
            del self.slabs[start]
        return [start for start, _ in empty]
