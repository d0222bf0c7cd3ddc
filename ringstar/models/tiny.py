"""Small random models of every supported family, with what makes each of them itself.

They are what shows that a family runs exactly: `python -m launch.models`, and the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ringstar.models.modeling import auto_model

VOCAB = 97
# at the usual 0.02 attention is so flat that a merge that ignores the lse passes
STD = 0.2
WINDOW = 21
_ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}

# model_type -> what its config has beside the sizes
TINY: dict[str, dict[str, Any]] = {
    "cohere2": _ALTERNATE,
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 5.0, **_ALTERNATE},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **_ALTERNATE},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, **_ALTERNATE},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.8},
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": WINDOW},
    "olmo3": _ALTERNATE,
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": False},
    "starcoder2": {"sliding_window": WINDOW},
}


def save_tiny(family: str, folder: Path, **changes: Any) -> None:
    """A model of two layers, 4 query heads and 2 KV heads of 16, the same at every call."""
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=STD,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **{"max_position_embeddings": 8192, **TINY[family], **changes},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(family))
        auto_model().from_config(config).save_pretrained(folder)
