"""What was measured, summed up in the names that `vllm bench serve` made familiar."""

from __future__ import annotations

import shlex
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict
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
        "model": files.folder.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        **{name: options[name] for name in _TOLD},
        "contenders": dict(_contenders(files, plan, device)),
        **_cells(plan, lines),
    }


def _contenders(files: ModelFiles, plan: Plan, device: torch.device) -> Iterator[tuple[str, str]]:
    """What each name stands for, with the version of what is not ours."""
    for each in plan.strategies:
        star = isinstance(each.strategy(plan.loads[0].length), StarConfig)
        yield each.label, STAR if star else RING
    for name in plan.processes:
        request = request_of(plan.config, files, plan.loads[0], device)
        yield name, PEERS[name].what(request)


def _cells(plan: Plan, lines: Sequence[Line]) -> dict[str, Any]:
    cells = all_rounds(line for line in lines if isinstance(line, Measured))
    attention = all_attention(line for line in lines if isinstance(line, AttentionTimes))
    known = {key: cell.ids for key, cell in cells.items() if cell.why_not is None}
    ceilings = highest([line for line in lines if isinstance(line, Ceilings)])
    rows = [
        row_of(cells.get(key, Measured(*key, why_not=NOT_DONE)), known, ceilings)
        for who, world, load in plan.cells()
        for key in [(who, world, load.length, load.batch)]
    ]
    return {
        "ceilings": None if ceilings is None else asdict(ceilings),
        "cells": rows,
        "attention": [_attention(line) for line in attention],
    }


def row_of(
    cell: Measured,
    answers: Mapping[Key, list[int]] | None = None,
    ceilings: Ceilings | None = None,
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
    row |= {"transport": cell.transport, "kernel": cell.kernel}
    row |= {"cpu_s": cell.cpu_s, "peak_memory_bytes": cell.peak_memory_bytes}
    reference = reference_of(cell.key, answers or {})
    same = None if reference is None or answers is None else _same(cell.ids, answers[reference])
    row["same_tokens"] = same
    peer = PEERS.get(cell.contender)
    if ceilings is not None and not (peer and peer.own_formats):
        row |= {f"floor_{name}_ms": 1e3 * least for name, least in _floors(cell, ceilings)}
    return row


def _floors(cell: Measured, ceilings: Ceilings) -> Iterator[tuple[str, float]]:
    """The least seconds for all prompts of a batch together, and for a token in the middle."""
    devices, past = ceilings.devices(cell.world), cell.length + len(cell.token_s[0]) // 2
    yield "ttft", cell.batch * ceilings.ttft_s(cell.length, devices)
    yield "tpot", ceilings.tpot_s(past, cell.batch, devices)


def reference_of(key: Key, known: Container[Key]) -> Key | None:
    """Whom a cell is compared with: a peer with the same load, if one of them is known."""
    return next((found for name in REFERENCES if (found := (name, 1, *key[2:])) in known), None)


def _times(cell: Measured) -> dict[str, list[float]]:
    """Seconds: of each request, and between any two tokens of it."""
    per_token = [(times[-1] - times[0]) / (len(times) - 1) for times in cell.token_s]
    between = [float(gap) for times in cell.token_s for gap in np.diff(times)]
    return dict(zip(TIMES, (cell.ttft_s, per_token, between), strict=True))


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
