"""What scored samples say: means with intervals, and what star keeps of exact's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from launch.evaluate_log import Scored
from launch.evaluate_plan import Cell, Plan
from launch.evaluate_star import EXACT
from ringstar.config import EvaluationConfig
from ringstar.evaluation import CONFIDENCE, RULER, paired_p, retention, wilson
from ringstar.models import ModelFiles

# a model whose exact answers score less than this on average cannot do the task
CANNOT = 0.05


@dataclass(frozen=True, slots=True)
class CellResult:
    """One contender's scores in one cell, from 0 to 1; docs/evaluate.md describes each field."""

    task: str
    length: int
    depth: float | None
    strategy: str
    samples: int
    mean: float
    low: float
    high: float
    can: bool
    encode_s: float
    retention: float | None = None
    retention_low: float | None = None
    retention_high: float | None = None
    p: float | None = None
    worse: int | None = None
    better: int | None = None


def results(plan: Plan, lines: Sequence[Scored]) -> list[CellResult]:
    """Every cell and contender of the plan, in its order, by the samples that all contenders had.

    Samples beyond the plan do not count; a cell without any is left out.
    """
    by_key = {line.key: line for line in lines}
    return [found for cell in plan.cells for found in _cell_results(plan, cell, by_key)]


def _cell_results(plan: Plan, cell: Cell, by_key: dict[Any, Scored]) -> Iterator[CellResult]:
    key = cell.task.name, cell.length, cell.depth
    labels = [contender.label for contender in plan.contenders]
    numbers = [
        number
        for number in plan.numbers(cell)
        if all((*key, number, label) in by_key for label in labels)
    ]
    if not numbers:
        return
    rows = {label: [by_key[*key, number, label] for number in numbers] for label in labels}
    exact = [line.score for line in rows[EXACT]]
    for label, own in rows.items():
        scores = [line.score for line in own]
        mean = fmean(scores)
        low, high = wilson(mean, len(scores))
        found = CellResult(
            *key,
            strategy=label,
            samples=len(scores),
            mean=mean,
            low=low,
            high=high,
            can=fmean(exact) >= CANNOT,
            encode_s=fmean(line.encode_s for line in own),
        )
        yield found if label == EXACT else _against_exact(found, scores, exact)


def _against_exact(found: CellResult, scores: list[float], exact: list[float]) -> CellResult:
    """With retention and its interval, p, and how often it scored worse and better than exact."""
    kept, low, high = retention(scores, exact) or (None, None, None)
    pairs = list(zip(scores, exact, strict=True))
    return replace(
        found,
        retention=kept,
        retention_low=low,
        retention_high=high,
        p=paired_p(scores, exact),
        worse=sum(own < other for own, other in pairs),
        better=sum(own > other for own, other in pairs),
    )


def ruler_mean(found: Sequence[CellResult], length: int, label: str) -> tuple[float, int] | None:
    """The mean over RULER's tasks at a length, and of how many; None if there is none."""
    means = [
        row.mean
        for row in found
        if row.task in RULER and (row.length, row.strategy) == (length, label)
    ]
    return (fmean(means), len(means)) if means else None


def cannot(found: Sequence[CellResult]) -> list[CellResult]:
    """Exact's cells at which the model fails whatever the strategy."""
    return [row for row in found if row.strategy == EXACT and not row.can]


def result_of(
    config: EvaluationConfig, files: ModelFiles, plan: Plan, found: Sequence[CellResult]
) -> dict[str, Any]:
    """The result JSON."""
    lengths = sorted({cell.length for cell in plan.cells})
    means = [
        {"length": length, "strategy": star.label, "mean": mean[0], "tasks": mean[1]}
        for length in lengths
        for star in plan.contenders
        if (mean := ruler_mean(found, length, star.label))
    ]
    return {
        "model": files.name,
        "prompt": files.prompt.source,
        "seed": config.evaluate.seed,
        "confidence": CONFIDENCE,
        "strategies": [{"label": star.label, "given": star.given} for star in plan.contenders],
        "sources": plan.material.sources(),
        "cells": [asdict(row) for row in found],
        "means": means,
    }
