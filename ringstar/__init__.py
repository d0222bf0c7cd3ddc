"""ringstar: answers over documents longer than one device, with unmodified Hugging Face models."""

from ringstar.answers import Answer
from ringstar.config import Config, GenerationConfig
from ringstar.errors import UserError
from ringstar.runtime import Document, LongContext

__all__ = ["Answer", "Config", "Document", "GenerationConfig", "LongContext", "UserError"]
