"""One rank's share of a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringstar.errors import UserError
from ringstar.paging import CacheFull, Needs, PagePool, ShardedCache
from ringstar.stowed import Place, Stowed
from seqpar import Runs, Span, before, joined


class TextShard:
    """What one rank holds of a text: a document, then for a while a question and its answer.

    `owned[r]` is what each rank r holds, as positions in its memory order, but for what layers
    with a window forgot.  `length` is that of the whole text, which some rotary embeddings
    depend on.
    """

    def __init__(self, world: int, pool: PagePool, length: int = 0):
        self.cache = ShardedCache(pool)
        self.tokens, self.length = 0, length
        self.owned: tuple[Runs, ...] = ((),) * world
        self._stowed: Stowed | None = None
        self.evicted = False
        self.keep()

    def span(self, tokens: int) -> Span:
        """So many new tokens, after all that is there."""
        return Span(self.tokens, self.tokens + tokens, self.owned)

    def grow(self, tokens: int, owned: Sequence[Runs]) -> None:
        """So many tokens more are encoded, of which each rank r keeps `owned[r]`."""
        self.tokens += tokens
        self.owned = tuple(_all_joined(*pair) for pair in zip(self.owned, owned, strict=True))

    def keep(self) -> None:
        """What is there now stays."""
        self._kept = (self.tokens, self.owned, self.cache.state)
        self._top: object = None
        self.ready = self.tokens  # the length up to which there is room

    def rewind(self) -> None:
        """Forget what came since the last `keep`."""
        self.tokens, self.owned, state = self._kept
        self.cache.truncate(state)
        self._top, self.ready = None, self.tokens

    def take_up(self, top: object, most: int) -> int:
        """How many tokens are there, those of `top` among them if it was the last to `leave`.

        Whatever else came since the last `keep` is forgotten; so are these if there are more than
        `most`, as after a turn that was interrupted, and unless `leave` is called again.
        """
        if top is None or self._top is not top or self.tokens > most:
            self.rewind()
        self._top = None
        return self.tokens

    def leave(self, top: object) -> None:
        """What is there stays for `top` to take up; with none it is forgotten."""
        if top is None:
            self.rewind()
        self._top = top

    # --- sharing

    def remembers(self, tokens: int) -> bool:
        """Whether another text can begin with its first `tokens`."""
        return self.cache.remembers(tokens)

    def fork(self, tokens: int, length: int = 0) -> TextShard:
        """Another text that begins with the first `tokens` of this one, and shares its pages."""
        made = TextShard(len(self.owned), self.cache.pool, length or self.length)
        made.cache, made.tokens = self.cache.fork(tokens), tokens
        made.owned = tuple(before(runs, tokens) for runs in self.owned)
        made.keep()
        return made

    def __deepcopy__(self, memo: dict) -> TextShard:
        try:
            with torch.inference_mode():  # scripts copy what ranks wrote in it
                return self.fork(self.tokens)
        except CacheFull as error:
            why = "is too few bytes for a copy of these tokens; drop texts, or give more"
            raise UserError("cache.max_bytes", self.cache.pool.limit, why) from error

    # --- making room for others

    @property
    def is_here(self) -> bool:
        """Whether its KV is in pages now."""
        return self._stowed is None and not self.evicted

    def evict(self) -> None:
        """Give all of its pages back; it can be used no more."""
        self.rewind()
        self.cache.release()
        self._stowed, self.evicted = None, True

    def copied_to(self, place: Place) -> Stowed:
        """A copy of its KV in `place`; raises OSError if there is no room for it."""
        self.rewind()
        return Stowed(self.cache, place)

    def stow(self, copy: Stowed) -> None:
        """Give its pages back: its KV is this copy now."""
        self._stowed = copy
        self.cache.release()

    def return_needs(self) -> Needs:
        """The pages that `bring_back` takes."""
        return self._stowed.needs(self.cache) if self._stowed else Needs()

    def bring_back(self, ahead: int) -> None:
        """Put KV that was stowed into pages again, with room for `ahead` tokens more."""
        if self._stowed is None:
            return
        try:
            self._stowed.restore(self.cache, ahead)
        except BaseException:  # the next try begins with empty pages
            self.cache.release()
            raise
        self._stowed = None


def _all_joined(runs: Runs, more: Runs) -> Runs:
    for run in more:
        runs = joined(runs, run)
    return runs
