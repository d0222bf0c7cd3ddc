"""RULER's scores of an answer, from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ringstar.evaluation.samples import Match

_CONTROL = re.compile("[\x00-\x1f]")


def score(answer: str, references: Sequence[str], match: Match) -> float:
    """`all`: the share of references that the answer holds; `part`: 1 if it holds any.

    Case does not count, and control characters are taken for newlines.
    """
    said = _CONTROL.sub("\n", answer).lower()
    held = [reference.lower() in said for reference in references]
    return float(any(held)) if match == "part" else sum(held) / len(held)
