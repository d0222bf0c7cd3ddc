"""KV of a text that is kept outside the pages for a while: in host memory, or in a file."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from ringstar.paging import Needs, ShardedCache
from ringstar.tensors import write_tensors
from seqpar import token_count

# a tensor by name, as pieces (t, ...) that come one after another
Named = tuple[str, Sequence[Tensor]]


class Place(Protocol):
    """Somewhere to put tensors by name, and take them back once."""

    def put(self, tensors: Iterable[Named]) -> Taken: ...


class Taken(Protocol):
    """What was put somewhere."""

    def get(self, name: str) -> Tensor: ...


class HostPlace:
    """Host memory: page-locked where the pages are on a GPU, so that copies are fast."""

    def put(self, tensors: Iterable[Named]) -> Taken:
        return _InHost({name: _to_host(pieces) for name, pieces in tensors})


class _InHost:
    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


class DiskPlace:
    """Files without a name in a folder: however the process ends, they end with it.

    Raises OSError if there is no such folder, and where it is full.
    """

    def __init__(self, folder: str | None):
        self._folder = Path(folder or tempfile.gettempdir()).expanduser()
        with self._new_file():
            pass  # so it can be written

    def put(self, tensors: Iterable[Named]) -> Taken:
        with self._new_file() as file:
            path = Path(f"/dev/fd/{file.fileno()}")
            write_tensors(path, dict(tensors))
            # mapped, so that it is there as long as this is, without an open file for each text
            return _OnDisk(safe_open(path, framework="pt"))

    def __str__(self) -> str:
        return str(self._folder)

    def _new_file(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self._folder)


class _OnDisk:
    def __init__(self, file: safe_open):
        self._file = file

    def get(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class Stowed:
    """The KV of a `ShardedCache`, elsewhere.  Raises OSError if there is no room for it."""

    def __init__(self, cache: ShardedCache, place: Place):
        tables = [cache.of(window) for window in cache.layers]
        self._state = [(table.runs, table.forgotten) for table in tables]
        self._taken = place.put(
            (f"{layer}.{index}", [piece[0] for piece in pieces])
            for _, layer, kv in cache.all_layers()
            for index, pieces in enumerate(kv.pieces)
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
                table.write(layer, 0, kind.of(tuple(self._taken.get(name)[None] for name in names)))


def _to_host(pieces: Sequence[Tensor]) -> Tensor:
    """A copy, in one piece."""
    first, shape = pieces[0], [sum(map(len, pieces)), *pieces[0].shape[1:]]
    try:
        room = torch.empty(shape, dtype=first.dtype, pin_memory=first.is_cuda)
    except RuntimeError as error:  # as CUDA says that the host has no more
        if "out of memory" not in str(error):
            raise
        raise OSError(errno.ENOMEM, str(error)) from error
    for place, piece in zip(room.split([len(piece) for piece in pieces]), pieces, strict=True):
        place.copy_(piece)
    return room
