"""One rank's share of a text."""

from __future__ import annotations

from collections.abc import Sequence

from ringstar.cache import ShardedCache
from seqpar import Runs, Span, joined


class TextShard:
    """What one rank holds of a text: a document, then for a while a question and its answer.

    `owned[r]` is what each rank r holds, as positions in its memory order, but for what layers
    with a window forgot.  `length` is that of the whole text, which some rotary embeddings
    depend on.
    """

    def __init__(self, world: int, length: int = 0):
        self.cache = ShardedCache()
        self.tokens, self.length = 0, length
        self.owned: tuple[Runs, ...] = ((),) * world
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

    def rewind(self) -> None:
        """Forget what came since the last `keep`."""
        self.tokens, self.owned, state = self._kept
        self.cache.truncate(state)
        self._top = None

    def take_up(self, top: object) -> int:
        """How many tokens are there, those of `top` among them if it was the last to `leave`.

        Whatever else came since the last `keep` is forgotten; so are these, unless `leave` is
        called again.
        """
        if top is None or self._top is not top:
            self.rewind()
        self._top = None
        return self.tokens

    def leave(self, top: object) -> None:
        """What is there stays for `top` to take up; with none it is forgotten."""
        if top is None:
            self.rewind()
        self._top = top


def _all_joined(runs: Runs, more: Runs) -> Runs:
    for run in more:
        runs = joined(runs, run)
    return runs
