"""The optional packages that tasks and their statistics need."""

from __future__ import annotations

from importlib.util import find_spec

from ringstar.errors import UserError

NEEDED = ("wonderwords", "scipy")


def check_packages() -> None:
    """Raise UserError if one is missing, before a night's work is done for nothing."""
    for name in NEEDED:
        if find_spec(name) is None:
            why = f"{name} is not installed: pip install 'ringstar[evaluate]'"
            raise UserError("evaluate", None, why)
