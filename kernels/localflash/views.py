"""How keys and values that are kept or that travel are read. Reading never gathers pages.

A `KVView` is read by a kernel as a whole; a `KV` can also be cut and sent. Of the latter there
are `DenseKV` here, `QuantKV` (quantised.py) and `JoinedKV` (joined.py), which puts pieces of either
one after another.

B sequences, T tokens, Hkv KV heads, D head dim, P pages in the pool.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

# Quantised storage is widened at most this many tokens at a time, to bound the copy; on a GPU,
# where each time costs a dozen launches whatever it widens, more of them.
WIDEN_TOKENS = 2048
WIDEN_TOKENS_ON_GPU = 32768


class Segment(NamedTuple):
    """Tokens start.. of the sequences `batch`, as tensors (b, t, Hkv, D) without a copy."""

    batch: slice
    start: int
    k_BTHD: Tensor
    v_BTHD: Tensor


class KVView(Protocol):
    """Cached KV of `batch` sequences; only `segments` is needed by the tiled back ends."""

    @property
    def batch(self) -> int: ...

    def segments(self, dtype: torch.dtype) -> Iterator[Segment]:
        """Every cached token exactly once; `dtype` is what quantised storage is widened to."""
        ...


class KV(KVView, Protocol):
    """KV of `tokens` tokens of each of `batch` sequences, which can be read, cut and sent.

    All sequences are equally long, so that each of its `segments` is of all of them. Whoever
    reads, keeps or sends KV knows only this, and not in which form the numbers lie.
    """

    @property
    def tokens(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, scales included."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is sent: each (B, T, ...), with as many bytes for one token as for another.

        Without a copy, unless the tokens lie in several pieces. Laid end to end, for any number
        of tokens, each tensor begins at a multiple of its item size.
        """
        ...

    @property
    def pieces(self) -> tuple[tuple[Tensor, ...], ...]:
        """Each of `tensors` as pieces (B, t, ...) that come one after another, without a copy."""
        ...

    def slice(self, start: int, stop: int) -> "KV":
        """Tokens [start, stop), without a copy; of the same form even if there are none."""
        ...

    def of(self, tensors: tuple[Tensor, ...]) -> "KV":
        """KV of the same form over other tensors, such as those that another rank sent."""
        ...


class TensorsKV:
    """KV of which every tensor is (B, T, ...), and a field of a dataclass, in order."""

    __slots__ = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    @property
    def pieces(self) -> tuple[tuple[Tensor, ...], ...]:
        return tuple((tensor,) for tensor in self.tensors)

    @property
    def batch(self) -> int:
        return self.tensors[0].shape[0]

    @property
    def tokens(self) -> int:
        return self.tensors[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def slice(self, start: int, stop: int) -> Self:
        """Tokens [start, stop), without a copy."""
        return self.of(tuple(tensor[:, start:stop] for tensor in self.tensors))

    def of(self, tensors: tuple[Tensor, ...]) -> Self:
        return type(self)(*tensors)


@dataclass(frozen=True, slots=True)
class DenseKV(TensorsKV):
    """k, v (B, T, Hkv, D) in the queries' dtype; strides free, all sequences equally long."""

    k_BTHD: Tensor
    v_BTHD: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k_BTHD, self.v_BTHD

    def segments(self, dtype: torch.dtype) -> Iterator[Segment]:
        if self.batch and self.tokens:
            yield Segment(slice(0, self.batch), 0, self.k_BTHD, self.v_BTHD)


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Pages of a shared pool.

    k_pool, v_pool (P, page, Hkv, D); block_table (B, max_pages) int32 or int64: the page number
    of each block of `page` tokens; lengths (B,) integers, the tokens of each sequence, on any
    device. k_scale, v_scale (Hkv,) float32 or None: what a quantised pool is multiplied by.
    """

    k_pool: Tensor
    v_pool: Tensor
    block_table: Tensor
    lengths: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.k_pool.ndim != 4 or self.v_pool.shape != self.k_pool.shape:
            shapes = f"{tuple(self.k_pool.shape)} and {tuple(self.v_pool.shape)}"
            raise ValueError(f"k_pool and v_pool are {shapes}: both must be (P, page, Hkv, D)")
        table = self.block_table
        if table.ndim != 2 or table.dtype not in (torch.int32, torch.int64):
            got = f"{tuple(table.shape)} {table.dtype}"
            raise ValueError(f"block_table is {got}: must be (B, max_pages) int32 or int64")
        if self.lengths.shape != table.shape[:1] or self.lengths.is_floating_point():
            got = f"{tuple(self.lengths.shape)} {self.lengths.dtype}"
            raise ValueError(f"lengths is {got}: must be ({table.shape[0]},) integers")
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if scale is not None and scale.shape != self.k_pool.shape[2:3]:
                heads = self.k_pool.shape[2]
                raise ValueError(f"{name} is {tuple(scale.shape)}: must be ({heads},), a KV head")

    @property
    def batch(self) -> int:
        return self.block_table.shape[0]

    def segments(self, dtype: torch.dtype) -> Iterator[Segment]:
        page = self.k_pool.shape[1]
        for b, length in enumerate(self.lengths.tolist()):
            start = 0
            for first, count in self._runs(b, length):
                tokens = min(count * page, length - start)
                k_BTHD = _read(self.k_pool, first, count, tokens, self.k_scale, dtype)
                v_BTHD = _read(self.v_pool, first, count, tokens, self.v_scale, dtype)
                yield Segment(slice(b, b + 1), start, k_BTHD, v_BTHD)
                start += tokens

    def _runs(self, b: int, length: int) -> Iterator[tuple[int, int]]:
        """(first page, pages) of each run of consecutive page numbers of sequence b."""
        pages, page = self.k_pool.shape[:2]
        used = -(-length // page)
        if not 0 <= used <= self.block_table.shape[1]:
            room = self.block_table.shape[1] * page
            raise ValueError(f"lengths[{b}]={length}: block_table has room for 0 to {room}")
        table = self.block_table[b, :used]
        breaks = (torch.diff(table) != 1).nonzero().flatten() + 1
        bounds = [0, *breaks.tolist(), used] if used else [0]
        firsts = table[bounds[:-1]].tolist()
        for first, start, stop in zip(firsts, bounds[:-1], bounds[1:], strict=True):
            count = stop - start
            if first < 0 or first + count > pages:  # slicing the pool would silently shorten it
                got = f"block_table[{b}] names pages {first} to {first + count - 1}"
                raise ValueError(f"{got}: the pool has 0 to {pages - 1}")
            step = self._run_limit(count)
            for offset in range(0, count, step):
                yield first + offset, min(step, count - offset)

    def _run_limit(self, count: int) -> int:
        """Pages that one view may span: all, unless the strides or widening forbid it."""
        page = self.k_pool.shape[1]
        if any(pool.stride(0) != page * pool.stride(1) for pool in (self.k_pool, self.v_pool)):
            return 1
        quantised = self.k_scale is not None or self.v_scale is not None
        return max(1, WIDEN_TOKENS // page) if quantised else count


def _read(
    pool: Tensor, first: int, count: int, tokens: int, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(1, tokens, Hkv, D): a view of the pool, or its widened copy when there is a scale."""
    page, heads, dim = pool.shape[1:]
    run = pool[first : first + count].view(1, count * page, heads, dim)[:, :tokens]
    # In float32 first: the product of two rounded numbers would be rounded twice.
    return run if scale is None else (run.float() * scale[:, None]).to(dtype)
