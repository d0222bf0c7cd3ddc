"""What a model's config says about the texts that it can take."""

from __future__ import annotations

from typing import Any

from ringstar.models.families import BY_LENGTH, rope_by_kind, rope_types

# their layers take the window whatever `layer_types` says
_ALL_SLIDE = ("mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2")


class ModelFacts:
    """A config, and what its rope was scaled by (a kind and a factor), if it was not as stored."""

    def __init__(self, config: Any, scaling: tuple[str, float] | None = None):
        self.config, self.scaling = config, scaling

    @property
    def max_positions(self) -> int:
        # `dynamic` reads the config's own value, so that one stays as it is
        stored = self.config.max_position_embeddings
        return int(stored * self.scaling[1]) if self.scaling else stored

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def window(self) -> int | None:
        """The sliding window of some layer, in tokens; None if every layer sees everything."""
        kinds = getattr(self.config, "layer_types", None)
        slides = self.config.model_type in _ALL_SLIDE or not kinds or "sliding_attention" in kinds
        return getattr(self.config, "sliding_window", None) if slides else None

    @property
    def rope_by_length(self) -> bool:
        """Whether rotary frequencies depend on the length of the text."""
        return not BY_LENGTH.isdisjoint(rope_types(self.config))

    @property
    def rope_jumps_after(self) -> int | None:
        """The length of text after which all rotary frequencies are others (longrope)."""
        kinds = rope_by_kind(self.config).values()
        jumps = [
            each["original_max_position_embeddings"]
            for each in kinds
            if each.get("rope_type") == "longrope"
        ]
        return min(jumps, default=None)


def attention_heads(config: Any) -> tuple[int, int, int]:
    """Query heads, KV heads, and the size of one."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads
