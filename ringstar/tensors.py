"""A safetensors file, without a second copy of more than one piece of what goes into it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# safetensors' names
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
}


def stored_dtype(path: Path) -> torch.dtype | None:
    """Of a file's first floating-point tensor; None if there is none, or the file is damaged.

    8 bits are how weights are kept, not what a model computes in.
    """
    wide = [dtype for dtype in DTYPES if dtype.is_floating_point and dtype.itemsize > 1]
    floating = {DTYPES[dtype]: dtype for dtype in wide}
    try:
        with safe_open(path, "pt") as file:
            names = (file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
            return next((floating[name] for name in names if name in floating), None)
    except (OSError, SafetensorError):
        return None


def write_tensors(path: Path, tensors: Mapping[str, Sequence[Tensor]]) -> tuple[int, str]:
    """Write them one by one, wherever they are; the file's size in bytes and its SHA-256.

    Each is given as pieces (t, ...), one after another.  Raises OSError.
    """
    header, at = {}, 0
    for name, pieces in tensors.items():
        offsets = [at, at := at + sum(piece.nbytes for piece in pieces)]
        shape = [sum(map(len, pieces)), *pieces[0].shape[1:]]
        header[name] = {"dtype": DTYPES[pieces[0].dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:  # over what a stopped run may have left
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for piece in chain.from_iterable(tensors.values()):
            content = piece.contiguous().cpu().flatten().view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()
