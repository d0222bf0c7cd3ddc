"""Haystacks that fill a budget of tokens: whole units, then a piece of one more."""

from __future__ import annotations

from collections.abc import Callable

from ringstar.evaluation.samples import CountTokens, Draft, Prompt

# a cut in the middle of a word is made only where the budget asks for it
_LEFT_FREE = 0.005
# counts grow about evenly, so that a straight line finds the place; if not, halves do
_MOST_GUESSES = 12


class TooShort(ValueError):
    """A budget that not even an empty haystack fits; `least` tokens would be enough for that."""

    def __init__(self, least: int):
        super().__init__(f"at least {least} tokens are needed")
        self.least = least


def fill(draft: Draft, budget: int, count: CountTokens) -> tuple[Prompt, int]:
    """The longest prompt of at most `budget` tokens, and its tokens; raises TooShort.

    Counts need not grow evenly, or with every unit: what is returned was counted.
    """

    def whole(units: int) -> int:
        return count(draft.build(units, ""))

    least = whole(0)
    if least > budget:
        raise TooShort(least)
    units = _most_units(whole, budget, least)
    prompt = draft.build(units, _cut(draft, units, budget, count))
    return prompt, count(prompt)


def _most_units(tokens: Callable[[int], int], budget: int, least: int) -> int:
    """As many as fit; the row of units has no end."""
    low, below = 0, least
    high, above = 1, tokens(1)
    while above <= budget:
        low, below = high, above
        near = low + int(1.05 * (budget - below) * low / max(1, below - least)) + 1
        high = min(8 * low, near)
        above = tokens(high)
    return _last_that_fits(tokens, budget, (low, below), (high, above))


def _cut(draft: Draft, units: int, budget: int, count: CountTokens) -> str:
    """As much of the next unit as fits, to the end of a word if that leaves little room."""
    text = draft.tail(units)

    def tokens(characters: int) -> int:
        return count(draft.build(units, text[:characters]))

    every = tokens(len(text))
    if every <= budget:
        return text
    characters = _last_that_fits(tokens, budget, (0, tokens(0)), (len(text), every))
    words = text[:characters].rpartition(" ")[0]
    enough = budget * (1 - _LEFT_FREE) <= tokens(len(words)) <= budget
    return words if enough else text[:characters]


def _last_that_fits(
    tokens: Callable[[int], int], budget: int, fits: tuple[int, int], over: tuple[int, int]
) -> int:
    """A number whose tokens fit and the next one's do not; each end is a number and its tokens."""
    (low, below), (high, above) = fits, over
    guesses = 0
    while high - low > 1:
        on_line = low + (budget - below) * (high - low) // max(1, above - below)
        middle = on_line if guesses < _MOST_GUESSES else (low + high) // 2
        middle = min(max(middle, low + 1), high - 1)
        found, guesses = tokens(middle), guesses + 1
        if found <= budget:
            low, below = middle, found
        else:
            high, above = middle, found
    return low
