"""Lists that users write in one text, as `1K, 4K`."""

from __future__ import annotations

import re

from ringstar.config import token_size
from ringstar.errors import UserError


def listed(text: str) -> list[str]:
    """The words of a list with commas or spaces between them."""
    return [word for word in re.split(r"[,\s]+", text) if word]


def read_sizes(key: str, text: str, what: str = "numbers", example: str = "1,2,4") -> list[int]:
    """Numbers above 0 in ascending order, each once; raises UserError, naming the option `key`."""
    try:
        found = {token_size(word) for word in listed(text)}
    except ValueError:
        found = set()
    if not found or min(found) <= 0:
        raise UserError(key, text, f"allowed: {what} above 0, as {example}")
    return sorted(found)


def read_lengths(key: str, text: str) -> list[int]:
    """Numbers of tokens, as `1K,4K`; raises UserError, naming the option `key`."""
    return read_sizes(key, text, "numbers of tokens", "1K,4K,7K")
