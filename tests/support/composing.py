"""Options composed once for all tests of a process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

from omegaconf import DictConfig

from launch.options import GENERATE, compose_config


def compose_once(overrides: Sequence[str], root: str = GENERATE.root) -> DictConfig:
    """`compose_config`: Hydra takes tenths of a second, and most tests compose alike."""
    return copy.deepcopy(_composed(tuple(overrides), root))


@functools.cache
def _composed(overrides: tuple[str, ...], root: str) -> DictConfig:
    return compose_config(overrides, root)
