"""What the Triton kernels share: the device's limits, and the rows' small arithmetic.

Scores live in units of log2: exp2 is one instruction, and the scale is folded into them.
A band reaches a kernel as integers: the key at index j is visible to the row at index i iff
j*k_step <= s and j*k_step > s - window, where s = gap + i*q_step.
"""

import contextvars
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .band import Band

LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)
_LN2 = tl.constexpr(0.6931471805599453)


class Device(NamedTuple):
    """`processors` counts streaming multiprocessors; `capability` is (0, 0) in the interpreter."""

    capability: tuple[int, int]
    processors: int


class BandArgs(NamedTuple):
    """A band as the kernels take it."""

    gap: int
    q_step: int
    k_step: int
    window: int

    @property
    def hides(self) -> bool:
        return self.q_step > 0

    @property
    def windowed(self) -> bool:
        return self.window > 0


NO_BAND = BandArgs(0, 0, 1, 0)
# exp2(s * scale - max) is one instruction less; Triton 3.10 no longer does it unasked
FUSE = {"enable_fp_fusion": True}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@lru_cache(maxsize=16)
def device_of(device: torch.device) -> Device:
    """The limits of a CUDA device; those of the interpreter for any other."""
    if device.type != "cuda":
        return Device((0, 0), 1)
    properties = torch.cuda.get_device_properties(device)
    return Device((properties.major, properties.minor), properties.multi_processor_count)


def band_args(band: Band | None) -> BandArgs:
    if band is None:
        return NO_BAND
    return BandArgs(band.q_start - band.k_start, band.q_step, band.k_step, band.window or 0)


def block_d(head_dim: int) -> int:
    """Columns of a tile: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(head_dim))


def precision(dtype: torch.dtype) -> str:
    """Float32 products are exact ones; the matrix units' tf32 has 10 bits."""
    return "ieee" if dtype == torch.float32 else "tf32"


def positive_scale(q_BTHD: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a scale above 0: a row's largest product is its largest score."""
    if scale > 0:
        return q_BTHD, scale
    return (-q_BTHD, -scale) if scale < 0 else (torch.zeros_like(q_BTHD), 1.0)


def rows_dense(x: Tensor) -> Tensor:
    """Kernels read rows of adjacent elements; every other stride is free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def copies_in_bulk(*tensors: Tensor) -> bool:
    """Whether the bulk copy engine (TMA) takes these (B, T, H, D): rows 16 bytes aligned."""
    for x in tensors:
        step = 16 // x.element_size()
        if x.data_ptr() % 16 or any(s % step for s in x.stride()[:3]):
            return False
        if x.stride(3) != 1 or x.stride(1) < 1:
            return False
    return True


def launch(start: Callable[[], Any], device: torch.device, *, scratch: bool = False) -> None:
    """Start a kernel on its tensors' device; `scratch` if it makes descriptors, in memory."""
    if scratch:
        # the allocator is the context's: leave the caller's as it is
        contextvars.copy_context().run(_with_scratch, start, device)
    elif device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        start()
    else:
        with torch.cuda.device(device):
            start()


def _with_scratch(start: Callable[[], Any], device: torch.device) -> None:
    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)
    launch(start, device)


@triton.jit
def softcapped(s, softcap):
    """softcap * tanh(s / softcap), from an exponential that cannot overflow."""
    t = tl.exp2(tl.abs(s) * (-2.0 * _LOG2E / softcap))
    size = softcap * (1.0 - t) / (1.0 + t)
    return tl.where(s < 0, -size, size)


@triton.jit
def first_key(s, window, k_step):
    """Index of the first key that a row at s sees through its window."""
    return tl.maximum(0, s - window + k_step) // k_step


@triton.jit
def end_of_keys(s, k_step):
    """One past the index of the last key at or before s."""
    return tl.maximum(0, s + k_step) // k_step


@triton.jit
def shown(s, j, window, k_step, WINDOWED: tl.constexpr):
    """Visibility (rows, keys) of the key indices j to rows at s."""
    p = (j * k_step)[None, :]
    seen = p <= s[:, None]
    if WINDOWED:
        seen = seen & (p > (s - window)[:, None])
    return seen


@triton.jit
def finished(acc, m, l):
    """Normalised out and natural lse of an online softmax whose maxima m are log2."""
    empty = l == 0.0
    out = acc / tl.where(empty, 1.0, l)[:, None]
    lse = tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, l))) * _LN2)
    return out, lse


@triton.jit
def merged(out_a, lse_a, out_b, lse_b):
    """Two partials over disjoint keys as one; rows (R,), outs (R, D)."""
    top = tl.maximum(lse_a, lse_b)
    top = tl.where(top == float("-inf"), 0.0, top)
    a = tl.exp2((lse_a - top) * _LOG2E)
    b = tl.exp2((lse_b - top) * _LOG2E)
    total = a + b
    some = tl.where(total == 0.0, 1.0, total)
    out = out_a * (a / some)[:, None] + out_b * (b / some)[:, None]
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(some) * _LN2)
    return out, lse
