"""The merge of partial results: bytes a second.

T query rows, H query heads, D head dim, N partials; out (1, T, H, D) and lse (1, H, T) float32.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, float32

from benchmarks.gpu.timing import Bench, Row, Section, random
from localflash import merge_into, merge_many

TOKENS, HEADS, DIM, PARTIALS = 16384, 32, 128, 8


def partial_bytes(tokens: int, heads: int, dim: int) -> int:
    """Of one float32 partial: out and lse."""
    return 4 * tokens * heads * (dim + 1)


def into_bytes(tokens: int, heads: int, dim: int) -> int:
    """Two partials read and one written."""
    return 3 * partial_bytes(tokens, heads, dim)


def many_bytes(partials: int, tokens: int, heads: int, dim: int) -> int:
    """All partials read and one written."""
    return (partials + 1) * partial_bytes(tokens, heads, dim)


def run(
    bench: Bench,
    tokens: int = TOKENS,
    heads: int = HEADS,
    dim: int = DIM,
    partials: int = PARTIALS,
) -> Section:
    size = f"{tokens * heads * dim / 1e6:.0f} million numbers a partial"
    section = Section("merge", f"float32, {size}: GB/s, and of the copy's")
    for name, work in (
        ("merge_into", partial(_into, bench, tokens, heads, dim)),
        (f"merge_many, N={partials}", partial(_many, bench, partials, tokens, heads, dim)),
    ):
        if section.out_of_time(bench.budget, name):
            continue
        row = section.attempt(name, work)
        if row is not None:
            section.rows.append({"merge": name} | row)
    return section


def _partials(bench: Bench, count: int, tokens: int, heads: int, dim: int) -> list[Tensor]:
    """outs (N, 1, T, H, D), lses (N, 1, H, T)."""
    shapes = ((count, 1, tokens, heads, dim), (count, 1, heads, tokens))
    return [random(*shape, device=bench.device, dtype=float32) for shape in shapes]


def _into(bench: Bench, tokens: int, heads: int, dim: int) -> Row:
    outs, lses = _partials(bench, 2, tokens, heads, dim)
    took = bench.timer.seconds(lambda _: merge_into(outs[0], lses[0], outs[1], lses[1]))
    return _row(bench, into_bytes(tokens, heads, dim), took)


def _many(bench: Bench, count: int, tokens: int, heads: int, dim: int) -> Row:
    outs, lses = _partials(bench, count, tokens, heads, dim)
    took = bench.timer.seconds(lambda _: merge_many(outs, lses))
    return _row(bench, many_bytes(count, tokens, heads, dim), took)


def _row(bench: Bench, nbytes: int, took: float) -> Row:
    return {"GB/s": nbytes / took / 1e9, "of copy": nbytes / took / bench.copy, "seconds": took}
