"""Where a command's picture goes, checked before anything is computed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from launch.outputs import check_file, same_file
from ringstar.errors import UserError

NO_MATPLOTLIB = "matplotlib is not installed: pip install 'ringstar[plots]'"


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def picture_path(asked: str | None, output: str | None) -> str | None:
    """As asked, else beside the output if that can be drawn; None if there is none."""
    if asked is not None or output is None or not can_draw():
        return asked
    return str(Path(output).expanduser().with_suffix(".png"))


def check_picture(key: str, asked: str | None, output: str | None) -> None:
    """Raise UserError, naming the option `key`, for a picture that could not be made."""
    path = picture_path(asked, output)
    if path is None:
        return
    if not can_draw():
        raise UserError(key, path, NO_MATPLOTLIB)
    if not path.endswith(".png"):
        raise UserError(key, path, "allowed: a name that ends in .png")
    check_file(key, path)
    if output and same_file(path, output):
        raise UserError(key, path, "is output.path too")
