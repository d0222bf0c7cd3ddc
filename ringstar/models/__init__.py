"""The only part that knows transformers: loading, refusing, and hooking models from outside."""

from ringstar.models.attention import PositionEmbeddings
from ringstar.models.bind import BoundModel
from ringstar.models.families import FAMILIES, SUPPORTED, features
from ringstar.models.load import (
    ModelFiles,
    choose_dtype,
    choose_rope_precision,
    find_model,
    quiet_transformers,
)
from ringstar.models.tiny import TINY, save_tiny

__all__ = [
    "FAMILIES",
    "SUPPORTED",
    "TINY",
    "BoundModel",
    "ModelFiles",
    "PositionEmbeddings",
    "choose_dtype",
    "choose_rope_precision",
    "features",
    "find_model",
    "quiet_transformers",
    "save_tiny",
]
