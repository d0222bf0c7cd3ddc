"""Which Hugging Face models run exactly; everything else is refused by name.

Decided from `config.json` alone, before any weight is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ringstar.errors import UserError

# model_type -> class that must be named in `architectures`; written by `python -m launch.models`
SUPPORTED = Path(__file__).with_name("supported.json")
FAMILIES: dict[str, str] = json.loads(SUPPORTED.read_text())

_RECURRENT = "has recurrent layers, whose state is not KV that can be split over ranks"
_SHARED_KV = "shares KV between layers"
_OWN_ATTENTION = "computes attention in its own code, which nothing can stand in for"
# why others are not: those that people ask for; the rest are untried
_REASONS = {
    "bamba": _RECURRENT,
    "bloom": "adds ALiBi biases to its scores, and takes an attention function without calling it",
    "falcon": _OWN_ATTENTION,
    "falcon_h1": _RECURRENT,
    "falcon_mamba": _RECURRENT,
    "gemma3": "is multimodal; its text model alone is gemma3_text",
    "gemma3n": _SHARED_KV,
    "gemma3n_text": _SHARED_KV,
    "gemma4": _SHARED_KV,
    "gemma4_text": _SHARED_KV,
    "gptj": _OWN_ATTENTION,
    "granitemoehybrid": _RECURRENT,
    "jamba": _RECURRENT,
    "lfm2": "has convolutions between tokens, which need neighbours from other ranks",
    "llama4": "makes positions and chunked masks itself, from what one rank sees",
    "llama4_text": "makes positions and chunked masks itself, from what one rank sees",
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "mpt": "adds ALiBi biases to its scores",
    "nemotron_h": _RECURRENT,
    "qwen3_5": _RECURRENT,
    "qwen3_next": _RECURRENT,
    "recurrent_gemma": _RECURRENT,
    "rwkv": _RECURRENT,
    "zamba": _RECURRENT,
    "zamba2": _RECURRENT,
}

_NO_WINDOWS = {"llama", "granite"}

# rope whose frequencies depend on the length of the text
BY_LENGTH = {"dynamic", "longrope"}
ROPE = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


def check_family(path: str, config: Any, key: str = "model.path") -> None:
    """Raise UserError unless ring attention is exact for a model with this `config`."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        allowed = ", ".join(sorted(FAMILIES))
        why = f"model type {kind!r} is not supported: it {_reason(config)}; are: {allowed}"
        raise UserError(key, path, why)
    named = getattr(config, "architectures", None) or [FAMILIES[kind]]
    if FAMILIES[kind] not in named:
        raise UserError(key, path, f"holds {', '.join(named)}; a {FAMILIES[kind]} is needed")
    for name, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
        if bool(getattr(config, name, causal)) is not causal:
            why = f"config.{name}={not causal}: its tokens see later ones; allowed: {causal}"
            raise UserError(key, path, why)
    _check_windows(path, config, key)
    for rope in rope_types(config):
        if rope not in ROPE:
            allowed = ", ".join(ROPE)
            raise UserError(key, path, f"rope type {rope!r} is not supported; are: {allowed}")


def _check_windows(path: str, config: Any, key: str) -> None:
    """Raise UserError where a config's windows are not those of its layers."""
    window, kind = getattr(config, "sliding_window", None), config.model_type
    named = getattr(config, "layer_types", None) is not None  # which the cache goes by
    for name in ("sliding_window", "attention_chunk_size"):
        value = getattr(config, name, None)
        has_none = kind in _NO_WINDOWS or name == "attention_chunk_size"
        if value is not None and has_none and not named:
            why = (
                f"config.{name}={value}: layers of {kind} have none, but Hugging Face's cache drops"
                " what it would hide; allowed: null"
            )
            raise UserError(key, path, why)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if kind == "smollm3" and slides and window and not config.use_sliding_window:
        why = (
            "config.use_sliding_window=false with sliding_attention among layer_types: Hugging"
            " Face's own attention functions differ about it; allowed: one or the other"
        )
        raise UserError(key, path, why)


def features(config: Any) -> list[str]:
    """What this config has that not every model has, in words."""
    found = []
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if window and (not kinds or "sliding_attention" in kinds):
        found.append("windows in some layers" if "full_attention" in kinds else "windows")
    if getattr(config, "attn_logit_softcapping", None):
        found.append("softcap")
    if config.model_type == "gpt_oss":
        found.append("sinks")
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        found.append("experts")
    if getattr(config, "no_rope_layers", None):
        found.append("layers without rope")
    return found + sorted(f"rope {rope}" for rope in rope_types(config) - {"default"})


def _reason(config: Any) -> str:
    """Why this model type is refused, in words that follow "it"."""
    known = _REASONS.get(getattr(config, "model_type", None) or "")
    if known:
        return known
    if getattr(config, "is_encoder_decoder", False):
        return "has an encoder and a decoder"
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        return "is multimodal"
    if getattr(config, "auto_map", None):
        return "brings its own code, which is not run"
    return "was not shown to be exact"


def rope_types(config: Any) -> set[str]:
    """Of all layers, or of each kind of them."""
    return {
        each.get("rope_type") or each.get("type") or "default"
        for each in rope_by_kind(config).values()
    }


def rope_by_kind(config: Any) -> dict[str | None, dict[str, Any]]:
    """Rope parameters of each kind of layers that has its own; of all layers under None."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = {kind: each for kind, each in parameters.items() if isinstance(each, dict)}
    return nested or {None: parameters}
