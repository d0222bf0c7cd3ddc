"""A tiny random chat model: a BPE tokenizer, a chat template, an end token."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

END = "<end>"
LIMIT = 4096
TEMPLATE = (
    "{% for message in messages %}<user>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
LINES = [
    "The ship left the harbour at dawn, and nobody on the quay knew her name.",
    "What's the ship's name (if it has one)? It is [Aurora], said the captain.",
]


@functools.cache
def chat_folder(family: str = "llama", **changes: Any) -> str:
    """A folder with a two-layer model and its tokenizer; `changes` are of the config."""
    logging.disable_progress_bar()
    folder = Path(tempfile.mkdtemp(prefix="tiny-chat-"))
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": LIMIT,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": None,
            **changes,
        },
    )
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte and a few pairs, learned from `LINES`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END, "<user>", "<bot>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, chat_template=TEMPLATE
    )
