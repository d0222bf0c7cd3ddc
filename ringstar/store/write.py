"""Writing a document: every rank its own file, then one manifest that makes them count."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringstar.errors import UserError
from ringstar.metrics import gather_integers
from ringstar.shard import TextShard
from ringstar.store.manifest import DATA, NAME, Manifest, file_name, tensor_name
from seqpar import Transport

# beside the KV: headers and the manifest
_SPARE_BYTES = 1 << 20
# safetensors' names
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
# a manifest that is being written
_MAKING = f".{NAME}-"
_FOREIGN = errno.ENOTEMPTY  # the folder holds something else


def write_shards(
    transport: Transport,
    shard: TextShard,
    ids: Sequence[int],
    folder: Path,
    facts: dict[str, Any],
) -> str | None:
    """Write one rank's part of a document; every rank makes the same call.

    `facts` are the fields of `Manifest` that the shard does not know.  Returns what went wrong,
    the same on every rank; what `folder` held before is then as it was.
    """
    shard.rewind()
    shard.cache.forget(shard.tokens)
    shard.keep()
    data = folder / f"data-{_agreed(transport, secrets.randbits(62)):016x}"
    tensors = _tensors(shard, ids if transport.rank == 0 else ())
    sizes = gather_integers(transport, [sum(t.nbytes for t in tensors.values())])[0]
    needed = sum(sizes) + _SPARE_BYTES
    made = [0, 0, 0, 0, 0]  # size, and a checksum as four numbers

    def write() -> None:
        data.mkdir(parents=True, exist_ok=True)
        size, checksum = _write(data / file_name(transport.rank), tensors)
        made[:] = [size, *_as_integers(checksum)]

    def commit() -> None:
        _check_sizes(data, files)
        owned, layers = shard.owned, shard.cache.layers
        own = {"tokens": shard.tokens, "length": shard.length, "owned": owned, "layers": layers}
        manifest = Manifest(**{**facts, **own, "data": data.name, "files": files})
        _replace(folder / NAME, manifest.to_json())
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


def check_place(key: str, folder: str) -> None:
    """Raise UserError, naming `key`, for a folder that a document could not be saved to."""
    path = Path(folder).expanduser()
    try:
        _check_room(path, 0)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        code = error.errno or errno.EIO
        why = _in_words(0, code, 0) if code == _FOREIGN else os.strerror(code).lower()
        raise UserError(key, folder, why) from error


def _tensors(shard: TextShard, ids: Sequence[int]) -> dict[str, Tensor]:
    """What this rank's file holds: k and v of each layer; rank 0's the token ids too."""
    tensors = {"ids": torch.tensor(list(ids), dtype=torch.int64)} if ids else {}
    for layer, kv in shard.cache.all_layers():
        tensors[tensor_name(layer, "k")] = kv.k_BTHD[0]
        tensors[tensor_name(layer, "v")] = kv.v_BTHD[0]
    return tensors


def _write(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """A safetensors file, tensor by tensor; its size and its checksum."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        offsets = [at, at := at + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            file.write(piece)
        for tensor in tensors.values():
            content = tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _check_room(folder: Path, needed: int) -> None:
    """Raise OSError unless `folder` is a place for a document of so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    others = [p for p in folder.iterdir() if p.name != NAME and not DATA.fullmatch(p.name)]
    if others and not (folder / NAME).exists():
        raise OSError(_FOREIGN, "")
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, "")


def _check_sizes(data: Path, files: Sequence[tuple[int, str]]) -> None:
    """Raise OSError unless every rank's file is here as that rank wrote it."""
    for rank, (size, _) in enumerate(files):
        if (data / file_name(rank)).stat().st_size != size:
            raise OSError(errno.EIO, "")
    _sync(data)


def _replace(path: Path, content: bytes) -> None:
    making = path.with_name(f"{_MAKING}{secrets.token_hex(8)}")
    try:
        with making.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(making, path)
    except BaseException:
        making.unlink(missing_ok=True)
        raise
    _sync(path.parent)


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
        elif path.name.startswith(_MAKING):
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


def _in_words(rank: int, code: int, needed: int) -> str:
    if code == _FOREIGN:
        return "is a folder that holds other things; allowed: a new one, or a saved document's"
    if code == errno.ENOENT:
        return f"rank {rank} does not see what other ranks wrote; a folder that all share is needed"
    return f"rank {rank}: {os.strerror(code).lower()}; {needed:,} bytes are needed"


def _agreed(transport: Transport, number: int) -> int:
    return gather_integers(transport, [number])[0][0]


def _as_integers(checksum: str) -> list[int]:
    parts = bytes.fromhex(checksum)
    return [int.from_bytes(parts[i : i + 8], "little", signed=True) for i in range(0, 32, 8)]


def _as_text(parts: Sequence[int]) -> str:
    return b"".join(part.to_bytes(8, "little", signed=True) for part in parts).hex()
