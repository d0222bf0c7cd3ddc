"""What is compared: exact, and settings of star as a user writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

from ringstar.config import (
    Config,
    DenseConfig,
    RingConfig,
    StarConfig,
    StrategyConfig,
    check,
)
from ringstar.errors import UserError
from ringstar.strategies import blocks_of

KEY = "compare.star"
_FIELDS = tuple(field.name for field in fields(StarConfig) if field.name != "name")
_MAY_BE_NULL = ("block_size", "anchor_size", "anchor_token")
_INTEGERS = ("anchor_token", "anchor_seed")


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to encode the document: what tables call it, and what a user wrote for it."""

    label: str
    strategy: StrategyConfig
    given: str | None = None


def exact_setting(world: int) -> tuple[Setting, str]:
    """The side that is held for true, and why it is encoded like this."""
    if world > 1:
        return Setting("exact (ring)", RingConfig()), f"ring over {world} ranks"
    return Setting("exact (dense)", DenseConfig()), "dense, because there is one rank"


def star_settings(given: Sequence[str], tokens: int, world: int) -> list[Setting]:
    """The settings of star that a user wrote, for a document of `tokens`; raises UserError."""
    found: dict[str, Setting] = {}
    for text in given:
        star = parse_star(text)
        with blamed(text):
            label = star_label(star, tokens, world)
        if label in found:
            raise UserError(KEY, text, f"is the same as {found[label].given}")
        found[label] = Setting(label, star, text)
    return list(found.values())


def default_settings(tokens: int, world: int) -> list[Setting]:
    """Blocks of a quarter and an eighth behind whole anchors, and a quarter behind none."""
    quarter, eighth = -(-tokens // 4), -(-tokens // 8)
    texts = [f"block_size={quarter}", f"block_size={eighth}", f"block_size={quarter} anchor_size=0"]
    found: dict[str, Setting] = {}
    for text in texts:
        star = parse_star(text)
        label = star_label(star, tokens, world)
        found.setdefault(label, Setting(label, star, text))  # of few tokens they can be the same
    return list(found.values())


def parse_star(text: str, key: str = KEY) -> StarConfig:
    """`block_size=1K anchor_size=256` as a StarConfig; raises UserError."""
    values: dict[str, int | str | None] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals or name not in _FIELDS:
            raise UserError(key, text, f"{word}: allowed: FIELD=VALUE of {', '.join(_FIELDS)}")
        if name in values:
            raise UserError(key, text, f"{name} is given twice; once is allowed")
        values[name] = _value(key, text, name, value)
    if not values:
        raise UserError(key, text, f"is empty; allowed: FIELD=VALUE of {', '.join(_FIELDS)}")
    star = StarConfig(**values)  # type: ignore[arg-type]  # what `check` finds wrong it refuses
    with blamed(text, key):
        check(Config(strategy=star))
    return star


@contextmanager
def blamed(text: str, key: str = KEY) -> Iterator[None]:
    """What is wrong with a strategy inside is said of the setting that was written so."""
    try:
        yield
    except UserError as error:
        raise UserError(key, text, str(error).replace("strategy.", "")) from error


def star_label(star: StarConfig, tokens: int, world: int) -> str:
    """What tells a setting from others, for tables; raises UserError for unfit sizes."""
    blocks = blocks_of(star, tokens, world)
    assert blocks is not None
    if blocks.count == 1:
        return "star, one block"
    parts = [f"star {blocks.size:,}"]
    parts.append(f"anchor {blocks.anchor:,}" if blocks.anchor else "no anchor")
    return ", ".join([*parts, *(_others(star) if blocks.anchor else ())])


def _others(star: StarConfig) -> Iterator[str]:
    """What is not as usual about its anchor."""
    usual = StarConfig()
    for name in _FIELDS:
        value = getattr(star, name)
        if name not in ("block_size", "anchor_size") and value != getattr(usual, name):
            yield f"{name.removeprefix('anchor_')} {value}"


def _value(key: str, text: str, name: str, value: str) -> int | str | None:
    if value == "null" and name in _MAY_BE_NULL:
        return None
    if name not in _INTEGERS:
        return value
    try:
        return int(value)
    except ValueError as error:
        raise UserError(key, text, f"{name}={value}: allowed: an integer") from error
