"""Local attention of one row, or a few, against cached keys: bytes a second.

B batch, T tokens of each sequence, H query heads, Hkv KV heads, D head dim, P pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.encode import backends, thousands
from benchmarks.gpu.timing import (
    Bench,
    Row,
    Section,
    Shares,
    free_bytes,
    random,
    relative_error,
    sets_of,
)
from localflash import BACKENDS, DenseKV, KVView, PagedKV, attend_cached, attend_reference

DIM = 128
PAGES = (64, 128)
# the most keys of a batch of one that are also computed in float64
CHECKED_TOKENS = 131072
# a back end that cannot read pages makes a call for each: beyond this that is all it measures
MOST_PAGES = 256


@dataclass(frozen=True)
class Cached:
    """`rows` queries of each of `batch` sequences against its `tokens` cached keys."""

    tokens: int
    batch: int
    heads: int
    kv_heads: int
    rows: int = 1
    dim: int = DIM

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def kv_bytes(self) -> int:
        """Keys and values in 16 bits, each read once."""
        return 2 * 2 * self.batch * self.tokens * self.kv_heads * self.dim

    @property
    def label(self) -> str:
        return f"g{self.group} b{self.batch} {thousands(self.tokens)}"


@dataclass(frozen=True)
class Pool:
    """k, v (B·T, Hkv, D): the same memory read as one dense piece or as shuffled pages."""

    case: Cached
    k: Tensor
    v: Tensor

    def views(self, pages: Sequence[int]) -> dict[str, KVView]:
        return {"dense": self.dense()} | {f"pages of {page}": self.paged(page) for page in pages}

    def dense(self) -> DenseKV:
        shape = (self.case.batch, self.case.tokens, self.case.kv_heads, self.case.dim)
        return DenseKV(self.k.view(shape), self.v.view(shape))

    def paged(self, page: int) -> PagedKV:
        """Every page of the pool once, in an order that follows none in memory."""
        case, count = self.case, self.k.shape[0] // page
        shape = (count, page, case.kv_heads, case.dim)
        table = torch.randperm(count, device=self.k.device).to(torch.int32)
        lengths = torch.full((case.batch,), case.tokens, device=self.k.device, dtype=torch.int32)
        table_BP = table.view(case.batch, count // case.batch)
        return PagedKV(self.k.view(shape), self.v.view(shape), table_BP, lengths)


def cases(
    lengths: Sequence[int] = (131072, 1048576, 32768, 524288),
    batches: Sequence[int] = (1, 16),
    groups: Sequence[int] = (8, 4),
    heads: int = 32,
) -> list[Cached]:
    """Those that matter most first."""
    return [
        Cached(length, batch, heads, heads // group)
        for length in lengths
        for batch in batches
        for group in groups
    ]


def questions(lengths: Sequence[int] = (131072, 1048576), heads: int = 32) -> list[Cached]:
    """4 questions at groups of 8 and 8 at groups of 4: 32 rows for each KV head."""
    return [
        Cached(length, 1, heads, heads // group, rows)
        for length in lengths
        for group, rows in ((8, 4), (4, 8))
    ]


def pool_of(case: Cached, device: str) -> Pool:
    shape = (case.batch * case.tokens, case.kv_heads, case.dim)
    return Pool(case, random(*shape, device=device), random(*shape, device=device))


def run(
    bench: Bench,
    decoded: Sequence[Cached] | None = None,
    names: Sequence[str] | None = None,
    pages: Sequence[int] = PAGES,
) -> Section:
    """GB/s of KV read, of every back end, dense and paged."""
    section = Section(
        "decode", f"attend_cached, one row, D {DIM}, bf16: GB/s of KV read, and of the copy's"
    )
    chosen = names or backends(bench.device, bench.dtype, DIM)
    shares = Shares(bench.budget)
    for case in decoded or cases():
        if section.out_of_time(bench.budget, case.label, 3.0):
            continue
        section.attempt(case.label, partial(_case, bench, section, shares, case, chosen, pages))
    return section


def _case(
    bench: Bench,
    section: Section,
    shares: Shares,
    case: Cached,
    names: Sequence[str],
    pages: Sequence[int],
) -> None:
    pools = _pools(bench.device, case)
    q = random(case.batch, case.rows, case.heads, case.dim, device=bench.device)
    want = _wanted(q, pools[0])
    views = [pool.views(pages) for pool in pools]
    for how in views[0]:
        kvs = [each[how] for each in views]
        for name in names:
            cell = f"{name} {case.label} {how}"
            if section.out_of_time(bench.budget, cell) or shares.used_up(name, section):
                continue
            if _page_by_page(section, name, kvs[0]):
                continue
            work = partial(_cell, bench, case, name, q, kvs, want)
            row = section.attempt(cell, partial(shares.take, name, work))
            if row is not None:
                section.rows.append({"case": f"{case.label} {how}", "backend": name} | row)


def _pools(device: str, case: Cached) -> list[Pool]:
    """As many as it takes to be read from memory; MemoryError, saying so, if there is no room."""
    count = sets_of(case.kv_bytes)
    need, free = count * case.kv_bytes * 1.02 + 2**30, free_bytes(device)
    if need > free:
        raise MemoryError(f"needs {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    return [pool_of(case, device) for _ in range(count)]


def _page_by_page(section: Section, name: str, kv: KVView) -> bool:
    """Whether this would only measure thousands of small calls; noted if so."""
    if not isinstance(kv, PagedKV) or BACKENDS[name].attend_cached is not None:
        return False
    many = kv.block_table.numel() > MOST_PAGES
    note = f"{name}: reads pages one call at a time, so over {MOST_PAGES} pages are left out"
    if many and note not in section.skipped:
        section.skipped.append(note)
    return many


def _wanted(q: Tensor, pool: Pool) -> Tensor | None:
    """float64, for what is small enough; in a batch of one the order of pages changes nothing."""
    if pool.case.batch != 1 or pool.case.tokens > CHECKED_TOKENS:
        return None
    kv = pool.dense()
    return attend_reference(q.double(), kv.k_BTHD, kv.v_BTHD)[0]


def _cell(
    bench: Bench, case: Cached, name: str, q: Tensor, kvs: list[KVView], want: Tensor | None
) -> Row:
    def call(index: int) -> Tensor:
        return attend_cached(q, kvs[index], backend=name)[0]

    out = call(0)
    took = bench.timer.seconds(call, len(kvs))
    return {
        "GB/s": case.kv_bytes / took / 1e9,
        "of copy": case.kv_bytes / took / bench.copy,
        "error": None if want is None else relative_error(out, want),
        "seconds": took,
        "seconds as called": bench.timer.called(call, len(kvs)),
    }


def run_questions(
    bench: Bench,
    asked: Sequence[Cached] | None = None,
    names: Sequence[str] | None = None,
    page: int = PAGES[-1],
) -> Section:
    """Several questions on one document against the time of one."""
    section = Section("questions", "attend_cached of several rows / of one row, seconds; band None")
    chosen = names or backends(bench.device, bench.dtype, DIM)
    for case in asked or questions():
        label = f"{case.rows} questions {case.label}"
        if section.out_of_time(bench.budget, label, 3.0):
            continue
        section.attempt(label, partial(_questions, bench, section, case, chosen, page))
    return section


def _questions(
    bench: Bench, section: Section, case: Cached, names: Sequence[str], page: int
) -> None:
    pools = _pools(bench.device, case)
    views = [pool.views((page,)) for pool in pools]
    for how in views[0]:
        kvs = [each[how] for each in views]
        for name in names:
            cell = f"{name} {case.rows} questions {case.label} {how}"
            if section.out_of_time(bench.budget, cell) or _page_by_page(section, name, kvs[0]):
                continue
            row = section.attempt(cell, partial(_ratio, bench, case, name, kvs))
            if row is not None:
                label = f"{case.rows} questions {case.label} {how}"
                section.rows.append({"case": label, "backend": name} | row)


def _ratio(bench: Bench, case: Cached, name: str, kvs: list[KVView]) -> Row:
    one, many = (
        bench.timer.seconds(_call(bench, rows, name, kvs), len(kvs))
        for rows in (replace(case, rows=1), case)
    )
    return {"one s": one, "all s": many, "ratio": many / one}


def _call(bench: Bench, case: Cached, name: str, kvs: list[KVView]) -> Callable[[int], Tensor]:
    q = random(case.batch, case.rows, case.heads, case.dim, device=bench.device)
    return lambda index: attend_cached(q, kvs[index], backend=name)[0]
