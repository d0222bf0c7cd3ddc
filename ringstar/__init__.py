"""ringstar: answers over documents longer than one device, with unmodified Hugging Face models."""

from ringstar.answers import Answer
from ringstar.attached import Attached, attach, detach
from ringstar.config import CacheConfig, Config, GenerationConfig
from ringstar.errors import UserError
from ringstar.models import ShardedPast
from ringstar.runtime import Document, LongContext
from ringstar.scores import Score

__all__ = [
    "Answer",
    "Attached",
    "CacheConfig",
    "Config",
    "Document",
    "GenerationConfig",
    "LongContext",
    "Score",
    "ShardedPast",
    "UserError",
    "attach",
    "detach",
]
