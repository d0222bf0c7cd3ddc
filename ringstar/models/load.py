"""Reading a model and its tokenizer from local disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from ringstar.config import ModelConfig, RopeConfig
from ringstar.errors import UserError, in_a_line, reason
from ringstar.models.attention import NAME, register_attention
from ringstar.models.bind import BoundModel, bind
from ringstar.models.extend import extend
from ringstar.models.facts import ModelFacts
from ringstar.models.families import check_family
from ringstar.models.geometry import run_once
from ringstar.models.modeling import auto_model
from ringstar.models.quantised import check_quantised, quantised
from ringstar.models.smollm2 import smollm2_folder
from ringstar.prompt import PromptFormat, continuing_ids, opening_ids, prompt_format
from ringstar.tensors import stored_dtype

# transformers patches its classes while it loads, and two loads at once leave them patched
_LOADING = threading.Lock()

# A float32 angle near 2¹⁷ is rounded by up to 2⁻⁸ = 0.004, and its cos and sin with it: the last
# bit of bfloat16 just below 1.  Up to there angles stay what transformers computes, and with them
# the answers; past it that error exceeds bfloat16's, and doubles with the length of the text.
FLOAT32_POSITIONS = 2**17
_UP_TO = f"up to {FLOAT32_POSITIONS:,}"

# what Hugging Face changes logits by, also where it is greedy, and what asks for nothing
_CHANGES = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
}

# what it samples from fewer tokens by, and what leaves all
_LIMITS = {"top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class ModelFiles(ModelFacts):
    """A checked model whose weights are not loaded yet: config, tokenizer, prompt format."""

    def __init__(
        self,
        folder: Path,
        gguf: str | None,
        config: Any,
        scaling: tuple[str, float] | None = None,
    ):
        super().__init__(config, scaling)
        self.folder, self.gguf = folder, gguf

    @property
    def name(self) -> str:
        """What people call it: the GGUF file, or the folder."""
        return self.gguf or self.folder.absolute().name

    @property
    def quantised(self) -> str | None:
        """How the weights are quantised, in words; a GGUF file's are widened, and so are not."""
        return None if self.gguf else quantised(self.config)

    @cached_property
    def tokenizer(self) -> Any | None:
        """The model's own tokenizer; None if the folder has none (token ids need none)."""
        if not self.gguf and not any((self.folder / name).is_file() for name in _TOKENIZER_FILES):
            return None
        try:
            return AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, **self._gguf_arguments
            )
        except Exception as error:
            raise UserError(
                "model.path", self.folder, f"unusable tokenizer: {in_a_line(error)}"
            ) from error

    @cached_property
    def prompt(self) -> PromptFormat:
        """How a chat prompt is split into document and question."""
        return prompt_format(self._needed_tokenizer())

    def dated(self, day: datetime) -> ModelFiles:
        """The same files, but that a chat template which prints the date prints this."""
        other = copy(self)
        other.prompt = prompt_format(self._needed_tokenizer(), day)
        return other

    def context_ids(self, document: str) -> list[int]:
        """The document's token ids behind whatever the chat template puts first."""
        return self.prompt.context_ids(self._needed_tokenizer(), document)

    def plain_ids(self, text: str) -> list[int]:
        """A text's token ids with nothing of a chat around it."""
        return opening_ids(self._needed_tokenizer(), text)

    def next_query_ids(self, question: str) -> list[int]:
        """The token ids of a question that follows an answer."""
        return self.prompt.next_query_ids(self._needed_tokenizer(), question)

    def more_ids(self, text: str) -> list[int]:
        """Token ids of a text that follows a document."""
        return continuing_ids(self._needed_tokenizer(), text)

    def query_ids(self, question: str) -> list[int]:
        """The question's token ids up to where the answer begins."""
        return self.prompt.query_ids(self._needed_tokenizer(), question)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; empty if there is no tokenizer."""
        return self.tokenizer.decode(ids, skip_special_tokens=True) if self.tokenizer else ""

    def end_tokens(self) -> frozenset[int]:
        """Every token id that ends an answer: generation_config.json's, else the config's."""
        own = None if self.gguf else self._generation_config().get("eos_token_id")
        ends = self.config.eos_token_id if own is None else own
        if ends is None:
            ends = getattr(self.tokenizer, "eos_token_id", None)
        listed = ends if isinstance(ends, list) else [ends]
        return frozenset(token for token in listed if token is not None)

    def changes_to_logits(self) -> list[str]:
        """What generation_config.json asks Hugging Face's own generation for, and not us."""
        own = {} if self.gguf else self._generation_config()
        return [name for name, none in _CHANGES.items() if own.get(name) not in (None, none, [])]

    def sampling_limits(self) -> list[str]:
        """What generation_config.json limits Hugging Face's own sampling by, top_k left out."""
        own = {} if self.gguf else self._generation_config()
        return [name for name, none in _LIMITS.items() if own.get(name) not in (None, none)]

    def _generation_config(self) -> dict[str, Any]:
        path = self.folder / "generation_config.json"
        try:
            content = json.loads(path.read_text()) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise UserError("model.path", path, f"unusable: {in_a_line(error)}") from error
        if not isinstance(content, dict):
            raise UserError("model.path", path, "unusable: not a JSON object")
        return content

    def load(
        self,
        settings: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        rope_precision: str = "float32",
    ) -> BoundModel:
        """Read the weights; a missing, damaged or ill-shaped one is an error, never random."""
        register_attention()
        try:
            model, report = load_weights(
                self,
                device,
                config=None if self.gguf else self.config,
                dtype=dtype,
                attn_implementation=NAME,
                output_loading_info=True,
            )
        except MemoryError:
            raise
        except Exception as error:
            raise UserError(
                "model.path", self.folder, f"weights cannot be loaded: {in_a_line(error)}"
            ) from error
        missing = sorted(report.get("missing_keys", ()))
        spare = sorted(k for k in report.get("unexpected_keys", ()) if not _is_derived(k))
        for what, keys in (("lack", missing), ("do not fit the config: they also hold", spare)):
            if keys:
                raise UserError(
                    "model.path",
                    self.folder,
                    f"weights {what} {len(keys)} tensors, {keys[0]} first",
                )
        bound = bind(
            model if self.quantised else model.to(device),
            ff_slice_tokens=settings.ff_slice_tokens,
            rope_precision=rope_precision,
        )
        if self.quantised:
            self._try_quantised(bound, settings.dtype)
        return bound

    def _try_quantised(self, bound: BoundModel, asked_dtype: str) -> None:
        try:
            run_once(bound)
        except Exception as error:
            dtype = str(bound.dtype).removeprefix("torch.")
            why = f"{self.quantised} do not run in {dtype} on {bound.device}: {in_a_line(error)}"
            if asked_dtype != "auto":
                raise UserError("model.dtype", asked_dtype, f"{why}; allowed: auto") from error
            raise UserError("model.path", self.folder, why) from error

    @property
    def _gguf_arguments(self) -> dict[str, str]:
        return {"gguf_file": self.gguf} if self.gguf else {}

    def _needed_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UserError(
                "model.path", self.folder, "has no tokenizer; give token ids: document.ids_path"
            )
        return self.tokenizer


def load_weights(files: ModelFiles, device: torch.device, **arguments: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained` for local files, one at a time in this process.

    Only quantised weights are then on `device`: some of their layers are made for it, and cannot
    move.  Those of a GGUF file are widened.
    """
    if files.gguf:
        arguments |= {
            "gguf_file": files.gguf,
            "quantization_config": GgufConfig(dequantize=True),
        }
    if files.scaling:
        arguments.setdefault("config", files.config)
    if files.quantised:
        arguments["device_map"] = {"": device}
    with _LOADING:
        return auto_model().from_pretrained(files.folder, local_files_only=True, **arguments)


def _is_derived(key: str) -> bool:
    """Tensors that old checkpoints hold although they follow from the config."""
    return key.endswith("rotary_emb.inv_freq") or key == "lm_head.weight"


def find_model(settings: ModelConfig, rope: RopeConfig | None = None) -> ModelFiles:
    """Check `model.path` by its config alone, and scale its rope as asked; raises UserError."""
    if settings.name == "smollm2" and settings.path is None:
        settings = replace(settings, path=str(smollm2_folder(settings.cache_dir)))
    if not settings.path:
        raise UserError("model.path", None, "missing: a local Hugging Face folder or a GGUF file")
    path = _path_of(settings.path)
    gguf = path.name if path.is_file() else None
    if gguf and path.suffix != ".gguf":
        raise UserError("model.path", settings.path, "a file must be a .gguf; else give a folder")
    if not gguf and not (path / "config.json").is_file():
        raise UserError("model.path", settings.path, "the folder has no config.json")
    folder = path.parent if gguf else path
    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, **({"gguf_file": gguf} if gguf else {})
        )
    except Exception as error:
        raise UserError(
            "model.path", settings.path, f"unusable config: {in_a_line(error)}"
        ) from error
    check_family(settings.path, config)
    if not gguf:
        check_quantised(settings.path, config)
        if getattr(config, "dtype", None) is None:  # the weights say it, as to transformers
            files = sorted(folder.glob("*.safetensors"))
            config.dtype = stored_dtype(files[0]) if files else None
    return ModelFiles(folder, gguf, config, _scale(config, gguf, rope or RopeConfig()))


def _path_of(given: str) -> Path:
    """That of a model; UserError if there is none, or it may not be looked at."""
    try:
        path = Path(given).expanduser()
        if path.exists():
            (path / "config.json").exists()  # a folder that may not be entered
            return path
        why = "no such file or folder"
    except (OSError, ValueError, RuntimeError) as error:  # the last: a ~name of nobody
        why = f"cannot be read: {reason(error)}"
    raise UserError("model.path", given, why)


def _scale(config: Any, gguf: str | None, rope: RopeConfig) -> tuple[str, float] | None:
    """Scale the rope of `config` as asked; what was done, if anything."""
    asked = rope.asked_scaling
    if asked is None:
        return None
    if gguf:
        why = "a GGUF file is loaded by the config inside it; allowed: none, or a folder"
        raise UserError("rope.scaling", rope.scaling, why)
    extend(config, *asked)
    return asked


def choose_rope_precision(
    rope: RopeConfig, files: ModelFacts, *, beyond_limit: bool
) -> tuple[str, str]:
    """float32 or float64 for rotary angles, and why; the same for every text of this model."""
    if rope.precision != "auto":
        return rope.precision, "as asked"
    if beyond_limit:
        return "float64", "model.allow_beyond_limit=true: texts may have any length"
    longest = files.max_positions
    if longest > FLOAT32_POSITIONS:
        return "float64", f"texts of up to {longest:,} positions; float32 is for {_UP_TO}"
    return "float32", f"as the model's own, for up to {longest:,} positions"


def choose_dtype(
    settings: ModelConfig, config: Any, device: torch.device
) -> tuple[torch.dtype, str]:
    """The dtype to run in, and why.

    Of quantised weights it is that of everything else, and of what the products are made in.
    """
    small = quantised(config)
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype), f"as asked; {small}" if small else "as asked"
    stored = getattr(config, "dtype", None) or torch.float32
    if small:  # not widened: the scales of some would keep the dtype that they have
        return stored, f"as stored; {small}"
    if stored == torch.float16 and device.type == "cpu":
        return torch.float32, "float16 weights, widened because a CPU computes float16 slowly"
    return stored, "as the weights are stored"


def quiet_transformers() -> None:
    """Its warnings and bars are about ways of loading that a user here did not choose."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
