"""Writing a document: every rank its own file, then one manifest that makes them count."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringstar.errors import UserError
from ringstar.files import UNFINISHED, lock, write_atomically
from ringstar.metrics import gather_integers
from ringstar.shard import TextShard
from ringstar.store.manifest import (
    DATA,
    NAME,
    WHAT,
    Manifest,
    Part,
    file_name,
    is_ours,
    kept,
    tensor_name,
)
from ringstar.tensors import write_tensors
from seqpar import Runs, Transport, clip, token_count

log = logging.getLogger("ringstar")
_POLL_S = 0.2
# beside the KV: headers and the manifest
_SPARE_BYTES = 1 << 20
_FOREIGN = errno.ENOTEMPTY  # the folder holds something else


def write_shards(
    transport: Transport,
    shard: TextShard,
    ids: Sequence[int],
    folder: Path,
    facts: dict[str, Any],
    before: Manifest | None = None,
) -> str | None:
    """Write one rank's part of a document; every rank makes the same call.

    `facts` are the fields of `Manifest` that the shard does not know.  With `before`, which is
    what `folder` holds, only what comes after that is written.  Returns what went wrong, the same
    on every rank; what `folder` held is then as it was.
    """
    shard.rewind()
    shard.cache.forget(shard.tokens)
    shard.keep()
    start, number = (before.tokens, len(before.parts)) if before else (0, 0)
    owned = tuple(clip(runs, start) for runs in shard.owned)
    new = f"data-{_agreed(transport, secrets.randbits(62)):016x}"
    data = folder / (before.data if before else new)
    own_ids = ids[start:] if transport.rank == 0 else ()
    tensors = _tensors(shard, owned[transport.rank], own_ids)
    own = sum(piece.nbytes for pieces in tensors.values() for piece in pieces)
    sizes = gather_integers(transport, [own])[0]
    needed = sum(sizes) + _SPARE_BYTES
    made = [0, 0, 0, 0, 0]  # size, and a checksum as four numbers

    def write() -> None:
        data.mkdir(parents=True, exist_ok=True)
        size, checksum = write_tensors(data / file_name(number, transport.rank), tensors)
        made[:] = [size, *_as_integers(checksum)]

    def commit() -> None:
        _check_sizes(data, number, files)
        parts = (*(before.parts if before else ()), Part(shard.tokens, owned, files))
        own = {"length": shard.length, "layers": shard.cache.layers, "parts": parts}
        manifest = Manifest(**{**facts, **own, "data": data.name})
        write_atomically(folder / NAME, manifest.to_json())
        _sync(folder)
        _sweep(folder, data)

    wrong = _first_wrong(transport, lambda: _check_room(folder, needed), only=0)
    wrong = wrong or _first_wrong(transport, write)
    gathered = zip(*gather_integers(transport, made), strict=True)
    files = tuple((size, _as_text(checksum)) for size, *checksum in gathered)
    wrong = wrong or _first_wrong(transport, commit, only=0)
    if wrong is None:
        return None
    if transport.rank == 0:
        _discard(folder, data)
    return _in_words(*wrong, needed)


class Claim:
    """On rank 0 the right to write to a folder, which is made, until it is given back."""

    def __init__(self, folder: Path):
        self._folder, self._handle = folder, -1
        self._made = False

    def take(self, transport: Transport, *, wait: bool) -> str | None:
        """Every rank makes this call; returns what went wrong, the same on each.

        Where another run has the folder it is waited for, if `wait`.
        """
        wrong = _first_wrong(transport, lambda: self._take(transport, wait), only=0)
        return None if wrong is None else _in_words(*wrong)

    def _take(self, transport: Transport, wait: bool) -> None:
        self._made = not self._folder.exists()
        self._folder.mkdir(parents=True, exist_ok=True)
        _check_content(self._folder)
        self._handle = os.open(self._folder, os.O_RDONLY)
        if wait and not lock(self._handle):
            log.info(f"another run is saving to {self._folder}: waiting for it")
        while not lock(self._handle):
            if not wait:
                raise OSError(errno.EWOULDBLOCK, "")
            transport.check_running()
            time.sleep(_POLL_S)

    def give_back(self) -> None:
        """Other runs may write there again; a folder that was made in vain goes."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        if self._made:
            with suppress(OSError):
                self._folder.rmdir()


def unfinished_place(folder: str) -> str:
    """Where the beginning of a document is kept until it is whole, and is saved to `folder`."""
    return f"{folder.rstrip('/')}.unfinished"


def is_saved(folder: str) -> bool:
    """Whether there is a document, finished or not, or what is left of one."""
    return (Path(folder).expanduser() / NAME).exists()


def move_saved(transport: Transport, source: Path, target: Path) -> bool:
    """Rename a document's folder, if nothing is where it goes; false if something is."""

    def rename() -> None:
        os.rename(source, target)  # over an empty folder too
        _sync(target.parent)

    return _first_wrong(transport, rename, only=0) is None


def remove_saved(transport: Transport, folder: Path) -> None:
    """Remove a document's folder: first its manifest, without which the rest is nothing."""

    def remove() -> None:
        (folder / NAME).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    _first_wrong(transport, remove, only=0)


def check_place(key: str, folder: str) -> None:
    """Raise UserError, naming `key`, for a folder that a document could not be saved to."""
    try:
        path = Path(folder).expanduser().absolute()
        if path.exists():
            _check_content(path)
        # ranks ask at the same time, so that nothing is made or left that another could take for
        # somebody else's
        nearest = next(each for each in (path, *path.parents) if each.exists())
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=UNFINISHED):
            pass
    except OSError as error:
        code = error.errno or errno.EIO
        why = _in_words(0, code) if code == _FOREIGN else os.strerror(code).lower()
        raise UserError(key, folder, why) from error
    except RuntimeError as error:  # a ~name of nobody
        raise UserError(key, folder, str(error).lower()) from error


def _tensors(shard: TextShard, owned: Runs, ids: Sequence[int]) -> dict[str, list[Tensor]]:
    """What this rank's file holds: each layer's KV at `owned`, which came last; and `ids`.

    Each as pieces (t, ...), without a copy.
    """
    tensors = {"ids": [torch.tensor(list(ids), dtype=torch.int64)]} if ids else {}
    for window, layer, kv in shard.cache.all_layers():
        last = kv.tokens - token_count(kept(owned, window, shard.tokens))
        written = kv.slice(last, kv.tokens).pieces
        for what, pieces in zip(WHAT, written, strict=False):
            tensors[tensor_name(layer, what)] = [piece[0] for piece in pieces]
    return tensors


def _check_room(folder: Path, needed: int) -> None:
    """Raise OSError unless `folder` is a place for a document of so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    _check_content(folder)
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, "")


def _check_content(folder: Path) -> None:
    """Raise OSError if `folder` holds what no save has left, and no document."""
    others = [path.name for path in folder.iterdir() if not _is_left(path)]
    if others and not (NAME in others and is_ours(folder)):
        raise OSError(_FOREIGN, "")


def _is_left(path: Path) -> bool:
    """Whether it is what a save that was stopped may leave."""
    return path.name.startswith(UNFINISHED) or bool(DATA.fullmatch(path.name))


def _check_sizes(data: Path, part: int, files: Sequence[tuple[int, str]]) -> None:
    """Raise OSError unless every rank's file is here as that rank wrote it."""
    for rank, (size, _) in enumerate(files):
        if (data / file_name(part, rank)).stat().st_size != size:
            raise OSError(errno.EIO, "")
    _sync(data)


def _sync(folder: Path) -> None:
    """Let a folder's own entries reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _discard(folder: Path, data: Path) -> None:
    """Remove what was written in vain; not what a manifest names that may have reached the disk."""
    try:
        named = data.name.encode() in (folder / NAME).read_bytes()
    except FileNotFoundError:
        named = False
    except OSError:
        named = True
    if not named:
        shutil.rmtree(data, ignore_errors=True)


def _sweep(folder: Path, data: Path) -> None:
    """Remove what earlier saves left, finished or not."""
    for path in folder.iterdir():
        if DATA.fullmatch(path.name) and path != data:
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(UNFINISHED):
            path.unlink(missing_ok=True)


def _first_wrong(
    transport: Transport, work: Callable[[], None], only: int | None = None
) -> tuple[int, int] | None:
    """Do one step on all ranks, or on one; the first rank that failed, and its errno."""
    code = 0
    try:
        if only in (None, transport.rank):
            work()
    except OSError as error:
        code = error.errno or errno.EIO
    codes = gather_integers(transport, [code])[0]
    return next(((rank, code) for rank, code in enumerate(codes) if code), None)


def _in_words(rank: int, code: int, needed: int = 0) -> str:
    if code == _FOREIGN:
        return "is a folder that holds other things; allowed: a new one, or a saved document's"
    if code == errno.ENOENT:
        return f"rank {rank} does not see what other ranks wrote; a folder that all share is needed"
    if code == errno.EWOULDBLOCK:
        return "another run is writing to it; let it end, or save elsewhere"
    bytes_needed = f"; {needed:,} bytes are needed" if needed else ""
    return f"rank {rank}: {os.strerror(code).lower()}{bytes_needed}"


def _agreed(transport: Transport, number: int) -> int:
    return gather_integers(transport, [number])[0][0]


def _as_integers(checksum: str) -> list[int]:
    parts = bytes.fromhex(checksum)
    return [int.from_bytes(parts[i : i + 8], "little", signed=True) for i in range(0, 32, 8)]


def _as_text(parts: Sequence[int]) -> str:
    return b"".join(part.to_bytes(8, "little", signed=True) for part in parts).hex()
