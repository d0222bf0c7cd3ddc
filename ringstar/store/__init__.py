"""Encoded documents on disk: written whole or not at all, read at any number of ranks."""

from ringstar.store.identity import fingerprint
from ringstar.store.manifest import Manifest, read_manifest
from ringstar.store.read import (
    check_saved,
    dealt,
    read_ids,
    read_shard,
    saved_by,
    saved_ids,
    saved_needs,
)
from ringstar.store.write import (
    Claim,
    check_place,
    is_saved,
    move_saved,
    remove_saved,
    unfinished_place,
    write_shards,
)

__all__ = [
    "Claim",
    "Manifest",
    "check_place",
    "check_saved",
    "dealt",
    "fingerprint",
    "is_saved",
    "move_saved",
    "read_ids",
    "read_manifest",
    "read_shard",
    "remove_saved",
    "saved_by",
    "saved_ids",
    "saved_needs",
    "unfinished_place",
    "write_shards",
]
