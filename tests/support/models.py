"""Tiny random models, and the single-device answers that ours are compared with."""

from __future__ import annotations

import functools
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


@functools.cache
def tiny_folder(family: str, **changes: Any) -> str:
    """A folder with a two-layer model of `family`: 4 query heads, 2 KV heads of 16."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{family}-"))
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=STD,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **{**FAMILIES[family], **changes},
    )
    torch.manual_seed(len(family))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@functools.cache
def eager(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    """One device's Hugging Face model with eager attention."""
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=dtype
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
