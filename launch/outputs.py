"""Results on disk: checked before the run, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save
from torch import Tensor

from launch.faults import Fault
from launch.inputs import STDIN, given_paths
from ringstar.config import Config
from ringstar.errors import UserError, reason
from ringstar.files import write_atomically
from ringstar.store import check_place, unfinished_place
from ringstar.trace import trace_path

# options of the config that say which model computes, and how
OF_MODEL = (
    *("model.name", "model.path", "model.dtype", "model.allow_beyond_limit"),
    *("rope", "cache.dtype"),
)


def check_writable(config: Config) -> None:
    """Raise UserError now for what could not be written after a long run."""
    output = config.output
    for key, value in (("output.path", output.path), ("output.first_logits", output.first_logits)):
        if value is not None:
            check_file(key, value)
    if output.path and output.first_logits and same_file(output.path, output.first_logits):
        raise UserError("output.first_logits", output.first_logits, "is output.path too")
    _check_no_input(config)
    _check_no_trace(config)
    if config.document.save is not None:
        check_place("document.save", config.document.save)
        if config.document.checkpoint_every is not None:
            check_place("document.save", unfinished_place(config.document.save))


def _check_no_input(config: Config) -> None:
    """Raise UserError for an output that would take the place of what the run reads."""
    for key, value in _outputs(config):
        for read, given in given_paths(config).items():
            if given != STDIN and same_file(value, given):
                raise UserError(key, value, f"is {read} too, which would be overwritten")


def _check_no_trace(config: Config) -> None:
    """Raise UserError for a file that the trace would take the place of."""
    if not config.profile.path:
        return
    trace = str(trace_path(config.profile))
    for key, value in (*given_paths(config).items(), *_outputs(config)):
        if value != STDIN and same_file(value, trace):
            raise UserError(key, value, "is the trace of profile.path too, which would replace it")


def _outputs(config: Config) -> Iterator[tuple[str, str]]:
    """Every file that the run writes at its end, and the option that says so."""
    output = config.output
    if output.path is not None:
        yield "output.path", output.path
        yield "output.path", str(config_path(output.path))
    if output.first_logits is not None:
        yield "output.first_logits", output.first_logits


def check_file(key: str, value: str) -> None:
    """Raise UserError if a file of this name could not be written."""
    try:
        _check_file(key, value)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # or a ~name of nobody
        raise UserError(key, value, f"cannot be written: {reason(error)}") from error


def config_path(path: str) -> Path:
    """Where the resolved config goes: beside the result."""
    return Path(path).expanduser().with_suffix(".config.yaml")


def write_result(config: Config, result: dict[str, Any]) -> None:
    """The result as JSON, and the resolved config beside it; nothing without output.path.

    Raises Fault, naming the option, for what cannot be written; so do the others.
    """
    if config.output.path:
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        write_file("output.path", config.output.path, text)
        write_config(config, config.output.path)


def write_config(config: Config, path: str) -> None:
    """The resolved config beside what goes to `path`."""
    write_file("output.path", config_path(path), resolved_config(config))


def write_logits(config: Config, first_logits_V: Tensor) -> None:
    """The first token's logits, if they were asked for."""
    if config.output.first_logits:
        content = save({"first_token_logits": first_logits_V.contiguous()})
        write_file("output.first_logits", config.output.first_logits, content)


def check_begun_alike(config: Config, path: str, decisive: Sequence[str]) -> None:
    """Raise UserError if what is in `path` was begun with other settings.

    `decisive` are the keys or sections that must be the same in the resolved config beside it.
    """
    beside, now = config_path(path), asdict(config)
    try:
        before = yaml.safe_load(beside.read_text("utf-8", "surrogateescape"))
        changed = [key for key in decisive if _option(before, key) != _option(now, key)]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        changed = [beside.name]
    if changed:
        why = f"was begun with another {changed[0]} ({beside.name}); give another output.path"
        raise UserError("output.path", path, why)


def _option(options: Any, key: str) -> Any:
    for name in key.split("."):
        options = options[name]
    return options


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
        raise Fault(f"{key}={path}: cannot be written: {reason(error)}") from error


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


def same_file(a: str, b: str) -> bool:
    """Whether two names are of one file; false for a name that none can have."""
    try:
        return _resolved(a) == _resolved(b)
    except (OSError, ValueError, RuntimeError):  # who reads it says what is wrong
        return False


def _resolved(path: str) -> Path:
    return Path(path).expanduser().resolve()
