"""The only part that knows transformers: loading, refusing, and hooking models from outside."""

from ringstar.models.attention import PositionEmbeddings
from ringstar.models.bind import BoundModel
from ringstar.models.families import FAMILIES
from ringstar.models.load import ModelFiles, choose_dtype, find_model, quiet_transformers

__all__ = [
    "FAMILIES",
    "BoundModel",
    "ModelFiles",
    "PositionEmbeddings",
    "choose_dtype",
    "find_model",
    "quiet_transformers",
]
