"""KV of a text that is kept outside the pages for a while: in host memory, or in a file."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from ringstar.paging import Needs, ShardedCache
from ringstar.tensors import write_tensors
from seqpar import token_count


class Place(Protocol):
    """Somewhere to put tensors by name, and take them back once."""

    def put(self, tensors: dict[str, Tensor]) -> Taken: ...

    def close(self) -> None:
        """What is there is needed no more."""
        ...


class Taken(Protocol):
    """What was put somewhere."""

    def get(self, name: str) -> Tensor: ...


class HostPlace:
    """Host memory: page-locked where the pages are on a GPU, so that copies are fast."""

    def put(self, tensors: dict[str, Tensor]) -> Taken:
        return _InHost({name: _to_host(tensor) for name, tensor in tensors.items()})

    def close(self) -> None:
        """Memory is given back with the documents that are in it."""


class _InHost:
    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


class DiskPlace:
    """A folder of its own, which is gone when the process ends; raises OSError if it is full."""

    def __init__(self, parent: str | None):
        self._folder = tempfile.TemporaryDirectory(prefix="ringstar-", dir=parent)
        self._count = 0

    def put(self, tensors: dict[str, Tensor]) -> Taken:
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.safetensors"
        try:
            write_tensors(path, tensors)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return _OnDisk(path, self._folder)

    def close(self) -> None:
        self._folder.cleanup()

    def __str__(self) -> str:
        return self._folder.name


class _OnDisk:
    def __init__(self, path: Path, folder: object):
        self._path, self._folder = path, folder  # which is there as long as somebody has it
        weakref.finalize(self, path.unlink, missing_ok=True)

    def get(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(name)


class Stowed:
    """The KV of a `ShardedCache`, elsewhere.  Raises OSError if there is no room for it."""

    def __init__(self, cache: ShardedCache, place: Place):
        tables = [cache.of(window) for window in cache.layers]
        self._state = [(table.runs, table.forgotten) for table in tables]
        self._taken = place.put(
            {
                f"{layer}.{index}": tensor
                for _, layer, kv in cache.all_layers()
                for index, tensor in enumerate(kv.tensors)
            }
        )

    def needs(self, cache: ShardedCache) -> Needs:
        """The pages that `restore` takes."""
        counts = [token_count(runs) for runs, _ in self._state]
        pairs = zip(cache.layers, counts, strict=True)
        return Needs({window: cache.of(window).needs(count) for window, count in pairs})

    def restore(self, cache: ShardedCache, ahead: int) -> None:
        """Write it back to pages, with room for `ahead` tokens more in the same row."""
        for window, (runs, forgotten) in zip(cache.layers, self._state, strict=True):
            table = cache.restore(window, runs, forgotten, ahead)
            for layer in table.layers:
                kind = table.view(layer, 0, 0)
                names = [f"{layer}.{index}" for index in range(len(kind.tensors))]
                table.write(layer, 0, kind.of(tuple(self._taken.get(name) for name in names)))


def _to_host(tensor: Tensor) -> Tensor:
    """A copy."""
    room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return room.copy_(tensor)
