"""All KV that one rank has of one text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from localflash import KV
from ringstar.paging.pool import PagePool
from ringstar.paging.table import PageTable
from seqpar import Runs, clip, token_count

# what `truncate` goes back to
State = dict[int | None, Runs]
# pages, by the window of the layers that they are for
Needs = Counter[int | None]
# what a pass keeps, and the position before which all is encoded after it
Kept = tuple[Runs, int]


class ShardedCache:
    """The KV that this rank owns of a text, for each window that layers have.

    A layer with a sliding window needs only what the window still shows, so that its list of
    positions is not that of others.
    """

    def __init__(self, pool: PagePool):
        self.pool = pool
        self._tables = {window: PageTable(group) for window, group in pool.groups.items()}

    def of(self, window: int | None) -> PageTable:
        """What layers with this window hold."""
        return self._tables[window]

    # --- growing

    def needs(self, tokens: int) -> Needs:
        """Pages for so many tokens more in every layer."""
        return Needs({window: table.needs(tokens) for window, table in self._tables.items()})

    def encode_needs(self, passes: Sequence[Kept]) -> Needs:
        """Pages for these passes, with windows forgetting between them."""
        needs = Needs()
        for window, table in self._tables.items():
            most, after = _most(table.runs, window, passes)
            needs[window] = table.needs(most) + table.group.pages(after)
        return needs

    def reserve(self, tokens: int, ahead: int = 0) -> None:
        """Room for so many tokens more in every layer, with `ahead` after them in the same row."""
        for table in self._tables.values():
            table.reserve(tokens, ahead)

    def reserve_encode(self, passes: Sequence[Kept], ahead: int) -> None:
        """Room for these passes, with `ahead` more in the same row."""
        for window, table in self._tables.items():
            most, after = _most(table.runs, window, passes)
            table.reserve(most, ahead + after)

    def append(self, runs: Runs) -> None:
        """Add the positions `runs` in every layer, for the pass that begins."""
        for table in self._tables.values():
            table.append(runs)

    # --- shrinking

    def forget(self, position: int) -> None:
        """Drop what no query at `position` or later will see."""
        for window, table in self._tables.items():
            if window is not None:
                table.drop_before(position - window + 1)

    def settle(self, ahead: int) -> None:
        """Give back what was reserved in vain, and memory that windows no longer need."""
        for window, table in self._tables.items():
            table.trim()
            if window is not None:
                table.compact(ahead)

    def truncate(self, state: State) -> None:
        """Forget what was appended since."""
        for window, table in self._tables.items():
            table.truncate(state[window])

    def release(self) -> None:
        """Give all pages back."""
        for table in self._tables.values():
            table.release()

    def restore(self, window: int | None, runs: Runs, forgotten: int, ahead: int) -> PageTable:
        """Layers with this window, empty until now, for KV at `runs` that is about to be written.

        There is room for `ahead` more in the same row.
        """
        table = self._tables[window]
        table.reserve(token_count(runs), ahead)
        table.append(runs)
        table.forgotten = forgotten
        return table

    # --- reading

    @property
    def state(self) -> State:
        """What `truncate` goes back to."""
        return {window: table.runs for window, table in self._tables.items()}

    @property
    def layers(self) -> dict[int | None, tuple[int, ...]]:
        """The layers of each window."""
        return {window: table.layers for window, table in self._tables.items()}

    def all_layers(self) -> Iterator[tuple[int | None, int, KV]]:
        """The window and the KV of every layer, without a copy."""
        for window, table in self._tables.items():
            for layer in table.layers:
                yield window, layer, table.view(layer, 0, table.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the KV that is held."""
        return sum(table.nbytes for table in self._tables.values())

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the pages that it lies in, shared ones among them."""
        return sum(table.allocated_nbytes for table in self._tables.values())

    # --- sharing

    def remembers(self, position: int) -> bool:
        """Whether all that tokens from `position` on see is still here."""
        return all(
            window is None or table.forgotten <= max(0, position - window + 1)
            for window, table in self._tables.items()
        )

    def fork(self, below: int) -> ShardedCache:
        """What another text has that begins like this one; see `PageTable.fork`."""
        made = ShardedCache(self.pool)
        made._tables = {window: table.fork(below) for window, table in self._tables.items()}
        return made

    def fork_needs(self, below: int) -> Needs:
        """The pages that `fork` would take."""
        return Needs({window: table.fork_needs(below) for window, table in self._tables.items()})


def _most(runs: Runs, window: int | None, passes: Sequence[Kept]) -> tuple[int, int]:
    """Tokens beyond the present ones that are held at most, and the most held after a pass.

    What is held after a pass is moved to other pages if a window left gaps in it.
    """
    present, most, after = token_count(runs), 0, 0
    for kept, encoded in passes:
        runs = (*runs, *kept)
        most = max(most, token_count(runs))
        if window is not None:
            runs = clip(runs, encoded - window + 1)
            after = max(after, token_count(runs))
    return max(0, most - present), after
