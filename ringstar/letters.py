"""Text that no file can hold."""

from __future__ import annotations

import re

_HALVES = re.compile("[\ud800-\udfff]")


def has_half_letters(text: str) -> bool:
    """Whether it has one half of a surrogate pair alone: JSON may, UTF-8 cannot."""
    return _HALVES.search(text) is not None
