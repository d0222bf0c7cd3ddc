"""What a saved document says of itself; checked before a byte of its KV is read.

A folder holds `manifest.json` and one folder that it names, with the files that ranks wrote, at
once or part by part.  Saving again makes another such folder, and then replaces the manifest in
one step.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ringstar.errors import UserError
from seqpar import Run, Runs, clip, token_count

FORMAT, VERSION = "ringstar document", 2
NAME = "manifest.json"
DATA = re.compile(r"data-[0-9a-f]{16}")
# a manifest of more is none of ours: runs are few, whatever the length of the text
_MOST_BYTES = 64 << 20
# what there is of a layer, in the order of `KV.tensors`; scales of quantised KV only
WHAT = ("k", "v", "k_scale", "v_scale")


@dataclass(frozen=True)
class Part:
    """What was written at once: positions up to `stop`, after those of the parts before.

    `owned[r]` is what rank r owned of them, in memory order, and `files[r]` the size of its file
    in bytes and its checksum.
    """

    stop: int
    owned: tuple[Runs, ...]
    files: tuple[tuple[int, str], ...]

    def kept(self, rank: int, window: int | None) -> Runs:
        """What layers with this window still had of it: what tokens after `stop` see."""
        return kept(self.owned[rank], window, self.stop)


@dataclass(frozen=True)
class Manifest:
    """A saved document.

    `kv` is the form in which it is kept (`auto`: in `dtype`), `rope` and `strategy` are how it was
    encoded, `length` is that of the whole text; `layers` are those of each window, None for those
    that see everything.
    """

    model: str
    fingerprint: str
    dtype: str
    kv: str
    rope: str
    strategy: dict[str, Any]
    length: int
    data: str
    layers: dict[int | None, tuple[int, ...]]
    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        return self.parts[-1].stop

    @property
    def files(self) -> list[tuple[str, tuple[int, str]]]:
        """The name of every file, its size and its checksum."""
        return [
            (file_name(number, rank), file)
            for number, part in enumerate(self.parts)
            for rank, file in enumerate(part.files)
        ]

    def owned_by(self, world: int) -> tuple[Runs, ...] | None:
        """What each of so many ranks owned; None if others wrote a part of it."""
        if any(len(part.owned) != world for part in self.parts):
            return None
        ranks = zip(*(part.owned for part in self.parts), strict=True)
        return tuple(tuple(run for runs in owned for run in runs) for owned in ranks)

    def to_json(self) -> bytes:
        """With a checksum of everything else."""
        content = asdict(self)
        content["layers"] = [[window, list(each)] for window, each in self.layers.items()]
        for plain, part in zip(content["parts"], self.parts, strict=True):
            plain["owned"] = [[[r.start, r.stop, r.step] for r in runs] for runs in part.owned]
        body = {"format": FORMAT, "version": VERSION, **content}
        return json.dumps({**body, "sha256": _checksum(body)}, indent=1).encode()


def kept(owned: Runs, window: int | None, stop: int) -> Runs:
    """What layers with this window have of `owned`, once positions before `stop` are encoded."""
    return owned if window is None else clip(owned, stop - window + 1)


def file_name(part: int, rank: int) -> str:
    """Of what a rank wrote, in the folder of data."""
    return f"part-{part:05d}-rank-{rank:05d}.safetensors"


def tensor_name(layer: int, what: str) -> str:
    """Of one of `WHAT` of a layer, in a rank's file: (tokens, KV heads, head size), or scales."""
    return f"layers.{layer}.{what}"


def read_manifest(key: str, folder: str) -> tuple[Path, Manifest]:
    """The folder and its manifest; UserError, naming `key`, for what is not one that this reads."""
    try:
        path = Path(folder).expanduser()
    except RuntimeError as error:  # a ~name of nobody
        raise UserError(key, folder, str(error).lower()) from error
    file = path / NAME
    try:
        if not file.is_file():
            raise UserError(key, folder, f"holds no saved document: there is no {NAME}")
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has {file.stat().st_size:,} bytes")
        body = json.loads(file.read_bytes())
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"it is not that of a {FORMAT}")
        if isinstance(body.get("version"), int) and body["version"] > VERSION:
            newer = f"written by a newer ringstar, in format {body['version']}, not {VERSION}"
            raise UserError(key, folder, newer)
        if body.pop("sha256", None) != _checksum(body):
            raise ValueError("its checksum does not match")
        return path, _checked(_parsed(body))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(key, folder, f"damaged {NAME}: {lines[0]}") from error


def is_ours(folder: Path) -> bool:
    """Whether the manifest of a folder is a document's: whole, or damaged beside its data."""
    try:
        return bool(json.loads((folder / NAME).read_bytes())["format"] == FORMAT)
    except (ValueError, KeyError, TypeError):
        return any(DATA.fullmatch(path.name) for path in folder.iterdir())


def _parsed(body: dict[str, Any]) -> Manifest:
    body = {"kv": "auto", **body}  # format 1 knew no other
    fields = {name: body[name] for name in Manifest.__dataclass_fields__}
    fields["layers"] = {window: tuple(map(int, each)) for window, each in fields["layers"]}
    fields["parts"] = tuple(_part(**part) for part in fields["parts"])
    return Manifest(**fields)


def _part(stop: int, owned: Sequence[Any], files: Sequence[Any]) -> Part:
    checked = tuple((int(size), str(checksum)) for size, checksum in files)
    return Part(int(stop), tuple(_runs(each) for each in owned), checked)


def _checked(manifest: Manifest) -> Manifest:
    """Raise ValueError for a manifest that contradicts itself, or names what is not its own."""
    if not DATA.fullmatch(manifest.data):
        raise ValueError(f"it names the folder {manifest.data!r}")
    start = 0
    for part in manifest.parts:
        if not part.files or len(part.owned) != len(part.files):
            raise ValueError("its ranks do not agree")
        if part.stop <= start or sum(map(token_count, part.owned)) != part.stop - start:
            raise ValueError("its tokens are not those of its ranks")
        start = part.stop
    if not start or manifest.length < start:
        raise ValueError("its length is not that of its tokens")
    return manifest


def _runs(plain: Sequence[Sequence[int]]) -> Runs:
    runs = tuple(Run(int(start), int(stop), int(step)) for start, stop, step in plain)
    if any(run.start < 0 or run.step < 1 for run in runs):
        raise ValueError("its positions are not such")
    return runs


def _checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
