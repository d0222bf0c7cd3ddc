"""This result beside an earlier one: what became slower?

Times of another run on a CPU mean little by themselves.  There each is taken as a multiple of a
peer's in the same run, and multiples are compared; on the same kind of GPU times are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launch.bench.cells import Key
from launch.bench.plan import Plan, own_device
from launch.bench.result import REFERENCES, Row, by_key, reference_of
from ringstar.errors import UserError
from ringstar.models import ModelFiles, choose_dtype

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


def read_earlier(plan: Plan, files: ModelFiles) -> dict[str, Any] | None:
    """The result to compare with, if one is asked for; raises UserError if nothing could be."""
    path, bench = plan.config.bench.against, plan.config.bench
    if path is None:
        return None
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        then = by_key(found)
        beside = [found[name] for name in ("model", "dtype", "new_tokens", "question_tokens")]
        device = found["device"]
        assert all(row.keys() >= {"transport", *_SHOWN} for row in then.values())
        assert all(row[name] > 0 for row in then.values() for name in _SHOWN)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(_KEY, path, f"cannot be read: {error}") from error
    except (TypeError, KeyError, AssertionError) as error:
        raise UserError(_KEY, path, "is no result of launch.bench (its output.path)") from error
    dtype, _ = choose_dtype(plan.config.model, files.config, own_device())
    here = [files.name, str(dtype).removeprefix("torch."), bench.new_tokens]
    for was, now in zip(beside, [*here, bench.question_tokens], strict=True):
        if was != now:
            raise UserError(_KEY, path, f"was measured with {was}, and this is with {now}")
    if (device == "cpu") != (own_device().type == "cpu"):
        raise UserError(_KEY, path, f"was measured on {device}, and this is another kind")
    here_is = own_device()
    same = here_is.type != "cpu" and torch.cuda.get_device_name(here_is) == device
    _check_common(plan, then, same)
    return found


def _check_common(plan: Plan, then: Mapping[Key, Row], absolute: bool) -> None:
    now = {(who, world, load.length, load.batch) for who, world, load in plan.cells()}
    both = now & then.keys()
    path = plan.config.bench.against
    ours = [key for key in both if key[0] not in REFERENCES]
    if not ours:
        raise UserError(_KEY, path, "has none of these cells")
    if not absolute and not any(reference_of(key, both) for key in ours):
        where = "on a CPU" if own_device().type == "cpu" else "on another GPU"
        who = ", ".join(REFERENCES)
        raise UserError(_KEY, path, f"{where} both need a peer with the same load: one of {who}")


def lost(plan: Plan, now: Mapping[str, Any], then: Mapping[str, Any]) -> list[Key]:
    """Cells of ours that had times before, and now have none."""
    every = {(who, world, load.length, load.batch) for who, world, load in plan.cells()}
    gone = every & by_key(then).keys() - by_key(now).keys()
    return sorted(key for key in gone if key[0] not in REFERENCES)


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
        if key[1] > 1 and now[key]["transport"] != then[key]["transport"]:
            continue
        for name, what in _SHOWN.items():
            times = now[key][name] / then[key][name]
            if not absolute and peer is not None:
                times /= now[peer][name] / then[peer][name]
            yield Change(*key, what, times)
