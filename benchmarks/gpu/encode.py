"""Local attention of many rows: every back end, and PyTorch's own call beside them.

B batch (always 1), T tokens, H query heads, Hkv KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.timing import Bench, Row, Section, Shares, random, relative_error, sets_of
from localflash import Band, Case, attend, attend_reference, available, empty_partial

CAUSAL = Band(0, 1, 0, 1)
PEERS = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}
ERROR_ROWS = 64
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """One attention: T queries against as many keys, all of them or causally."""

    tokens: int
    dim: int
    heads: int
    kv_heads: int
    causal: bool

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def pairs(self) -> int:
        """Visible pairs of a query and a key."""
        return self.tokens * (self.tokens + 1) // 2 if self.causal else self.tokens**2

    @property
    def flops(self) -> int:
        """Of the two products, 2·D each for a pair and a query head."""
        return 4 * self.heads * self.dim * self.pairs

    @property
    def band(self) -> Band | None:
        return CAUSAL if self.causal else None

    @property
    def label(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"d{self.dim} g{self.group} {mask} {thousands(self.tokens)}"

    def tensors(self, device: str) -> list[Tensor]:
        """q, k, v (1, T, heads, D) in bf16."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        return [random(1, self.tokens, h, self.dim, device=device) for h in heads]


def thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 and tokens < 2**20 else _millions(tokens)


def _millions(tokens: int) -> str:
    return f"{tokens // 2**20}M" if tokens % 2**20 == 0 else str(tokens)


def shapes(
    lengths: Sequence[int] = (32768, 8192, 131072, 16384),
    dims: Sequence[int] = (128, 64),
    groups: Sequence[int] = (4, 8),
    heads: int = 32,
    long_heads: int = 8,
) -> list[Shape]:
    """Those that matter most first, for a run that is cut short; 128K with fewer heads."""
    return [
        Shape(length, dim, h, h // group, causal)
        for dim in dims
        for group in groups
        for length in lengths
        for h in [long_heads if length >= 131072 else heads]
        for causal in (True, False)
    ]


def backends(device: str, dtype: torch.dtype, dim: int) -> list[str]:
    """Every back end that can run this, but the specification."""
    names = available(Case(torch.device(device), dtype, dim, None))
    return [name for name in names if name != "reference"]


def run(
    bench: Bench,
    cases: Sequence[Shape] | None = None,
    names: Sequence[str] | None = None,
    peers: Mapping[str, SDPBackend] = PEERS,
) -> Section:
    """TFLOP/s of every back end on every shape, its shares and its error."""
    section = Section(
        "encode", "attend(q, k, v, band), bf16: TFLOP/s; the error is ‖out - ref‖/‖ref‖ in float64"
    )
    shares = Shares(bench.budget)
    for shape in cases or shapes():
        if section.out_of_time(bench.budget, shape.label, 3.0):
            continue
        section.attempt(shape.label, partial(_shape, bench, section, shares, shape, names, peers))
    return section


def _shape(
    bench: Bench,
    section: Section,
    shares: Shares,
    shape: Shape,
    names: Sequence[str] | None,
    peers: Mapping[str, SDPBackend],
) -> None:
    first = shape.tensors(bench.device)
    count = sets_of(sum(t.nbytes for t in first))
    inputs = [first, *(shape.tensors(bench.device) for _ in range(count - 1))]
    rows, want = _wanted(first, shape)
    calls: dict[str, Call] = {
        name: partial(_ours, name, shape.band)
        for name in (names or backends(bench.device, bench.dtype, shape.dim))
    }
    calls |= {name: partial(_peer, kernel, shape.causal) for name, kernel in peers.items()}
    found: list[Row] = []
    for name, call in calls.items():
        cell = f"{name} {shape.label}"
        if section.out_of_time(bench.budget, cell) or shares.used_up(name, section):
            continue
        work = partial(_cell, bench, shape, call, inputs, rows, want)
        row = section.attempt(cell, partial(shares.take, name, work))
        if row is not None:
            found.append({"case": shape.label, "backend": name, "peer": name in peers} | row)
    section.rows += with_best(found)


def _cell(
    bench: Bench, shape: Shape, call: Call, inputs: list[list[Tensor]], rows: slice, want: Tensor
) -> Row:
    error = relative_error(call(*inputs[0])[:, rows], want)
    took = bench.timer.seconds(lambda i: call(*inputs[i]), len(inputs))
    return {
        "TFLOP/s": shape.flops / took / 1e12,
        "of matmul": shape.flops / took / bench.matmul,
        "error": error,
        "seconds": took,
        "heads": shape.heads,
    }


def _wanted(inputs: list[Tensor], shape: Shape) -> tuple[slice, Tensor]:
    """Evenly spaced rows, and what they are in float64."""
    step = max(1, shape.tokens // ERROR_ROWS)
    rows = slice(step - 1, None, step)
    q, k, v = inputs
    band = Band(step - 1, step, 0, 1) if shape.causal else None
    return rows, attend_reference(q[:, rows].double(), k, v, band)[0]


def with_best(rows: list[Row]) -> list[Row]:
    """The rows of one case, each beside the fastest and the most accurate of the others."""
    for row in rows:
        others = [other for other in rows if other is not row]
        fastest = max((other["TFLOP/s"] for other in others), default=None)
        row["of best other"] = row["TFLOP/s"] / fastest if fastest else None
        row["best other error"] = min((other["error"] for other in others), default=None)
    return rows


def _ours(name: str, band: Band | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, band, backend=name)[0]


def _peer(kernel: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own call, which gives no lse, in bf16."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def run_into(bench: Bench, cases: Sequence[Shape] | None = None, names: Any = None) -> Section:
    """What merging into a running partial costs beside the plain call."""
    section = Section("into", "attend(..., into=partial) on one block / the plain call, seconds")
    for shape in cases or shapes((8192,), (128,), (4,)):
        for name in names or backends(bench.device, bench.dtype, shape.dim):
            cell = f"{name} {shape.label}"
            if section.out_of_time(bench.budget, cell):
                continue
            row = section.attempt(cell, partial(_into_cell, bench, shape, name))
            if row is not None:
                section.rows.append({"case": shape.label, "backend": name} | row)
    return section


def _into_cell(bench: Bench, shape: Shape, name: str) -> Row:
    first = shape.tensors(bench.device)
    count = sets_of(sum(t.nbytes for t in first))
    inputs = [first, *(shape.tensors(bench.device) for _ in range(count - 1))]
    running = empty_partial(first[0])

    def into(index: int) -> None:
        q, k, v = inputs[index]
        attend(q, k, v, shape.band, into=running, backend=name)

    plain = bench.timer.seconds(lambda i: _ours(name, shape.band, *inputs[i]), count)
    merged = bench.timer.seconds(into, count)
    return {"plain s": plain, "into s": merged, "ratio": merged / plain}
