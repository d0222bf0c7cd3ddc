"""Where the tokens of one text are, in layers of one window: its block table."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

from localflash import KV, joined_kv
from ringstar.paging.pool import PageGroup
from seqpar import Run, Runs, clip, joined, token_count


class PageTable:
    """KV in memory order, and the positions that it stands for.

    Tokens are reserved with their positions (`append`), written layer by layer as a forward pass
    reaches each (`write`), and may be given back from either end (`truncate`, `drop_before`).
    Full pages may be shared with other texts (`fork`); a page that is shared is never written.
    """

    def __init__(self, group: PageGroup):
        self.runs: Runs = ()
        self.tokens = 0
        self.at = 0  # where the tokens of the last `append` begin
        self.forgotten = 0  # positions before it may be missing
        self.group = group
        self._skip = 0  # tokens of the first page that are forgotten
        self._pages: list[Run] = []  # in order: those of the tokens, then what is reserved
        weakref.finalize(self, group.bury, self._pages).atexit = False

    # --- growing

    def needs(self, tokens: int) -> int:
        """The pages that `reserve` would take for so many tokens more, and a tail to copy."""
        more = self.group.pages(self._used + tokens) - self._held
        return max(0, more) + self._tail_is_shared()

    def reserve(self, tokens: int, ahead: int = 0) -> None:
        """Make room for so many tokens more, best in one row, and with `ahead` after them.

        Raises CacheFull.
        """
        missing = self.group.pages(self._used + tokens) - self._held
        if missing > 0:
            after = self._pages[-1].last if self._pages else None
            self._add(self.group.take(missing, after, self.group.pages(ahead)))

    def lacks(self, tokens: int) -> bool:
        """Whether there is no room for so many more."""
        return self.group.pages(self._used + tokens) > self._held

    def append(self, runs: Runs) -> int:
        """Reserve the positions `runs`; returns the index where they will be written."""
        self.at, new = self.tokens, token_count(runs)
        if new:
            self._own_tail()
            self.reserve(new)
        for run in runs:
            self.runs = joined(self.runs, run)
        self.tokens += new
        return self.at

    def write(self, layer: int, at: int, kv: KV) -> None:
        """Store the KV of the tokens from index `at` on."""
        written = 0
        for slots in self._slots(at, at + kv.tokens):
            part = kv.slice(written, written + len(slots))
            room = self.group.kv(layer, slots)
            for place, tensor in zip(room.tensors, part.tensors, strict=True):
                place.copy_(tensor)
            written += len(slots)

    # --- shrinking

    def truncate(self, runs: Runs) -> None:
        """Go back to an earlier state, whose `runs` were a beginning of the present ones."""
        self.runs, self.tokens = runs, token_count(runs)
        self.trim()

    def trim(self) -> None:
        """Give back the pages that are reserved but not used."""
        self._skip = self._skip if self.tokens else 0
        self._keep_pages(0, self.group.pages(self._used) if self.tokens else 0)

    def drop_before(self, position: int) -> None:
        """Forget all positions before; the others keep their order, from index 0 on.

        Where these lie at the end, nothing is moved; else they are, to other pages: raises
        CacheFull if there are none.
        """
        self.forgotten = max(self.forgotten, position)
        kept = _from(self.runs, position)
        count = _count(kept)
        if count == self.tokens:
            return
        gone = self.tokens - count
        if count and kept[0].start < gone:  # there are gaps
            self._move(kept, self.group.take(self.group.pages(count)))
        else:
            whole = (self._skip + gone) // self.group.page_tokens
            self._skip = (self._skip + gone) % self.group.page_tokens
            self._keep_pages(whole, self._held)
        self.runs, self.tokens = clip(self.runs, position), count

    def compact(self, ahead: int) -> None:
        """Move to memory of its own, with room for `ahead` more, where much would be freed.

        It stays where it is if the budget has no room for both.
        """
        wanted = self.group.pages(self.tokens), self.group.pages(ahead)
        if self.group.ledger.free <= wanted[1] or not self.tokens:
            return
        fresh = self.group.fresh(*wanted)
        if fresh is not None:
            self._move([slice(0, self.tokens)], [fresh])

    def release(self) -> None:
        """Give everything back."""
        self.runs, self.tokens, self._skip = (), 0, 0
        self.trim()

    # --- reading

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(shape.layer for shape in self.group.shapes)

    def view(self, layer: int, start: int, stop: int) -> KV:
        """Tokens [start, stop) of `layer`: one piece where they lie in one row; never a copy."""
        rows = self._slots(start, stop) or [Run(0, 0)]
        return joined_kv([self.group.kv(layer, slots) for slots in rows])

    @property
    def nbytes(self) -> int:
        """Bytes of the KV that is held."""
        return self.tokens * self.group.token_bytes

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the pages that it has, shared or not."""
        return self._held * self.group.page_bytes

    @property
    def pages(self) -> tuple[int, ...]:
        """The number of each page, in order."""
        return tuple(page for run in self._pages for page in run)

    # --- sharing

    def fork(self, below: int) -> PageTable:
        """Another text that begins with the positions of this one before `below`, in this order.

        Pages that are full of its first tokens are shared; what follows is copied.  Raises
        CacheFull.
        """
        made, parts = PageTable(self.group), _until(self.runs, below)
        made.forgotten = self.forgotten
        whole, rest = self._shareable(parts)
        if whole:
            made._skip = self._skip
            made._add(_cut(self._pages, 0, whole))
            self.group.share(made._pages)
            made.tokens = whole * self.group.page_tokens - self._skip
            made.runs = _runs_of(self.runs, slice(0, made.tokens))
        at = made.append(tuple(run for part in rest for run in _runs_of(self.runs, part)))
        made._copy(self, rest, at)
        return made

    def fork_needs(self, below: int) -> int:
        """The pages that `fork` would take."""
        return self.group.pages(_count(self._shareable(_until(self.runs, below))[1]))

    def _shareable(self, parts: Sequence[slice]) -> tuple[int, list[slice]]:
        """How many pages are full of the first tokens of `parts`, and which tokens come after."""
        page, first = self.group.page_tokens, parts[0] if parts else slice(0, 0)
        whole = (self._skip + first.stop) // page if first.start == 0 else 0
        shared = max(0, whole * page - self._skip)
        rest = [slice(max(part.start, shared), part.stop) for part in parts]
        return whole if shared else 0, [part for part in rest if part.start < part.stop]

    # --- pages

    @property
    def _held(self) -> int:
        return token_count(tuple(self._pages))

    @property
    def _used(self) -> int:
        """Places from the beginning of the first page to the end of the tokens."""
        return self._skip + self.tokens

    def _slots(self, start: int, stop: int) -> list[Run]:
        """Where tokens [start, stop) are, as numbers of places: page by page, rows in one."""
        page = self.group.page_tokens
        whole = [Run(run.start * page, run.stop * page) for run in self._pages]
        return _cut(whole, start + self._skip, stop + self._skip)

    def _add(self, pages: Sequence[Run]) -> None:
        for run in pages:
            last = self._pages[-1] if self._pages else None
            if last is not None and last.stop == run.start:
                self._pages[-1] = Run(last.start, run.stop)
            else:
                self._pages.append(run)

    def _keep_pages(self, start: int, stop: int) -> None:
        gone = [*_cut(self._pages, 0, start), *_cut(self._pages, stop, self._held)]
        self._pages[:] = _cut(self._pages, start, stop)
        self.group.release(gone)

    def _move(self, kept: Sequence[slice], pages: Sequence[Run]) -> None:
        """Copy these tokens to other pages, and give the old ones back."""
        moved = PageTable(self.group)
        moved._add(pages)
        moved._copy(self, kept, 0)
        old = list(self._pages)
        self._pages[:], self._skip = moved._pages, 0
        moved._pages.clear()
        self.group.release(old)

    def _copy(self, other: PageTable, parts: Sequence[slice], at: int) -> None:
        """Write these tokens of another text from index `at` on."""
        for layer in self.layers if parts else ():
            start = at
            for part in parts:
                piece = other.view(layer, part.start, part.stop)
                self.write(layer, start, piece)
                start += piece.tokens

    def _tail_is_shared(self) -> bool:
        """Whether the next token would go to a page that others read."""
        page, used = self.group.page_tokens, self._used
        if used % page == 0 or not self.tokens:
            return False
        (tail,) = _cut(self._pages, used // page, used // page + 1)
        return self.group.ledger.is_shared(tail.start)

    def _own_tail(self) -> None:
        """Copy the page that the next token goes to, if it is shared: copy on write."""
        if not self._tail_is_shared():
            return
        page = self.group.page_tokens
        index = self._used // page
        (new,) = self.group.take(1)
        (old,) = _cut(self._pages, index, index + 1)
        for layer in self.layers:
            source, target = (
                self.group.kv(layer, Run(run.start * page, run.stop * page)) for run in (old, new)
            )
            for place, tensor in zip(target.tensors, source.tensors, strict=True):
                place.copy_(tensor)
        before, after = _cut(self._pages, 0, index), _cut(self._pages, index + 1, self._held)
        self._pages.clear()
        self._add([*before, new, *after])
        self.group.release([old])


def _count(parts: Sequence[slice]) -> int:
    return sum(part.stop - part.start for part in parts)


def _cut(runs: Sequence[Run], start: int, stop: int) -> list[Run]:
    """Items [start, stop) of runs of neighbouring numbers, counted over all of them."""
    found, at = [], 0
    for run in runs:
        first, last = max(start, at), min(stop, at + len(run))
        if first < last:
            found.append(Run(run.start + first - at, run.start + last - at))
        at += len(run)
    return found


def _places(runs: Runs) -> Iterator[tuple[Run, int]]:
    """Each run, and where it begins in memory order."""
    at = 0
    for run in runs:
        yield run, at
        at += len(run)


def _from(runs: Runs, position: int) -> list[slice]:
    """Where, in memory order, the positions from `position` on are: the end of each run."""
    return _neighbours(
        slice(at + gone, at + len(run))
        for run, at in _places(runs)
        for gone in (min(len(run), max(0, -(-(position - run.start) // run.step))),)
    )


def _until(runs: Runs, position: int) -> list[slice]:
    """Where, in memory order, the positions before `position` are: the beginning of each run."""
    return _neighbours(
        slice(at, at + min(len(run), max(0, -(-(position - run.start) // run.step))))
        for run, at in _places(runs)
    )


def _neighbours(parts: Iterator[slice]) -> list[slice]:
    """Slices that are not empty; those that touch are one."""
    found: list[slice] = []
    for part in parts:
        if part.start == part.stop:
            continue
        if found and found[-1].stop == part.start:
            found[-1] = slice(found[-1].start, part.stop)
        else:
            found.append(part)
    return found


def _runs_of(runs: Runs, part: slice) -> Runs:
    """The positions at these places in memory order."""
    found = []
    for run, at in _places(runs):
        first, last = max(part.start, at) - at, min(part.stop, at + len(run)) - at
        if first < last:
            start = run.start + first * run.step
            found.append(Run(start, start + (last - first - 1) * run.step + 1, run.step))
    return tuple(found)
