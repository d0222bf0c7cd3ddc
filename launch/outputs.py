"""Results on disk: checked before the run, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save
from torch import Tensor

from launch.faults import Fault
from ringstar.config import Config, OutputConfig
from ringstar.errors import UserError
from ringstar.files import write_atomically


def check_writable(output: OutputConfig) -> None:
    """Raise UserError now for what could not be written after a long run."""
    for key, value in (("output.path", output.path), ("output.first_logits", output.first_logits)):
        if value is not None:
            check_file(key, value)
    if output.path and output.first_logits and _same(output.path, output.first_logits):
        raise UserError("output.first_logits", output.first_logits, "is output.path too")


def check_file(key: str, value: str) -> None:
    """Raise UserError if a file of this name could not be written."""
    try:
        _check_file(key, value)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # or a ~name of nobody
        raise UserError(key, value, f"cannot be written: {_reason(error)}") from error


def config_path(path: str) -> Path:
    """Where the resolved config goes: beside the result."""
    return Path(path).expanduser().with_suffix(".config.yaml")


def write_results(config: Config, result: dict[str, Any], first_logits_V: Tensor) -> None:
    """The result, the resolved config beside it, and the first token's logits.

    Raises Fault, naming the option, for what cannot be written.
    """
    output = config.output
    if output.path:
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        write_file("output.path", output.path, text)
        write_file("output.path", config_path(output.path), resolved_config(config))
    if output.first_logits:
        content = save({"first_token_logits": first_logits_V.contiguous()})
        write_file("output.first_logits", output.first_logits, content)


def resolved_config(config: Config) -> str:
    """YAML of every option; text stays text, whatever it looks like."""
    options = asdict(config)
    del options["launch"]["report"]  # means nothing after the run
    return yaml.safe_dump(options, sort_keys=False, allow_unicode=True)


def write_file(key: str, path: str | Path, content: str | bytes) -> None:
    """Write the file that an option names; raises Fault, naming the option, if it cannot be."""
    if isinstance(content, str):
        # a path may hold bytes that are no text
        content = content.encode("utf-8", "surrogateescape")
    try:
        write_atomically(path, content)
    except OSError as error:
        raise Fault(f"{key}={path}: cannot be written: {_reason(error)}") from error


def _check_file(key: str, value: str) -> None:
    path = Path(value).expanduser()
    if not value or value.endswith(os.sep) or path.is_dir():
        raise UserError(key, value, "the name of a file is needed, not a folder")
    others = [config_path(value)] if key == "output.path" else []
    for file in (path, *others):
        if not file.exists():
            continue
        if not file.is_file():  # a device must not be replaced
            raise UserError(key, value, f"{file} is there and is not a regular file")
        file.open("ab").close()
    with tempfile.NamedTemporaryFile(dir=path.resolve().parent):
        pass


def _same(a: str, b: str) -> bool:
    return Path(a).expanduser().resolve() == Path(b).expanduser().resolve()


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
