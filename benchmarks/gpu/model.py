"""A whole model on one card: our encode of a long document against Hugging Face's forward.

The weights are random and live in memory only.  T tokens, C hidden size, H query heads,
Hkv KV heads, D head dim.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, DynamicCache

import localflash
from benchmarks.gpu.encode import backends, thousands
from benchmarks.gpu.timing import Bench, Row, Section, relative_error
from ringattn import RingStrategy
from ringstar.engine import RankEngine
from ringstar.models import quiet_transformers, run_once
from ringstar.models.bind import bind
from ringstar.models.modeling import auto_model
from ringstar.paging import PagePool, Storage
from ringstar.shard import TextShard
from seqpar import ThreadWorld, Transport

TOKENS, WARM_TOKENS, CHUNKS = 131072, 2048, (8192, 32768)
FEWER_LAYERS, FULL_RUN_S, FIRST_RUN_S = 8, 120.0, 20.0
FF_SLICE_TOKENS = 8192
# what transformers calls its attentions; sdpa with the kernel that PyTorch is told to use
SDPA = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


@dataclass(frozen=True)
class Llama:
    """The shape of a llama; by default that of the 8B one."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    mlp: int = 14336
    vocab: int = 128256

    @property
    def dim(self) -> int:
        return self.hidden // self.heads

    @property
    def linear_weights(self) -> int:
        """Of all layers: q, k, v, o and the three of the MLP; embeddings multiply nothing."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.dim
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    def flops(self, tokens: int) -> int:
        """Of a causal forward without logits: linear layers, and the two products of attention."""
        pairs = tokens * (tokens + 1) // 2
        attention = 4 * self.heads * self.dim * pairs * self.layers
        return 2 * tokens * self.linear_weights + attention

    def make(self, device: str, dtype: torch.dtype, positions: int) -> Any:
        """An unmodified Hugging Face model with random weights, made on `device`."""
        config = AutoConfig.for_model(
            "llama",
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=positions,
            rope_theta=500000.0,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.device(device):
            model = auto_model().from_config(config, dtype=dtype, attn_implementation="sdpa")
        return model.eval()


@dataclass(frozen=True)
class Sizes:
    """Tokens of the document, of the short one that warms up and is checked, of our chunks."""

    tokens: int = TOKENS
    warm: int = WARM_TOKENS
    chunks: tuple[int, ...] = CHUNKS


def run(
    bench: Bench,
    llama: Llama | None = None,
    sizes: Sizes | None = None,
    kernels: Sequence[str] | None = None,
    attentions: Mapping[str, SDPBackend] = SDPA,
) -> Section:
    """Seconds, TFLOP/s and share of the matmul ceiling; Hugging Face first, on the same weights."""
    quiet_transformers()
    sizes = sizes or Sizes()
    if llama is None:
        llama = Llama() if bench.budget.left > FULL_RUN_S else Llama(layers=FEWER_LAYERS)
    section = Section(
        "model",
        f"llama of {llama.layers} layers, {llama.hidden} hidden, {llama.heads}/{llama.kv_heads}"
        f" heads, {llama.mlp} MLP, random bf16 weights: {thousands(sizes.tokens)} tokens, KV kept",
    )
    model = section.attempt("model", partial(llama.make, bench.device, bench.dtype, sizes.tokens))
    if model is None:
        return section
    ids = torch.randint(0, llama.vocab, (sizes.tokens,)).tolist()
    flops = llama.flops(sizes.tokens)
    with torch.inference_mode():
        short = section.attempt("short", partial(_logits, model, ids[: sizes.warm]))
        _theirs(bench, section, model, ids, sizes, flops, attentions)
        _ours(bench, section, model, ids, sizes, flops, kernels, short)
    with_best(section.rows)
    return section


def _theirs(
    bench: Bench,
    section: Section,
    model: Any,
    ids: list[int],
    sizes: Sizes,
    flops: int,
    attentions: Mapping[str, SDPBackend],
) -> None:
    kinds: dict[str, Callable[[], Any]] = {
        name: partial(sdpa_kernel, kernel) for name, kernel in attentions.items()
    }
    kinds |= {n: contextlib.nullcontext for n, p in PACKAGES.items() if _installed(p)}
    for name, chosen in kinds.items():
        cell = f"Hugging Face {name}"
        if section.out_of_time(bench.budget, cell, _need_s(section)):
            continue

        def work(name: str = name, chosen: Callable[[], Any] = chosen) -> Row:
            model.set_attn_implementation("sdpa" if name in attentions else name)
            with chosen():
                _logits(model, ids[: sizes.warm])
                return _measured(bench, flops, lambda: _logits(model, ids))

        row = section.attempt(cell, work)
        if row is not None:
            section.rows.append({"by": cell, "ours": False} | row)


def _ours(
    bench: Bench,
    section: Section,
    model: Any,
    ids: list[int],
    sizes: Sizes,
    flops: int,
    kernels: Sequence[str] | None,
    short: Tensor | None,
) -> None:
    bound = bind(model, ff_slice_tokens=FF_SLICE_TOKENS)
    device = torch.device(bench.device)
    dim = bound.config.hidden_size // bound.config.num_attention_heads
    auto = localflash.choose(None, device=device, dtype=bench.dtype, head_dim=dim).backend.name
    section.facts["auto"] = auto
    others = kernels or backends(bench.device, bench.dtype, dim)
    cells = [(auto, chunk) for chunk in sizes.chunks]
    cells += [(kernel, sizes.chunks[-1]) for kernel in others if kernel != auto]
    for kernel, chunk in cells:
        cell = f"ringstar {kernel}, chunks of {thousands(chunk)}"
        if section.out_of_time(bench.budget, cell, _need_s(section)):
            continue

        def work(kernel: str = kernel, chunk: int = chunk) -> Row:
            ranks = ThreadWorld(1, device=device)
            pool = PagePool(run_once(bound), Storage(bound.dtype, device), page_tokens=64)
            engine = RankEngine(bound, ranks.transports[0], pool, kernel, answer_tokens=64)
            # two whole chunks: the kernels for a past are compiled too, at the sizes to come
            _encoded(ranks, engine, chunk, ids[: 2 * chunk])
            logits = _scored(ranks, engine, chunk, ids[: sizes.warm])
            row = _measured(bench, flops, lambda: _encoded(ranks, engine, chunk, ids))
            differs = None if short is None else relative_error(logits, short)
            return row | {"differs by": differs}

        row = section.attempt(cell, work)
        if row is not None:
            section.rows.append({"by": cell, "ours": True} | row)


def _need_s(section: Section) -> float:
    """A run is started if there is time for one as long as the longest so far, and its warm-up."""
    return max((1.5 * row["seconds"] for row in section.rows), default=FIRST_RUN_S)


def _measured(bench: Bench, flops: int, work: Callable[[], Any]) -> Row:
    """One run after a warm-up over a short text: each takes many seconds."""
    on_gpu = torch.device(bench.device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    took = bench.timer.once(work)
    return {
        "seconds": took,
        "TFLOP/s": flops / took / 1e12,
        "of matmul": flops / took / bench.matmul,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }


def with_best(rows: list[Row]) -> None:
    """Our rows, each beside the fastest of Hugging Face's."""
    theirs = min((row["seconds"] for row in rows if not row["ours"]), default=None)
    for row in rows:
        if row["ours"] and theirs is not None:
            row["theirs / ours"] = theirs / row["seconds"]


def _logits(model: Any, ids: list[int]) -> Tensor:
    """Float32 logits (vocab,) after the last token; the KV of all layers is made and dropped."""
    prompt = torch.tensor([ids], device=model.device)
    output = model(prompt, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
    return output.logits[0, -1].float()


def _encoded(ranks: ThreadWorld, engine: RankEngine, chunk: int, ids: list[int]) -> TextShard:
    def encode(transport: Transport) -> TextShard:
        strategy = RingStrategy(transport, layout="contiguous", chunk_tokens=chunk)
        shard = engine.new_text()
        engine.encode([shard], [ids], strategy, lambda _: None)
        return shard

    return ranks.run(encode)[0]


def _scored(ranks: ThreadWorld, engine: RankEngine, chunk: int, ids: list[int]) -> Tensor:
    """Logits (vocab,) after `ids`, the last of which is a question about the others."""
    shard = _encoded(ranks, engine, chunk, ids[:-1])
    return ranks.run(lambda _: engine.logits(shard, ids[-1:], 1))[0][0]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
