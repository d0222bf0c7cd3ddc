"""The table of back ends, and the one place that chooses among them.

A new back end is one line of `_TABLE` (and a place in `_AUTO` if it is to be picked unasked).
B batch, T tokens, H query heads, Hkv KV heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import torch_cpu, torch_cuda
from .band import Band
from .merge import Partial, merge_into
from .reference import Bands, attend_cached_reference, attend_reference
from .tiles import Tile, attend_tiles
from .views import KVView

_HALF = (torch.bfloat16, torch.float16)


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


@dataclass(frozen=True, slots=True)
class Backend:
    """`unsupported` gives the reason why a case cannot run, None if it can.

    Without `attend_cached`, a KVView is read segment by segment through `attend`.
    """

    name: str
    unsupported: Callable[[Case], str | None]
    attend: Attend
    attend_cached: AttendCached | None = None


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
    for name in _AUTO.get(case.device.type, ("reference",)):
        why = BACKENDS[name].unsupported(case)
        if not why:
            passed = f"; passed over {', '.join(refused)}" if refused else ""
            return Choice(BACKENDS[name], f"kernel {name} is the first choice for {what}{passed}.")
        refused.append(f"{name} ({why})")
    raise ValueError(f"kernel=auto: nothing runs {what}: {', '.join(refused)}")


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


def _tiled(name: str, unsupported: Callable[[Case], str | None], tile: Tile) -> Backend:
    def attend(
        q_BTHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        band: Band | None,
        scale: float,
        softcap: float | None,
        into: Partial | None,
    ) -> Partial:
        assert softcap is None  # refused by `unsupported`
        return attend_tiles(tile, q_BTHD, k_BTHD, v_BTHD, band, scale, into)

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
    return "has no softcap" if case.softcap is not None else _no_floating(case)


def _no_cudnn(case: Case) -> str | None:
    why = _no_cuda(case, _HALF, 256)
    if why or case.head_dim <= 128:
        return why
    hopper = torch.cuda.get_device_capability(case.device) == (9, 0)
    return None if hopper else "takes head dims above 128 on Hopper only"


def _no_efficient(case: Case) -> str | None:
    return _no_cuda(case, (*_HALF, torch.float32), 65536)


def _no_cuda(case: Case, dtypes: tuple[torch.dtype, ...], most: int) -> str | None:
    """What PyTorch's fused CUDA attentions share."""
    if case.device.type != "cuda" or not torch.cuda.is_available():
        return "needs a CUDA device"
    if case.softcap is not None:
        return "has no softcap"
    if case.dtype not in dtypes:
        return "takes " + ", ".join(str(d).removeprefix("torch.") for d in dtypes)
    if case.head_dim % 8 or case.head_dim > most:
        return f"takes head dims that are multiples of 8 up to {most}"
    old = torch.cuda.get_device_capability(case.device) < (8, 0)
    return "needs compute capability 8.0" if old else None


_TABLE = (
    _tiled("torch", _no_torch, _torch),
    _tiled("cudnn", _no_cudnn, torch_cuda.cudnn),
    _tiled("efficient", _no_efficient, torch_cuda.efficient),
    Backend("reference", _no_floating, _reference, _reference_cached),
)
BACKENDS = {backend.name: backend for backend in _TABLE}
# By device; cudnn is not picked unasked: it builds a graph per shape, hence per decoded token.
_AUTO = {"cpu": ("torch", "reference"), "cuda": ("torch", "efficient", "reference")}
