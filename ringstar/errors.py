"""Errors that a user can act on."""

from __future__ import annotations

from seqpar import TransportError

__all__ = ["Refusal", "TransportError", "UserError", "in_a_line"]


class UserError(ValueError):
    """The user's input or configuration is wrong: one line with key, value and what is allowed."""

    def __init__(self, key: str, value: object, allowed: str):
        shown = f"{key}={_short(value)}" if value is not None else key
        super().__init__(f"{shown}: {allowed}")
        self.key, self.value, self.allowed = key, value, allowed


class Refusal(UserError):
    """One that every rank raises at the same point: they are in step, and go on."""


def reason(error: Exception) -> str:
    """Why the system would not, in its words."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def in_a_line(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _short(value: object, limit: int = 120) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
