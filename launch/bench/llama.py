"""llama.cpp on a GGUF file, through the C interface that `llama-cpp-python` carries.

The package's own `Llama.eval` reads one text at a time, and hides its logits; the functions below
it take several texts in one call, and give the logits of the tokens that are asked for.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ringstar.timed import Timed

# llama.cpp's own: tokens of one call, which it cuts into passes of 512
CALL_TOKENS = 2048


class LlamaCpp:
    """A model in the format that its file has, with a float16 KV cache for `batch` texts.

    `tokens` is how long each text may get.  `gpu` is the CUDA device that holds all layers, or
    None for the CPU.  Raises RuntimeError for a file or a size that llama.cpp does not take.
    """

    def __init__(
        self,
        gguf: Path,
        *,
        batch: int,
        tokens: int,
        threads: int,
        gpu: int | None = None,
    ):
        self._c = _library()
        settings = self._c.llama_model_default_params()
        settings.n_gpu_layers = 0 if gpu is None else -1
        settings.main_gpu, settings.split_mode = gpu or 0, self._c.LLAMA_SPLIT_MODE_NONE
        self._model = _load(self._c, gguf, settings)
        settings = self._c.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = batch * _whole_pages(tokens), batch
        settings.n_batch = CALL_TOKENS
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = 1  # on
        settings.offload_kqv = settings.op_offload = gpu is not None
        self._context = self._c.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {batch} x {tokens} tokens")
        self._vocab = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model))
        self._call = _Call(self._c, batch)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timed:
        """Greedy tokens to prompts of one length; raises RuntimeError if llama.cpp fails."""
        found = Timed(time.perf_counter(), [[] for _ in prompts], [[] for _ in prompts])
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), False)
        tokens_BT, start = np.array(prompts, dtype=np.int32), 0
        for _ in range(new_tokens):
            step = list(self._step(tokens_BT, start))  # nobody goes on before all are read
            now = time.perf_counter()
            for text, token in step:
                found.token_s[text].append(now)
                found.ids[text].append(token)
            start += tokens_BT.shape[1]
            tokens_BT = np.array([ids[-1:] for ids in found.ids], dtype=np.int32)
        return found

    def close(self) -> None:
        """Give back what it holds; nothing can be generated afterwards."""
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)

    def _step(self, tokens_BT: np.ndarray, start: int) -> Iterator[tuple[int, int]]:
        """Read new tokens of each text from position `start`; each text and what follows it."""
        texts, places = np.indices(tokens_BT.shape, dtype=np.int32).reshape(2, -1)
        tokens, last = tokens_BT.reshape(-1), places == tokens_BT.shape[1] - 1
        for cut in range(0, len(tokens), CALL_TOKENS):
            part = slice(cut, cut + CALL_TOKENS)
            batch = self._call.fill(tokens[part], texts[part], places[part] + start, last[part])
            status = self._c.llama_decode(self._context, batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            for index in np.flatnonzero(last[part]).tolist():
                yield int(texts[part][index]), self._greedy(index)

    def _greedy(self, index: int) -> int:
        logits = self._c.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab,)).argmax())


class _Call:
    """The arrays of one call, which llama.cpp reads in place."""

    def __init__(self, library: Any, texts: int):
        self._tokens, self._places = np.zeros((2, CALL_TOKENS), dtype=np.int32)
        self._wanted = np.zeros(CALL_TOKENS, dtype=np.int8)
        self._one_each = np.ones(CALL_TOKENS, dtype=np.int32)
        self._texts = np.arange(texts, dtype=np.int32)
        self._addresses = self._texts.ctypes.data + self._texts.itemsize * np.arange(texts)
        self._where = np.zeros(CALL_TOKENS, dtype=np.uintp)  # each token's text, by address
        arrays: dict[str, np.ndarray] = {
            "token": self._tokens,
            "pos": self._places,
            "n_seq_id": self._one_each,
            "seq_id": self._where,
            "logits": self._wanted,
        }
        self._batch = library.llama_batch()
        kinds = dict(self._batch._fields_)
        for name, array in arrays.items():
            setattr(self._batch, name, ctypes.cast(array.ctypes.data, kinds[name]))

    def fill(
        self, tokens: np.ndarray, texts: np.ndarray, places: np.ndarray, wanted: np.ndarray
    ) -> Any:
        """The same batch each time, with these tokens in it."""
        count = self._batch.n_tokens = len(tokens)
        self._tokens[:count], self._places[:count] = tokens, places
        self._wanted[:count] = wanted
        self._where[:count] = self._addresses[texts]
        return self._batch


def weights_format(gguf: Path) -> str:
    """What most weights of a GGUF file are stored in, such as `Q4_1`; raises RuntimeError."""
    library, number = _library(), ctypes.create_string_buffer(16)
    settings = library.llama_model_default_params()
    settings.vocab_only = True
    model = _load(library, gguf, settings)
    library.llama_model_meta_val_str(model, b"general.file_type", number, len(number))
    library.llama_model_free(model)
    return library.llama_ftype_name(int(number.value or -1)).decode()


def runs_on_gpus() -> bool:
    """Whether the package was built to."""
    return bool(_library().llama_supports_gpu_offload())


def _whole_pages(tokens: int) -> int:
    """Rounded up to what llama.cpp cuts KV into, as it warns of all else."""
    return -(-tokens // 256) * 256


def _load(library: Any, gguf: Path, settings: Any) -> Any:
    model = library.llama_model_load_from_file(str(gguf).encode(), settings)
    if not model:
        raise RuntimeError(f"llama.cpp cannot read {gguf}")
    return model


def _library() -> Any:
    """The functions of its C interface, which then say nothing but errors."""
    import llama_cpp

    llama_cpp.llama.set_verbose(False)
    return llama_cpp.llama_cpp
