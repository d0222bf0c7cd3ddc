"""What was scored, as JSON and as a table; `docs/score.md` describes each field."""

from __future__ import annotations

import math
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.result_fields import runtime_fields, strategy_fields
from launch.score_plan import Continuation, Plan
from ringstar.config import ScoreConfig
from ringstar.runtime import LongContext
from ringstar.scores import Score

# where standard output is no terminal
_WIDTH = 100
_LONGEST_TABLE = 8


def line_of(continuation: Continuation, score: Score) -> dict[str, Any]:
    """A line of the result: that of the continuation, and how likely it is."""
    return {
        **continuation.line,
        "token_ids": score.ids,
        "logprobs": score.logprobs.tolist(),
        "greedy": score.greedy.tolist(),
        "logprob": score.logprob,
        "is_greedy": score.is_greedy,
        "perplexity": score.perplexity,
    }


def result_of(
    config: ScoreConfig, runtime: LongContext, plan: Plan, score: Score, seconds: float
) -> dict[str, Any]:
    """The result JSON of a document by itself."""
    tokens = len(plan.document)
    return {
        "tokens": tokens,
        "scored_tokens": len(score.ids),
        "perplexity": score.perplexity,
        "logprob": score.logprob,
        "bits_per_byte": _bits(score) / plan.text_bytes if plan.text_bytes else None,
        "greedy_share": float(score.greedy.float().mean()),
        "curve": [
            {"tokens": end, "perplexity": value}
            for end, value in score.perplexities(config.score.pieces)
        ],
        **strategy_fields(config.strategy, tokens - 1, runtime.world_size),  # the last is not read
        **runtime_fields(runtime),
        "seconds": seconds,
        "token_ids": score.ids,
        "logprobs": score.logprobs.tolist(),
        "greedy": score.greedy.tolist(),
    }


def table(result: dict[str, Any]) -> str:
    """The figures, and the curve in a few rows."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    tokens, bits = result["scored_tokens"], result["bits_per_byte"]
    per_byte = f", {bits:.4f} bits a byte" if bits is not None else ""
    rows = Table("tokens up to", "perplexity of the piece")
    for point in _some(result["curve"]):
        rows.add_row(f"{point['tokens']:,}", f"{point['perplexity']:.4f}")
    with console.capture() as capture:
        console.print(
            f"perplexity {result['perplexity']:.4f} of {tokens:,} tokens{per_byte};"
            f" {result['greedy_share']:.1%} of them were the model's first choice"
        )
        console.print(rows)
    return capture.get()


def _some(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring pieces taken together, so that the rows fit on a screen."""
    step = -(-len(curve) // _LONGEST_TABLE)
    return [_joined(curve, at, at + step) for at in range(0, len(curve), step)]


def _joined(curve: list[dict[str, Any]], start: int, stop: int) -> dict[str, Any]:
    """Some pieces as one: the mean of their logarithms, by their tokens."""
    before = curve[start - 1]["tokens"] if start else 0
    total, at = 0.0, before
    for point in curve[start:stop]:
        total += math.log(point["perplexity"]) * (point["tokens"] - at)
        at = point["tokens"]
    return {"tokens": at, "perplexity": math.exp(total / (at - before))}


def _bits(score: Score) -> float:
    """Of the whole text, were it compressed by the model."""
    return -score.logprob / math.log(2)
