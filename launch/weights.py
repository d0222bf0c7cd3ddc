"""The model's files, and what can be found wrong with them without reading weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ringstar.checks import choose_kernel
from ringstar.config import Config
from ringstar.errors import UserError
from ringstar.models import ModelFiles, find_model, quiet_transformers

_KINDS = ("*.safetensors", "pytorch_model*.bin")


def usable_model(config: Config) -> ModelFiles:
    """The model's files; raises UserError if it could not be run, before its weights load."""
    quiet_transformers()
    files = find_model(config.model, config.rope)
    if not torch.cuda.is_available():  # ranks with GPUs ask on theirs, before weights load
        choose_kernel(config, files, torch.device("cpu"))
    check_weights(files)
    return files


def check_weights(files: ModelFiles) -> None:
    """Raise UserError for weights that are missing, cut off, or no safetensors at all.

    Only headers are read; a GGUF file is checked when it is loaded.
    """
    folder = files.folder
    if files.gguf:
        return
    found = sorted(path for kind in _KINDS for path in folder.glob(kind))
    if not found:
        raise UserError("model.path", folder, "the folder has no weights (*.safetensors)")
    for path in (*found, *_indexed(folder)):
        if path.suffix == ".safetensors":
            _check_header(folder, path)


def weight_files(folder: Path) -> list[Path]:
    """Those that transformers reads: others beside them may hold the same weights once more."""
    single = folder / "model.safetensors"
    named = [single] if single.is_file() else _indexed(folder)
    return named or next(filter(None, (list(folder.glob(kind)) for kind in _KINDS)), [])


def _indexed(folder: Path) -> list[Path]:
    """The files that an index of several speaks of."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        return sorted(
            {folder / name for name in json.loads(index.read_bytes())["weight_map"].values()}
        )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError("model.path", folder, f"{index.name} cannot be understood") from error


def _check_header(folder: Path, path: Path) -> None:
    try:
        with safe_open(path, "pt"):  # compares the header with the size of the file
            pass
    except (OSError, SafetensorError) as error:
        what = f"{path.name} is missing or damaged: {str(error).splitlines()[0]}"
        raise UserError("model.path", folder, what) from error
