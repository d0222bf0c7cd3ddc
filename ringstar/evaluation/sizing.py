"""Haystacks that fill a budget of tokens: whole units by binary search, then a piece of one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from ringstar.evaluation.samples import CountTokens, Draft, Prompt

# a cut in the middle of a word is made only where the budget asks for it
SLACK = 0.01


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
    units = _most(whole, budget)
    prompt = draft.build(units, _cut(draft, units, budget, count))
    return prompt, count(prompt)


def _most(tokens: Callable[[int], int], budget: int) -> int:
    """The most units that fit, looked for among few more than that."""
    high = 1
    while tokens(high) <= budget:
        high *= 2
    low = high // 2
    units = low + bisect_right(range(low, high), budget, key=tokens) - 1
    while units > 0 and tokens(units) > budget:
        units -= 1
    return max(units, 0)


def _cut(draft: Draft, units: int, budget: int, count: CountTokens) -> str:
    """As much of the next unit as fits, to the end of a word if that leaves little room."""
    text = draft.tail(units)

    def tokens(characters: int) -> int:
        return count(draft.build(units, text[:characters]))

    characters = max(0, bisect_right(range(len(text) + 1), budget, key=tokens) - 1)
    while characters and tokens(characters) > budget:
        characters -= 1
    words = text[:characters].rpartition(" ")[0]
    near = count(draft.build(units, words))
    enough = near <= budget and (near >= budget * (1 - SLACK / 2) or characters == len(words))
    return words if enough else text[:characters]
