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
from transformers import AutoModelForCausalLM

from ringstar.models.tiny import TINY, VOCAB, save_tiny

# those that the broadest tests run; the others have tests of what is particular to them
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
OTHERS = tuple(family for family in TINY if family not in FAMILIES)
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
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{family}-"))
    save_tiny(family, folder, **json.loads(as_json))
    return str(folder)


@functools.cache
def eager(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    """One device's Hugging Face model with eager attention."""
    # "eager" experts too: the fused ones have no float64
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype=dtype
    ).eval()


def fresh(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    """`eager`, with what a longer text left behind forgotten.

    Rotary modules that go by the length of a text (`dynamic`, `longrope`) keep the frequencies of
    the longest one until they see one that is short: results would depend on what ran before.
    """
    model = eager(folder, dtype)
    model(torch.tensor([[0]]), use_cache=False)
    return model


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
    out = fresh(folder).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    twin = fresh(folder, torch.float64)(prompt, logits_to_keep=1).logits[0, -1]
    return Expected(out.logits[0][0].float(), twin, out.sequences[0, len(ids) :].tolist())


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * count + seed)
    return torch.randint(0, VOCAB, (count,), generator=generator).tolist()


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())


def over_bound(logits_V: Tensor, want: Expected) -> float:
    """The relative error as a share of what is allowed: at most 1 is exact.

    Allowed is 1e-5, or 20 times the model's own error in float32, if that is more.
    """
    own = relative_error(want.logits_V, want.logits64_V)
    return relative_error(logits_V, want.logits64_V) / max(1e-5, 20 * own)
