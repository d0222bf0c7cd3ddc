"""What a saved document says of itself; checked before a byte of its KV is read.

A folder holds `manifest.json` and one folder that it names, with a file for each rank.  Saving
again makes another such folder, and then replaces the manifest in one step.
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

FORMAT, VERSION = "ringstar document", 1
NAME = "manifest.json"
DATA = re.compile(r"data-[0-9a-f]{16}")
# a manifest of more is none of ours: runs are few, whatever the length of the text
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Manifest:
    """A saved document.

    `rope` and `strategy` are how it was encoded; `owned[r]` is what rank r owned, in memory
    order, `files[r]` the size of its file in bytes and its checksum.  `layers` are those of each
    window, None for those that see everything.
    """

    model: str
    fingerprint: str
    dtype: str
    rope: str
    strategy: dict[str, Any]
    tokens: int
    length: int
    data: str
    files: tuple[tuple[int, str], ...]
    owned: tuple[Runs, ...]
    layers: dict[int | None, tuple[int, ...]]

    def kept(self, owned: Runs, window: int | None) -> Runs:
        """What layers with this window still have of `owned`: what later tokens see."""
        return owned if window is None else clip(owned, self.tokens - window + 1)

    def to_json(self) -> bytes:
        """With a checksum of everything else."""
        content = asdict(self)
        content["owned"] = [[[r.start, r.stop, r.step] for r in runs] for runs in self.owned]
        content["layers"] = [[window, list(each)] for window, each in self.layers.items()]
        body = {"format": FORMAT, "version": VERSION, **content}
        return json.dumps({**body, "sha256": _checksum(body)}, indent=1).encode()


def file_name(rank: int) -> str:
    """Of a rank's part, in the folder of data."""
    return f"rank-{rank:05d}.safetensors"


def tensor_name(layer: int, what: str) -> str:
    """Of k or v (tokens, KV heads, head size) of a layer, in a rank's file."""
    return f"layers.{layer}.{what}"


def read_manifest(key: str, folder: str) -> tuple[Path, Manifest]:
    """The folder and its manifest; UserError, naming `key`, for what is not one that this reads."""
    path = Path(folder).expanduser()
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


def _parsed(body: dict[str, Any]) -> Manifest:
    fields = {name: body[name] for name in Manifest.__dataclass_fields__}
    fields["files"] = tuple((int(size), str(checksum)) for size, checksum in fields["files"])
    fields["owned"] = tuple(_runs(each) for each in fields["owned"])
    fields["layers"] = {window: tuple(map(int, each)) for window, each in fields["layers"]}
    return Manifest(**fields)


def _checked(manifest: Manifest) -> Manifest:
    """Raise ValueError for a manifest that contradicts itself, or names what is not its own."""
    if not DATA.fullmatch(manifest.data):
        raise ValueError(f"it names the folder {manifest.data!r}")
    if not manifest.files or len(manifest.owned) != len(manifest.files):
        raise ValueError("its ranks do not agree")
    if manifest.tokens < 1 or sum(map(token_count, manifest.owned)) != manifest.tokens:
        raise ValueError("its tokens are not those of its ranks")
    if manifest.length < manifest.tokens:
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
