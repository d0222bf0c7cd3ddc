"""Reading a document, by the same ranks that saved it or by others."""

from __future__ import annotations

import hashlib
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ringstar.errors import UserError, in_a_line
from ringstar.metrics import gather_integers
from ringstar.paging import Needs
from ringstar.shard import TextShard
from ringstar.store.manifest import (
    WHAT,
    Manifest,
    file_name,
    kept,
    read_manifest,
    tensor_name,
)
from seqpar import Layout, LayoutKind, Runs, Transport, positions, token_count

log = logging.getLogger("ringstar")

_PIECE_BYTES = 16 << 20


def read_ids(path: Path, manifest: Manifest) -> list[int]:
    """The token ids of a saved document."""
    ids: list[int] = []
    for number in range(len(manifest.parts)):
        with safe_open(path / manifest.data / file_name(number, 0), framework="pt") as file:
            ids += file.get_tensor("ids").tolist()
    if len(ids) != manifest.tokens:
        raise ValueError(f"there are {len(ids)} token ids for {manifest.tokens} tokens")
    return ids


def saved_ids(key: str, folder: str) -> list[int]:
    """The same, for a folder that nobody has looked at; raises UserError, naming `key`."""
    path, manifest = read_manifest(key, folder)
    try:
        return read_ids(path, manifest)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(key, folder, f"damaged: {in_a_line(error)}") from error


def saved_by(key: str, folder: str) -> tuple[dict[str, Any], int]:
    """The settings of the strategy that encoded it, and on how many ranks; raises UserError."""
    _, manifest = read_manifest(key, folder)
    return manifest.strategy, len(manifest.parts[0].owned)


def check_saved(transport: Transport, path: Path, manifest: Manifest) -> str | None:
    """Check every file against its checksum, each on one rank; what is wrong, on every rank."""
    files = manifest.files
    wrong = [
        number
        for number in range(transport.rank, len(files), transport.world_size)
        if _checksum(path / manifest.data / files[number][0]) != files[number][1]
    ]
    first = min(gather_integers(transport, [wrong[0] if wrong else len(files)])[0])
    if first == len(files):
        return None
    return f"damaged: {manifest.data}/{files[first][0]} is not as it was written"


def dealt(manifest: Manifest, layout: LayoutKind, transport: Transport) -> tuple[Runs, ...]:
    """What each of these ranks takes of a saved document.

    As many ranks as saved it take what each of them had; others are dealt it by `layout`.
    """
    world = transport.world_size
    anew = Layout(layout, 0, manifest.tokens, world)
    return manifest.owned_by(world) or tuple(anew.runs(rank) for rank in range(world))


def saved_needs(shard: TextShard, manifest: Manifest, owned: Runs) -> Needs:
    """The pages that `owned` takes in a text that is empty."""
    return Needs(
        {
            window: shard.cache.of(window).needs(token_count(kept(owned, window, manifest.tokens)))
            for window in shard.cache.layers
        }
    )


def read_shard(
    transport: Transport,
    path: Path,
    manifest: Manifest,
    owned: tuple[Runs, ...],
    shard: TextShard,
    room: int,
) -> str | None:
    """This rank's share of a document whose files were checked; what is wrong on some rank.

    `shard` is empty until now, `owned` is what each rank takes; `room` tokens more will fit.
    """
    failed = 0
    try:
        _read_into(shard, transport, path / manifest.data, manifest, owned, room)
    except (SafetensorError, OSError, ValueError) as error:
        log.debug("reading a document", exc_info=error)
        failed = 1
    if any(gather_integers(transport, [failed])[0]):
        return f"damaged: {manifest.data} does not hold what the manifest says"
    shard.keep()
    return None


def _read_into(
    shard: TextShard,
    transport: Transport,
    data: Path,
    manifest: Manifest,
    owned: tuple[Runs, ...],
    room: int,
) -> None:
    if manifest.layers != shard.cache.layers:
        raise ValueError(f"it has the layers {manifest.layers}, not {shard.cache.layers}")
    shard.grow(manifest.tokens, owned)
    with SavedRanks(data, manifest) as saved:
        for window, layers in manifest.layers.items():
            wanted = kept(owned[transport.rank], window, manifest.tokens)
            forgotten = 0 if window is None else max(0, manifest.tokens - window + 1)
            held = shard.cache.restore(window, wanted, forgotten, room)
            sources = _sources(manifest, window, wanted)
            for layer in layers:
                kind = held.view(layer, 0, 0)
                names = [tensor_name(layer, what) for what in WHAT[: len(kind.tensors)]]
                forms = zip(names, kind.tensors, strict=True)
                whole = [saved.gathered(*form, window, wanted, sources) for form in forms]
                held.write(layer, 0, kind.of(tuple(whole)))


# a part and a rank of it, which of its tokens, and which of ours they are
Source = tuple[tuple[int, int], Tensor, Tensor]


def _sources(manifest: Manifest, window: int | None, wanted: Runs) -> list[Source]:
    """Where the positions `wanted` are, in which part and with which rank."""
    ours = torch.tensor(positions(wanted), dtype=torch.int64)
    found = []
    for number, part in enumerate(manifest.parts):
        for rank in range(len(part.owned)):
            theirs = torch.tensor(positions(part.kept(rank, window)), dtype=torch.int64)
            if len(theirs):
                ordered, order = theirs.sort()
                near = torch.searchsorted(ordered, ours).clamp(max=len(ordered) - 1)
                here = (ordered[near] == ours).nonzero().flatten()
                found.append(((number, rank), order[near[here]], here))
    return [source for source in found if len(source[1])]


class SavedRanks(AbstractContextManager["SavedRanks"]):
    """The open files of a saved document."""

    def __init__(self, data: Path, manifest: Manifest):
        self._data, self._manifest = data, manifest
        self._files: dict[tuple[int, int], Any] = {}

    def gathered(
        self, name: str, like: Tensor, window: int | None, wanted: Runs, sources: list[Source]
    ) -> Tensor:
        """A tensor (1, tokens, …) of a layer at the positions `wanted`, in the form of `like`."""
        whole = [self._tensor(place, name, like, window) for place, _, _ in sources]
        if len(whole) == 1 and len(sources[0][1]) == len(whole[0]) == token_count(wanted):
            _, take, to = sources[0]
            if torch.equal(take, to):
                return whole[0].unsqueeze(0)
        made = torch.empty(token_count(wanted), *like.shape[2:], dtype=like.dtype)
        for (_, take, to), tensor in zip(sources, whole, strict=True):
            made[to] = tensor[take]
        return made.unsqueeze(0)

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def _tensor(
        self, place: tuple[int, int], name: str, like: Tensor, window: int | None
    ) -> Tensor:
        number, rank = place
        tokens = token_count(self._manifest.parts[number].kept(rank, window))
        tensor = self._slice(place, name)[:]
        if tensor.shape != (tokens, *like.shape[2:]) or tensor.dtype != like.dtype:
            raise ValueError(f"{name} of {place} is {tuple(tensor.shape)} {tensor.dtype}")
        return tensor

    def _slice(self, place: tuple[int, int], name: str) -> Any:
        if place not in self._files:
            self._files[place] = safe_open(self._data / file_name(*place), framework="pt")
        return self._files[place].get_slice(name)


def _checksum(path: Path) -> tuple[int, str]:
    """Size and checksum of a file; nothing that a manifest has, if it cannot be read."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
                size += len(piece)
    except OSError:
        return -1, ""
    return size, digest.hexdigest()
