"""The optional packages that tasks and their statistics need."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version

from ringstar.errors import UserError

# with the first version that has what is used
NEEDED = {"wonderwords": "3", "scipy": "1.15"}


def check_packages() -> None:
    """Raise UserError if one is missing or old, before a night's work is done for nothing."""
    for name, least in NEEDED.items():
        if find_spec(name) is None:
            found = "is not installed"
        elif Version(there := version(name)) < Version(least):
            found = f"{there} is too old, {least} is needed"
        else:
            continue
        raise UserError("evaluate", None, f"{name} {found}: pip install 'ringstar[evaluate]'")
