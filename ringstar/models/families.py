"""Which Hugging Face models run exactly; everything else is refused by name.

Decided from `config.json` alone, before any weight is read.
"""

from __future__ import annotations

from typing import Any

from ringstar.errors import UserError

# model_type -> class that must be named in `architectures`
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# their cos and sin depend on nothing but the position
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def check_family(path: str, config: Any) -> None:
    """Raise UserError unless ring attention is exact for a model with this `config`."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        allowed = ", ".join(sorted(FAMILIES))
        raise UserError("model.path", path, f"model type {kind!r} is not supported; are: {allowed}")
    named = getattr(config, "architectures", None) or [FAMILIES[kind]]
    if FAMILIES[kind] not in named:
        raise UserError(
            "model.path", path, f"holds {', '.join(named)}; a {FAMILIES[kind]} is needed"
        )
    rope = _rope_type(config)
    if rope not in STATIC_ROPE:
        raise UserError(
            "model.path",
            path,
            f"rope type {rope!r} depends on the length of the input and is not supported;"
            f" are: {', '.join(STATIC_ROPE)}",
        )


def _rope_type(config: Any) -> str:
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_type") or parameters.get("type") or "default"
