"""This result beside an earlier one: what became slower?

Times of another run on a CPU mean little by themselves.  There each is taken as a multiple of a
peer's in the same run, and multiples are compared; on the same kind of GPU times are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.bench.cells import Key
from launch.bench.result import REFERENCES, Row, by_key, reference_of
from ringstar.config import BenchConfig
from ringstar.errors import UserError
from ringstar.models import ModelFiles

_KEY = "bench.against"
_SHOWN = {"median_ttft_ms": "TTFT", "median_tpot_ms": "TPOT"}


@dataclass(frozen=True, slots=True)
class Change:
    """How many times as long something takes as it did."""

    contender: str
    world: int
    length: int
    batch: int
    what: str
    times: float


def read_earlier(config: BenchConfig, files: ModelFiles) -> dict[str, Any] | None:
    """The result to compare with, if one is asked for; raises UserError."""
    path = config.bench.against
    if path is None:
        return None
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(_KEY, path, f"cannot be read: {error}") from error
    if not isinstance(found, dict) or not {"model", "device", "cells"} <= found.keys():
        raise UserError(_KEY, path, "is no result of launch.bench (its output.path)")
    if found["model"] != files.folder.name:
        why = f"measured {found['model']}, and this model is {files.folder.name}"
        raise UserError(_KEY, path, why)
    return found


def changes(now: dict[str, Any], then: dict[str, Any]) -> tuple[list[Change], str]:
    """Of every cell that both have, and in what they are counted; peers are only a measure."""
    absolute = now["device"] == then["device"] and now["device"] != "cpu"
    how = f"times on {now['device']}" if absolute else "multiples of a peer's times in each run"
    found = list(_changes(by_key(now), by_key(then), absolute))
    return found, how


def _changes(now: dict[Key, Row], then: dict[Key, Row], absolute: bool) -> Iterator[Change]:
    both = now.keys() & then.keys()
    for key in sorted(both):
        peer = reference_of(key, both)
        if key[0] in REFERENCES or not (absolute or peer):
            continue
        for name, what in _SHOWN.items():
            times = now[key][name] / then[key][name]
            if not absolute and peer is not None:
                times /= now[peer][name] / then[peer][name]
            yield Change(*key, what, times)
