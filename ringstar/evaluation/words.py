"""English words for keys and word lists, from the package `wonderwords`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from random import Random

PACKAGE = "wonderwords"


@dataclass(frozen=True, slots=True)
class Words:
    """Sorted lists of lower-case words, and where they come from."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    source: str

    def pair(self, draw: Random) -> str:
        """An adjective and a noun, as `brave-kettle`."""
        return f"{draw.choice(self.adjectives)}-{draw.choice(self.nouns)}"

    def distinct(self, draw: Random) -> Iterator[str]:
        """Every word once, in random order; then pairs, for as long as somebody asks."""
        pool = sorted({*self.adjectives, *self.nouns, *self.verbs})
        yield from draw.sample(pool, len(pool))
        seen: set[str] = set()
        while True:
            pair = self.pair(draw)
            if pair not in seen:
                seen.add(pair)
                yield pair


def read_words() -> Words:
    """The package's lists without what is rude or no single word."""
    from wonderwords import RandomWord, filter_profanity

    package = RandomWord()

    def of(kind: str) -> tuple[str, ...]:
        polite = filter_profanity(package.filter(include_categories=[kind]))
        return tuple(sorted({word for word in polite if re.fullmatch("[a-z]+", word)}))

    return Words(of("adjective"), of("noun"), of("verb"), f"{PACKAGE} {version(PACKAGE)}")
