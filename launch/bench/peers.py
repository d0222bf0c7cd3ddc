"""Other people's generators that run in one process, each by the name that a user gives it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from launch.bench import llama
from launch.bench.peer_room import batch_bytes, eager_bytes, llama_bytes, plain_bytes
from launch.weights import weight_files
from ringstar.errors import in_a_line
from ringstar.memory import free_memory
from ringstar.models import ModelFiles, quiet_transformers
from ringstar.models.one_device import plain_model
from ringstar.models.plain_generate import (
    BatchGenerate,
    PlainGenerate,
    batching_lacks,
    has_attention,
)
from ringstar.models.smollm2 import smollm2_gguf
from ringstar.timed import Generates

# of free memory: as much as the runtime itself takes
_SHARE = 0.8
# bytes for a config, a dtype, a batch, and the tokens of a prompt and of an answer
Needed = Callable[[Any, torch.dtype, int, int, int], int]


@dataclass(frozen=True, slots=True)
class Request:
    """What a peer is to run: which model, on what, and the largest batch that it will get.

    `prompt_tokens` and `new_tokens` are those of each of the `batch` prompts.  llama.cpp takes no
    `dtype`: it computes in what its file has.
    """

    files: ModelFiles
    device: torch.device
    dtype: torch.dtype
    threads: int
    prompt_tokens: int
    new_tokens: int
    batch: int = 1

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True, slots=True)
class Peer:
    """One row of the table.

    `what` is a line for tables, with the version, and with the format of the weights where that is
    not the request's dtype.  `why_not` says in a line why such a request cannot run here, or None;
    it loads nothing, and does not touch a GPU.  `no_room` says so of memory that is free now.
    `make` loads the weights, and takes all `threads` of this process.  With `own_formats` weights
    and KV are not in the request's dtype: how fast they can be read at best is not known.
    """

    what: Callable[[Request], str]
    why_not: Callable[[Request], str | None]
    no_room: Callable[[Request], str | None]
    make: Callable[[Request], AbstractContextManager[Generates]]
    own_formats: bool = False


def _plain(attention: str, needed: Needed) -> Peer:
    def make(request: Request) -> AbstractContextManager[Generates]:
        _begin(request)
        model = plain_model(request.files, request.dtype, request.device, attention)
        return nullcontext(PlainGenerate(model))

    return Peer(
        lambda _: f"transformers {version('transformers')}, generate, {attention}",
        lambda request: _no_attention(request, attention),
        lambda request: _no_room(request, needed),
        make,
    )


def _make_batch(request: Request) -> AbstractContextManager[Generates]:
    _begin(request)
    return nullcontext(
        BatchGenerate(
            request.files,
            request.dtype,
            request.device,
            batch=request.batch,
            tokens=request.tokens,
        )
    )


def _begin(request: Request) -> None:
    quiet_transformers()
    torch.set_num_threads(request.threads)


def _no_attention(request: Request, attention: str) -> str | None:
    if has_attention(request.files, attention):
        return None
    return f"transformers has no {attention} attention for {request.files.config.model_type}"


def _why_not_batch(request: Request) -> str | None:
    if lacks := batching_lacks():
        return f"transformers {version('transformers')} batches without {', '.join(lacks)}"
    return _no_attention(request, "sdpa")


def _no_room(request: Request, needed: Needed, own: bool = False) -> str | None:
    sizes = request.batch, request.prompt_tokens, request.new_tokens
    wanted = _weights(request, own) + needed(request.files.config, request.dtype, *sizes)
    free = int(_SHARE * free_memory(request.device))
    if wanted <= free:
        return None
    return (
        f"needs about {_gib(wanted)}, weights included; {_SHARE:g} of what is free is {_gib(free)}"
    )


def _weights(request: Request, own: bool) -> int:
    """Bytes of weights as they will be in memory; a GGUF file's are widened, but by its `own`."""
    files, gguf = request.files, _gguf(request)
    if gguf is not None and own:
        return gguf.stat().st_size
    if gguf is not None and files.gguf:
        return _elements(gguf) * request.dtype.itemsize
    stored = weight_files(files.folder)
    wider = 1.0 if files.quantised else request.dtype.itemsize / _stored_itemsize(files)
    return int(wider * sum(path.stat().st_size for path in stored))


def _elements(gguf: Path) -> int:
    """Of all weights."""
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(gguf).tensors)


def _stored_itemsize(files: ModelFiles) -> int:
    return (getattr(files.config, "dtype", None) or torch.float32).itemsize


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"


def _what_llama(request: Request) -> str:
    gguf = _gguf(request)
    if gguf is None or not find_spec("llama_cpp"):
        return "llama.cpp"
    form = llama.weights_format(gguf)
    return f"llama-cpp-python {version('llama_cpp_python')}, {form} weights, float16 KV"


def _why_not_llama(request: Request) -> str | None:
    gguf = _gguf(request)
    if not find_spec("llama_cpp"):
        return "needs a package that builds llama.cpp from source: pip install llama-cpp-python"
    if gguf is None:
        return f"needs a GGUF file: {request.files.folder} has none; give one: model.path=FILE.gguf"
    if request.files.scaling:
        return "rope.scaling is not for llama.cpp; allowed: none"
    if request.device.type == "cuda" and not llama.runs_on_gpus():
        return (
            "llama-cpp-python was built without CUDA: CMAKE_ARGS=-DGGML_CUDA=on"
            " pip install --force-reinstall --no-deps --no-cache-dir llama-cpp-python"
        )
    try:
        llama.weights_format(gguf)
    except (RuntimeError, ImportError, OSError) as error:  # or its library does not load
        return in_a_line(error)
    return None


def _make_llama(request: Request) -> AbstractContextManager[Generates]:
    gguf = _gguf(request)
    assert gguf is not None, "asked although it cannot run"
    on_gpu = request.device.type == "cuda"
    return closing(
        llama.LlamaCpp(
            gguf,
            batch=request.batch,
            tokens=request.tokens,
            threads=request.threads,
            gpu=(request.device.index or 0) if on_gpu else None,
        )
    )


def _gguf(request: Request) -> Path | None:
    """The file that the model is, or was converted from."""
    files = request.files
    return files.folder / files.gguf if files.gguf else smollm2_gguf(files.folder)


PEERS: dict[str, Peer] = {
    "hf-eager": _plain("eager", eager_bytes),
    "hf-sdpa": _plain("sdpa", plain_bytes),
    "hf-batch": Peer(
        lambda _: f"transformers {version('transformers')}, generate_batch, sdpa",
        _why_not_batch,
        lambda request: _no_room(request, batch_bytes),
        _make_batch,
    ),
    "llama.cpp": Peer(
        _what_llama,
        _why_not_llama,
        lambda request: _no_room(request, llama_bytes, own=True),
        _make_llama,
        own_formats=True,
    ),
}
