"""The table of back ends, and the one place that chooses among them.

A new back end is one line of `_TABLE` (and a place in `_AUTO` if it is to be picked unasked).
B batch, T tokens, H query heads, Hkv KV heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import packages, torch_cpu, torch_cuda, torch_flex
from .band import Band
from .installed import installed
from .merge import Partial, merge_into
from .reference import Bands, attend_cached_reference, attend_reference
from .tiles import Tile, attend_tiles
from .views import KVView

_HALF = (torch.bfloat16, torch.float16)
_TO_FLOAT32 = (*_HALF, torch.float32)
_CUDA = "needs a CUDA device"


class Case(NamedTuple):
    """What decides whether a back end can run; known before weights load."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    softcap: float | None


class Attend(Protocol):
    """`api.attend` after its arguments are checked; `into` is accumulated and returned."""

    def __call__(
        self,
        q_BTHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        band: Band | None,
        scale: float,
        softcap: float | None,
        into: Partial | None,
    ) -> Partial: ...


class AttendCached(Protocol):
    """`api.attend_cached` likewise, for back ends that read a KVView themselves."""

    def __call__(
        self,
        q_BTHD: Tensor,
        kv: KVView,
        bands: Bands,
        scale: float,
        softcap: float | None,
        into: Partial | None,
    ) -> Partial: ...


class AttendUnified(Protocol):
    """`attend_cached` with a shift for each query head, phi_H, in place of maxima."""

    def __call__(
        self,
        q_BTHD: Tensor,
        kv: KVView,
        bands: Bands,
        scale: float,
        softcap: float | None,
        into: Partial | None,
        phi_H: Tensor,
    ) -> Partial: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """`unsupported` gives the reason why a case cannot run, None if it can.

    Without `attend_cached`, a KVView is read segment by segment through `attend`; without
    `attend_unified` there is no unified max.
    """

    name: str
    unsupported: Callable[[Case], str | None]
    attend: Attend
    attend_cached: AttendCached | None = None
    attend_unified: AttendUnified | None = None


class Choice(NamedTuple):
    """`reason` is one sentence to log."""

    backend: Backend
    reason: str


def choose(
    name: str | None,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    softcap: float | None = None,
) -> Choice:
    """The back end called `name`; `auto` or None picks the first of its list that can run.

    ValueError, naming what is available, if there is none of that name or it cannot run.
    """
    return _choose(name or "auto", Case(torch.device(device), dtype, head_dim, softcap))


def available(case: Case) -> tuple[str, ...]:
    """The names of the back ends that can run this case."""
    return tuple(name for name, backend in BACKENDS.items() if not backend.unsupported(case))


@lru_cache(maxsize=256)
def _choose(name: str, case: Case) -> Choice:
    what = f"{str(case.dtype).removeprefix('torch.')}, head dim {case.head_dim} on {case.device}"
    if name == "auto":
        return _auto(case, what)
    names = ", ".join(("auto", *available(case)))
    if name not in BACKENDS:
        raise ValueError(f"kernel={name}: there is no such back end; available: {names}")
    why = BACKENDS[name].unsupported(case)
    if why:
        raise ValueError(f"kernel={name}: {why} ({what}); available: {names}")
    return Choice(BACKENDS[name], f"kernel {name}, as asked for, runs {what}.")


def _auto(case: Case, what: str) -> Choice:
    refused: list[str] = []
    order, measured = _order(case.device)
    for name in order:
        why = BACKENDS[name].unsupported(case)
        if not why:
            passed = f"; passed over {', '.join(refused)}" if refused else ""
            guess = "" if measured else "; the order was not measured on such a card"
            reason = f"kernel {name} is the first choice for {what}{passed}{guess}."
            return Choice(BACKENDS[name], reason)
        refused.append(f"{name} ({why})")
    raise ValueError(f"kernel=auto: nothing runs {what}: {', '.join(refused)}")


def _order(device: torch.device) -> tuple[tuple[str, ...], bool]:
    """The back ends to try in turn, and whether their order comes from measurements."""
    kind = device.type
    if kind == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        kind = f"sm_{major}{minor}"
    if kind in _AUTO:
        return _AUTO[kind], True
    return _AUTO.get(device.type, ("reference",)), False


def _reference(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    band: Band | None,
    scale: float,
    softcap: float | None,
    into: Partial | None,
) -> Partial:
    return _add(into, attend_reference(q_BTHD, k_BTHD, v_BTHD, band, scale, softcap))


def _reference_cached(
    q_BTHD: Tensor,
    kv: KVView,
    bands: Bands,
    scale: float,
    softcap: float | None,
    into: Partial | None,
) -> Partial:
    return _add(into, attend_cached_reference(q_BTHD, kv, bands, scale, softcap))


def _add(into: Partial | None, part: Partial) -> Partial:
    if into is None:
        return part
    merge_into(*into, *part)
    return into


def _tiled(
    name: str,
    unsupported: Callable[[Case], str | None],
    tile: Tile,
    capped: Callable[..., Partial] | None = None,
) -> Backend:
    """A back end from a tile, and from one that takes `softcap` too, if there is one."""

    def attend(
        q_BTHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        band: Band | None,
        scale: float,
        softcap: float | None,
        into: Partial | None,
    ) -> Partial:
        if softcap is None:
            return attend_tiles(tile, q_BTHD, k_BTHD, v_BTHD, band, scale, into)
        assert capped is not None  # refused by `unsupported`
        capped_here = partial(capped, softcap=softcap)
        return attend_tiles(capped_here, q_BTHD, k_BTHD, v_BTHD, band, scale, into)

    return Backend(name, unsupported, attend)


def _torch(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, causal: bool, scale: float) -> Partial:
    tile = torch_cuda.flash if q_BTHD.is_cuda else torch_cpu.tile
    return tile(q_BTHD, k_BTHD, v_BTHD, causal, scale)


def _no_floating(case: Case) -> str | None:
    return None if case.dtype.is_floating_point and case.dtype.itemsize > 1 else "16 bits at least"


def _no_torch(case: Case) -> str | None:
    if case.device.type == "cuda":
        return _no_cuda(case, _HALF, 256)
    if case.device.type != "cpu":
        return "runs on cpu and cuda"
    return _no_floating(case)


def _no_cudnn(case: Case) -> str | None:
    why = _no_cuda(case, _HALF, 256)
    if why or case.head_dim <= 128:
        return why
    hopper = torch.cuda.get_device_capability(case.device) == (9, 0)
    return None if hopper else "takes head dims above 128 on Hopper only"


def _no_efficient(case: Case) -> str | None:
    return _no_cuda(case, _TO_FLOAT32, 65536)


def _no_flex(case: Case) -> str | None:
    """Compiled for CUDA it has no dims below 16; the unfused form on the CPU takes any."""
    why = "has no softcap" if case.softcap is not None else _not_of(case, _TO_FLOAT32)
    if why or case.device.type == "cpu":
        return why
    if case.device.type != "cuda":
        return "runs on cpu and cuda"
    if not torch.cuda.is_available():
        return _CUDA
    if not 16 <= case.head_dim <= 256:
        return "takes head dims from 16 to 256"
    return _no_ampere(case)


def _no_fa3(case: Case) -> str | None:
    why = _no_cuda(case, _HALF, 256)
    if why:
        return why
    if torch.cuda.get_device_capability(case.device) != (9, 0):
        return "runs on Hopper only"
    module = installed(packages.FA3)
    if module is None:
        return f"needs FlashAttention-3: a module {' or '.join(packages.FA3)}"
    bfloat16_only = module == "fa3_fwd_interface" and case.dtype != torch.bfloat16
    return "takes bfloat16 only, as fa3-fwd builds it" if bfloat16_only else None


def _no_fa4(case: Case) -> str | None:
    why = _no_cuda(case, _HALF, 256)
    if why:
        return why
    major, _ = torch.cuda.get_device_capability(case.device)
    if major not in (9, 10, 11):
        return "needs compute capability 9, 10 or 11"
    if major > 9 and 128 < case.head_dim < 256:
        return "takes head dims up to 128, and 256, on Blackwell"
    return None if installed(packages.FA4) else "needs the package flash-attn-4"


def _no_flashinfer(case: Case) -> str | None:
    why = _no_cuda(case, _HALF, 256)
    if why:
        return why
    if case.head_dim not in (64, 128, 256):  # it compiles others too, and reads past their ends
        return "takes head dims 64, 128 and 256"
    return None if installed(packages.FLASHINFER) else "needs the package flashinfer-python"


def _of_triton(name: str) -> Any:
    """A function of our kernels, imported when first called: elsewhere there may be no Triton."""

    def call(*arguments: Any) -> Partial:
        from . import triton_backend

        return getattr(triton_backend, name)(*arguments)

    return call


def _no_triton(case: Case) -> str | None:
    if not installed(("triton",)):
        return "needs the package triton"
    why = _not_of(case, _TO_FLOAT32)
    if why or case.head_dim > 256:
        return why or "takes head dims up to 256"
    if case.device.type == "cpu" and _interpreted():
        wrong = case.dtype == torch.bfloat16
        return "bfloat16 is wrong in Triton's interpreter" if wrong else None
    if case.device.type != "cuda" or not torch.cuda.is_available():
        return _CUDA
    return _no_ampere(case)


def _interpreted() -> bool:
    from . import triton_tools

    return triton_tools.interpreting()


def _no_cuda(case: Case, dtypes: tuple[torch.dtype, ...], most: int) -> str | None:
    """What the fused CUDA attentions share."""
    if case.device.type != "cuda" or not torch.cuda.is_available():
        return _CUDA
    if case.softcap is not None:
        return "has no softcap"
    why = _not_of(case, dtypes)
    if why:
        return why
    if case.head_dim % 8 or case.head_dim > most:
        return f"takes head dims that are multiples of 8 up to {most}"
    return _no_ampere(case)


def _not_of(case: Case, dtypes: tuple[torch.dtype, ...]) -> str | None:
    names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
    return None if case.dtype in dtypes else f"takes {names}"


def _no_ampere(case: Case) -> str | None:
    old = torch.cuda.get_device_capability(case.device) < (8, 0)
    return "needs compute capability 8.0" if old else None


_TABLE = (
    _tiled("torch", _no_torch, _torch, torch_cpu.capped_tile),
    _tiled("cudnn", _no_cudnn, torch_cuda.cudnn),
    _tiled("efficient", _no_efficient, torch_cuda.efficient),
    Backend("triton", _no_triton, *map(_of_triton, ("attend", "attend_cached", "attend_unified"))),
    _tiled("flex", _no_flex, torch_flex.tile),
    _tiled("fa3", _no_fa3, packages.fa3),
    _tiled("fa4", _no_fa4, packages.fa4),
    _tiled("flashinfer", _no_flashinfer, packages.flashinfer),
    Backend("reference", _no_floating, _reference, _reference_cached),
)
BACKENDS = {backend.name: backend for backend in _TABLE}
# By device, or by its class where that was measured (benchmarks/gpu).  cudnn is not picked
# unasked: it builds a graph per shape, hence per decoded token.
_AUTO = {"cpu": ("torch", "reference"), "cuda": ("torch", "efficient", "triton", "reference")}
