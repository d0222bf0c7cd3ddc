"""What was measured, summed up in the names that `vllm bench serve` made familiar."""

from __future__ import annotations

import shlex
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from launch.bench.cells import (
    AttentionTimes,
    Ceilings,
    Key,
    Line,
    Measured,
    all_attention,
    all_rounds,
    highest,
)
from launch.bench.peers import PEERS
from launch.bench.plan import Plan, own_device, request_of
from launch.circumstances import circumstances
from ringstar.config import StarConfig
from ringstar.models import ModelFiles, choose_dtype

Row = dict[str, Any]
# whom others are compared with, where it was measured
REFERENCES = ("hf-sdpa", "hf-eager", "hf-batch", "llama.cpp")
_PACKAGES = (
    *("torch", "transformers", "ringstar"),
    *("llama-cpp-python", "ring-attention-pytorch"),
)
NOT_DONE = "its process ended before"
# options that say what was measured
_TOLD = ("requests", "warm_ups", "rounds", "new_tokens", "question_tokens", "seed")
RING = "ours: Ring Attention, exact, one rank or several"
STAR = "ours: Star Attention, approximate"
TIMES = ("ttft", "tpot", "itl")


def result_of(
    command: Sequence[str], files: ModelFiles, plan: Plan, lines: Sequence[Line]
) -> dict[str, Any]:
    """The result JSON; `docs/bench.md` describes each field."""
    config, device = plan.config, own_device()
    dtype, _ = choose_dtype(config.model, files.config, device)
    options = asdict(config.bench)
    return {
        "circumstances": circumstances(shlex.join(["python", "-m", *command]), _PACKAGES),
        "model": files.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        **{name: options[name] for name in _TOLD},
        "contenders": dict(_contenders(files, plan, device)),
        **_cells(plan, files, lines),
    }


def _contenders(files: ModelFiles, plan: Plan, device: torch.device) -> Iterator[tuple[str, str]]:
    """What each name stands for, with the version of what is not ours."""
    for each in plan.strategies:
        star = isinstance(each.strategy(plan.loads[0].length), StarConfig)
        yield each.label, STAR if star else RING
    for name in plan.processes:
        request = request_of(plan.config, files, plan.loads[0], device)
        yield name, PEERS[name].what(request)


def _cells(plan: Plan, files: ModelFiles, lines: Sequence[Line]) -> dict[str, Any]:
    cells = all_rounds(line for line in lines if isinstance(line, Measured))
    alone = all_attention(line for line in lines if isinstance(line, AttentionTimes))
    attention = {line.key: line for line in alone}
    known = {key: cell.ids for key, cell in cells.items() if cell.why_not is None}
    ceilings = highest([line for line in lines if isinstance(line, Ceilings)])
    floor = Floor.of(plan, files, ceilings)
    rows = [
        row_of(cells.get(key, Measured(*key, why_not=NOT_DONE)), known, floor)
        for who, world, load in plan.cells()
        for key in [(who, world, load.length, load.batch)]
    ]
    return {
        "ceilings": None if ceilings is None else asdict(ceilings),
        "cells": rows,
        "attention": [
            _attention(attention.get(key, AttentionTimes(*key, why_not=NOT_DONE)))
            for key in plan.attention()
        ],
    }


@dataclass(frozen=True, slots=True)
class Floor:
    """The least times, where they are known: `ceilings` are of the model in its own dtype.

    Ours is read in another one with `small_kv`, and of `simulated` ranks all have one device.
    """

    ceilings: Ceilings | None = None
    small_kv: bool = False
    simulated: bool = False

    @staticmethod
    def of(plan: Plan, files: ModelFiles, ceilings: Ceilings | None) -> Floor:
        if files.quantised:  # how many bytes its weights are is the quantiser's to know
            return Floor()
        config = plan.config
        return Floor(ceilings, config.cache.dtype != "auto", config.transport.name == "threads")

    def times(self, cell: Measured) -> Iterator[tuple[str, float]]:
        """The least seconds for all prompts of a batch together, and for a token in the middle."""
        peer = PEERS.get(cell.contender)
        if self.ceilings is None or (peer and peer.own_formats):
            return
        devices = 1 if self.simulated else self.ceilings.devices(cell.world)
        yield "ttft", cell.batch * self.ceilings.ttft_s(cell.length, devices)
        if peer or not self.small_kv:
            past = cell.length + len(cell.token_s[0]) // 2
            yield "tpot", self.ceilings.tpot_s(past, cell.batch, devices)


def row_of(
    cell: Measured,
    answers: Mapping[Key, list[int]] | None = None,
    floor: Floor | None = None,
) -> Row:
    """One cell; times in milliseconds, throughputs per second.

    With the `answers` of all cells it tells how far they are a peer's.
    """
    row: Row = {
        "contender": cell.contender,
        "world": cell.world,
        "length": cell.length,
        "batch": cell.batch,
        "why_not": cell.why_not,
    }
    if cell.why_not is not None:
        return row
    requests, new_tokens = len(cell.ttft_s), sum(map(len, cell.token_s))
    row |= {
        "completed": requests,
        "duration": cell.duration_s,
        "total_input_tokens": requests * cell.length,
        "total_output_tokens": new_tokens,
        "request_throughput": requests / cell.duration_s,
        "output_throughput": new_tokens / cell.duration_s,
        "total_token_throughput": (requests * cell.length + new_tokens) / cell.duration_s,
    }
    for name, seconds in _times(cell).items():
        row |= {
            f"mean_{name}_ms": 1e3 * float(np.mean(seconds)),
            f"median_{name}_ms": 1e3 * float(np.median(seconds)),
            f"p99_{name}_ms": 1e3 * float(np.percentile(seconds, 99)),
        }
    row["median_prompts_ms"] = 1e3 * float(np.median(_prompts(cell)))
    row |= {"transport": cell.transport, "kernel": cell.kernel}
    row |= {"cpu_s": cell.cpu_s, "peak_memory_bytes": cell.peak_memory_bytes}
    reference = reference_of(cell.key, answers or {})
    same = None if reference is None or answers is None else _same(cell.ids, answers[reference])
    row["same_tokens"] = same
    least = floor.times(cell) if floor is not None else ()
    return row | {f"floor_{name}_ms": 1e3 * seconds for name, seconds in least}


def reference_of(key: Key, known: Container[Key]) -> Key | None:
    """Whom a cell is compared with: a peer with the same load, if one of them is known."""
    return next((found for name in REFERENCES if (found := (name, 1, *key[2:])) in known), None)


def _times(cell: Measured) -> dict[str, list[float]]:
    """Seconds: of each request, and between any two tokens of it."""
    per_token = [(times[-1] - times[0]) / (len(times) - 1) for times in cell.token_s]
    between = [float(gap) for times in cell.token_s for gap in np.diff(times)]
    return dict(zip(TIMES, (cell.ttft_s, per_token, between), strict=True))


def _prompts(cell: Measured) -> list[float]:
    """Seconds of each call until all of its prompts have their first token."""
    starts = range(0, len(cell.ttft_s), cell.batch)
    return [max(cell.ttft_s[start : start + cell.batch]) for start in starts]


def _same(ids: Sequence[int], others: Sequence[int]) -> float:
    """The share of an answer up to the first token that differs."""
    same = 0
    for mine, other in zip(ids, others, strict=False):
        if mine != other:
            break
        same += 1
    return same / max(1, len(others))


def _attention(line: AttentionTimes) -> Row:
    row = {key: value for key, value in asdict(line).items() if key != "seconds"}
    if line.why_not is None:
        row["median_ms"] = 1e3 * float(np.median(line.seconds))
    return row


def by_key(result: Mapping[str, Any]) -> dict[Key, Row]:
    """The rows of a result that have times."""
    return {
        (row["contender"], row["world"], row["length"], row["batch"]): row
        for row in result["cells"]
        if row["why_not"] is None
    }
