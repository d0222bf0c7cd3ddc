"""The only part that knows transformers: loading, refusing, and hooking models from outside."""

from ringstar.models.attention import ForwardContext, PositionEmbeddings
from ringstar.models.bind import BoundModel
from ringstar.models.facts import ModelFacts, attention_heads
from ringstar.models.families import FAMILIES, SUPPORTED, features
from ringstar.models.generating import (
    causal_output,
    check_call,
    check_generation,
    new_tokens,
    sharded_past,
    wanted_logits,
)
from ringstar.models.geometry import LayerShape, Shapes, run_once
from ringstar.models.load import (
    ModelFiles,
    choose_dtype,
    choose_rope_precision,
    find_model,
    quiet_transformers,
)
from ringstar.models.own import check_attachable
from ringstar.models.past import ShardedPast
from ringstar.models.tiny import TINY, save_tiny

__all__ = [
    "FAMILIES",
    "SUPPORTED",
    "TINY",
    "BoundModel",
    "ForwardContext",
    "LayerShape",
    "ModelFacts",
    "ModelFiles",
    "PositionEmbeddings",
    "Shapes",
    "ShardedPast",
    "attention_heads",
    "causal_output",
    "check_attachable",
    "check_call",
    "check_generation",
    "choose_dtype",
    "choose_rope_precision",
    "features",
    "find_model",
    "new_tokens",
    "quiet_transformers",
    "run_once",
    "save_tiny",
    "sharded_past",
    "wanted_logits",
]
