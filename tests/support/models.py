"""Tiny random models, and the single-device answers that ours are compared with."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 97
# at the usual 0.02 attention is so flat that a merge that ignores the lse passes
STD = 0.2

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}

_ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 21}
# every other family, with what makes it itself
OTHERS: dict[str, dict[str, Any]] = {
    "cohere2": _ALTERNATE,
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 5.0, **_ALTERNATE},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **_ALTERNATE},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, **_ALTERNATE},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.8},
    "mixtral": {"num_local_experts": 4, "sliding_window": 21},
    "olmo3": _ALTERNATE,
    "phi3": {"sliding_window": 21},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": False},
    "starcoder2": {"sliding_window": 21},
}
# two sets of frequencies, for texts up to 80 positions and for longer ones
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 80,
    "sliding_window": None,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
        "original_max_position_embeddings": 80,
    },
}
# frequencies that fall with the length, past 64 positions
DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}


def tiny_folder(family: str, **changes: Any) -> str:
    """A folder with a two-layer model of `family`: 4 query heads, 2 KV heads of 16."""
    return _tiny_folder(family, json.dumps(changes))


@functools.cache
def _tiny_folder(family: str, as_json: str) -> str:
    changes = json.loads(as_json)
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{family}-"))
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
        **{"max_position_embeddings": 8192, **(FAMILIES | OTHERS)[family], **changes},
    )
    torch.manual_seed(len(family))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@functools.cache
def eager(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    """One device's Hugging Face model with eager attention."""
    # "eager" experts too: the fused ones have no float64
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype=dtype
    ).eval()


@dataclass(frozen=True)
class Expected:
    """What one device says."""

    logits_V: Tensor
    logits64_V: Tensor
    ids: list[int]


def expected(folder: str, ids: list[int], new_tokens: int) -> Expected:
    """First-token logits (float32 and float64) and greedy tokens after `ids`."""
    return _expected(folder, tuple(ids), new_tokens)


@functools.cache
@torch.inference_mode()
def _expected(folder: str, ids: tuple[int, ...], new_tokens: int) -> Expected:
    prompt = torch.tensor([ids])
    out = eager(folder).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    twin = eager(folder, torch.float64)(prompt, logits_to_keep=1).logits[0, -1]
    return Expected(out.logits[0][0].float(), twin, out.sequences[0, len(ids) :].tolist())


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * count + seed)
    return torch.randint(0, VOCAB, (count,), generator=generator).tolist()


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())
