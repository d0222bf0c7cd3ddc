"""What is evaluated: exact, and settings of star whose sizes may be shares of the document."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction

from launch.compare_star import exact_setting, parse_star
from ringstar.checks import check_fits
from ringstar.config import Config, StarConfig, StrategyConfig, token_size
from ringstar.errors import UserError
from ringstar.models import ModelFiles

KEY = "evaluate.star"
EXACT = "exact"
NONE = "none"  # exact alone is evaluated
DEFAULT = ("block_size=1/4", "block_size=1/8")
_NAMES = {"half": "1/2", "quarter": "1/4", "eighth": "1/8", "sixteenth": "1/16"}
_SIZES = ("block_size", "anchor_size")
_OTHERS = [field.name for field in fields(StarConfig) if field.name not in ("name", *_SIZES)]
_SHARE = re.compile(r"([1-9]\d{0,3})/([1-9]\d{0,3})")


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to encode: what tables call it, and what a user wrote; `exact` has no sizes."""

    label: str
    given: str = ""
    exact: StrategyConfig | None = None
    key: str = KEY

    def strategy(self, tokens: int) -> StrategyConfig:
        """Its settings for a document of `tokens`; raises UserError for what fits no document."""
        if self.exact is not None:
            return self.exact
        words = [_sized(self.key, self.given, word, tokens) for word in self.given.split()]
        try:
            return parse_star(" ".join(words), self.key)
        except UserError as error:  # as it was written, not as it was sized
            raise UserError(self.key, self.given, error.allowed) from error

    def fitting(
        self, config: Config, files: ModelFiles, world: int, context: int, query: int, new: int
    ) -> StrategyConfig:
        """Its settings for so many tokens; raises UserError if they or the model take no such."""
        strategy = self.strategy(context)
        check_fits(replace(config, strategy=strategy), files, world, context, query, new)
        return strategy


def contenders(given: Sequence[str], world: int) -> tuple[list[Contender], str]:
    """Exact and the settings of star, and how exact is encoded; raises UserError."""
    setting, why = exact_setting(world)
    found = [Contender(EXACT, exact=setting.strategy)]
    if list(given) == [NONE]:
        return found, why
    known: dict[str, str] = {}
    for text in given or DEFAULT:
        star = Contender(label_of(text), text)
        same = known.setdefault(label_of(" ".join(map(_counted, text.split()))), text)
        if len(known) < len(found):
            raise UserError(KEY, text, f"is the same as {same}")
        found.append(star)
    return found, why


def _counted(word: str) -> str:
    """`block_size=1K` as `block_size=1024`, `=2/8` as `=1/4`: the same, however it is written."""
    name, _, value = word.partition("=")
    value = _NAMES.get(value, value)
    if name not in _SIZES or value == "null":
        return word
    if "/" in value:
        share = Fraction(value)
        return f"{name}={share.numerator}/{share.denominator}"
    return f"{name}={token_size(value)}"


def label_of(text: str, key: str = KEY) -> str:
    """Sizes as they were written, and what is not as usual; UserError for what none can mean."""
    # whether sizes fit each other depends on the document, if one is a share of it
    others = [word for word in text.split() if _sized(key, text, word, 1) == word]
    star = parse_star(" ".join(others), key) if others or not text.split() else StarConfig()
    written = dict(word.partition("=")[::2] for word in text.split())
    sizes = {name: _NAMES.get(size, size) for name, size in written.items() if name in _SIZES}
    if sizes.get("block_size", "null") == "null":
        raise UserError(key, text, "block_size is needed: tokens, or a share as 1/4 or quarter")
    anchor = sizes.get("anchor_size", "null")
    parts = [f"star {sizes['block_size']}"]
    if anchor != "null":
        parts.append("no anchor" if anchor == "0" else f"anchor {anchor}")
    usual = StarConfig()
    parts += [
        f"{name.removeprefix('anchor_')} {getattr(star, name)}"
        for name in _OTHERS
        if getattr(star, name) != getattr(usual, name)
    ]
    return ", ".join(parts)


def _sized(key: str, text: str, word: str, tokens: int) -> str:
    """`block_size=1/4` with that share of the document's tokens, rounded up; else as it was."""
    name, _, value = word.partition("=")
    value = _NAMES.get(value, value)
    if name not in _SIZES or "/" not in value:
        return word
    share = _SHARE.fullmatch(value)
    if share is None or int(share[1]) > int(share[2]):
        raise UserError(key, text, f"{word}: allowed: tokens as 1K, or a share up to 1, as 1/4")
    return f"{name}={-(-tokens * int(share[1]) // int(share[2]))}"
