"""The typed configuration: plain dataclasses, and one function that checks them.

The library takes these or keyword arguments; only the command line knows how they are composed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import starattn
from localflash import BACKENDS
from ringstar.errors import UserError
from starattn import CONTENTS, POSITIONS, token_size

DTYPES = ("auto", "float32", "bfloat16", "float16")
KERNELS = ("auto", *BACKENDS)
LAYOUTS = ("zigzag", "striped", "contiguous")
SHARES = ("auto", *starattn.SHARES)
PAST_BY = ("auto", "kv", "queries")
MODELS = ("hf", "smollm2")
# some thirty years: more overflows the clocks of the libraries below
MAX_TIMEOUT_S = 1e9
PRECISIONS = ("auto", "float32", "float64")
SCALINGS = ("none", "linear", "dynamic", "yarn")
KV_DTYPES = ("auto", "int8", "fp8")
OFFLOADS = ("none", "host", "disk")
TRANSPORTS = ("auto", "nccl", "gloo", "threads")
# facts that there are to plant
MAX_NEEDLES = 60


@dataclass
class StrategyConfig:
    """How a document is encoded over ranks."""

    name: str = "ring"


@dataclass
class DenseConfig(StrategyConfig):
    """One rank holds everything: the plain product that the others are compared with."""

    name: str = "dense"


@dataclass
class RingConfig(StrategyConfig):
    """Ring Attention, exact."""

    name: str = "ring"
    layout: str = "zigzag"
    # how queries of a later chunk reach the KV of earlier ones
    past_by: str = "auto"


@dataclass
class StarConfig(StrategyConfig):
    """Star Attention, approximate: blocks behind an anchor; see `starattn.anchors.Anchor`.

    Sizes are tokens, also written `4K`.
    """

    name: str = "star"
    # None: the document's length over the number of ranks
    block_size: int | str | None = None
    # None: as long as a block; 0: no anchor
    anchor_size: int | str | None = None
    # how often an anchor's KV is computed: in all, on each rank, for each block (none)
    share_anchor: str = "auto"
    anchor_content: str = "first"
    anchor_positions: str = "own"
    # of anchor_content=constant; None: the document's most frequent token
    anchor_token: int | None = None
    anchor_seed: int = 0


_STRATEGIES = {"dense": DenseConfig, "ring": RingConfig, "star": StarConfig}
STRATEGIES = tuple(_STRATEGIES)


def strategy_config(name: str) -> StrategyConfig:
    """The default settings of a strategy; raises UserError for an unknown name."""
    if name not in _STRATEGIES:
        raise UserError("strategy", name, f"allowed: {', '.join(STRATEGIES)}")
    return _STRATEGIES[name]()


def strategy_settings(strategy: StrategyConfig) -> dict[str, Any]:
    """All settings of a strategy, as `saved_strategy` reads them."""
    return asdict(strategy)


def saved_strategy(key: str, value: str, settings: dict[str, Any]) -> StrategyConfig:
    """The strategy of a saved document; raises UserError, naming `key`, for one that is unknown."""
    try:
        chosen = replace(strategy_config(settings["name"]), **settings)
        check(Config(strategy=chosen))
    except (UserError, TypeError, KeyError, AttributeError) as error:
        raise UserError(key, value, f"unknown strategy: {error}") from error
    return chosen


@dataclass
class TransportConfig:
    """How ranks talk. `world_size` starts simulated ranks, or is checked against torchrun's."""

    name: str = "auto"
    world_size: int | None = None
    timeout_s: float = 1800.0
    # CPU threads of each rank; None shares the cores evenly
    threads_per_rank: int | None = None


@dataclass
class KernelConfig:
    """Which local attention each rank runs.

    `unified_max` (triton): answers with one shift for all splits of the keys, not their maxima.
    """

    name: str = "auto"
    unified_max: bool = False


@dataclass
class ModelConfig:
    """An unmodified Hugging Face causal language model on local disk."""

    name: str = "hf"
    path: str | None = None
    # where a model that ships in a package is converted to, once
    cache_dir: str = "~/.cache/ringstar"
    dtype: str = "auto"
    allow_beyond_limit: bool = False
    # tokens of one feed-forward slice: the MLP's intermediate never exists for more
    ff_slice_tokens: int = 2048


@dataclass
class RopeConfig:
    """How positions turn queries and keys, where that is not as the model has it.

    `precision` is that of the angles: `float32` as the model's own module, or `float64`; auto takes
    it from the longest text that the model may be used for.  `scaling` (linear, dynamic, yarn)
    makes another model of it, for texts that are `factor` times longer.
    """

    precision: str = "auto"
    scaling: str = "none"
    factor: float | None = None

    @property
    def asked_scaling(self) -> tuple[str, float] | None:
        """The kind and the factor, if there are both."""
        return (
            None if self.scaling == "none" or self.factor is None else (self.scaling, self.factor)
        )


@dataclass
class DocumentConfig:
    """The document: exactly one of these; `save` keeps it, encoded, and `load` is such a folder."""

    path: str | None = None
    text: str | None = None
    ids_path: str | None = None
    load: str | None = None
    save: str | None = None
    # chunks of an encode after which `save` holds what is done so far
    checkpoint_every: int | None = None


@dataclass
class EncodeConfig:
    """`chunk_tokens` per rank bound the memory of an encode."""

    chunk_tokens: int = 8192
    # kept free beside the document, over all ranks, so that answering moves nothing
    answer_tokens: int = 1024


@dataclass
class CacheConfig:
    """The KV of all documents that one rank holds: pages within a budget.

    Documents that were used least recently make room for others, unless they are pinned.
    """

    # bytes on each rank, also written `24GiB`; None: memory_fraction says
    max_bytes: int | str | None = None
    # of the memory that is free once the model is loaded, shared evenly by ranks; None: 0.8
    memory_fraction: float | None = None
    # tokens that a page has room for
    page_tokens: int = 64
    # what numbers are kept and sent in: as the model computes (auto), or 8 bits, which rounds
    dtype: str = "auto"
    # whether a beginning that an earlier document has too is encoded once
    reuse: bool = True
    # where documents go that make room for others; none: they are dropped
    offload: str = "none"
    # the folder for offload=disk; None: that for temporary files
    offload_path: str | None = None


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{binary}B": base**power
    for power, prefix in enumerate("KMGT", 1)
    for binary, base in (("", 1000), ("i", 1024))
}


def byte_size(size: int | str) -> int:
    """Bytes, from a number or from `24GiB`, `500MB`; raises ValueError."""
    found = re.fullmatch(r"(\d+\.?\d*)\s*([A-Za-z]*)", str(size).strip())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"{size} is no size in bytes")
    return round(float(found[1]) * _UNITS[found[2]])


@dataclass
class GenerationConfig:
    """How the answer is chosen. temperature 0 is greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: list[str] = field(default_factory=list)
    # end tokens end nothing: every answer has max_new_tokens, as measurements want it
    ignore_eos: bool = False


@dataclass
class OutputConfig:
    """Where results go, beside the terminal."""

    path: str | None = None
    first_logits: str | None = None


@dataclass
class ProfileConfig:
    """`path`: a folder for a trace of all ranks; None: nothing is recorded."""

    path: str | None = None
    # spans of each rank that are kept whole; of more there are totals
    max_events: int = 100_000


@dataclass
class LaunchConfig:
    """`nproc` ranks on this machine; `report` is set by the launcher for its ranks."""

    nproc: int | None = None
    traceback: bool = False
    report: str | None = None


@dataclass
class Config:
    """Everything that one run needs."""

    strategy: Any = field(default_factory=RingConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    document: DocumentConfig = field(default_factory=DocumentConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    question: str | None = None
    question_path: str | None = None


@dataclass
class QuestionsConfig:
    """`path`: a JSONL file, a question on each line; None: they are typed.

    `follow_up`: each question sees those before it, and their answers.  `documents_path`: a JSONL
    file with several documents, of which each question names one.
    """

    path: str | None = None
    follow_up: bool = False
    documents_path: str | None = None


@dataclass
class AskConfig(Config):
    """Everything that a run of many questions about one document needs."""

    questions: QuestionsConfig = field(default_factory=QuestionsConfig)


@dataclass
class ScoreOptions:
    """What is scored: continuations of the document, or, with none, the document itself.

    `path`: a JSONL file of continuations; `continuation`: texts.  `pieces` and `picture` are of
    the curve of perplexity over a document.
    """

    continuation: list[str] = field(default_factory=list)
    path: str | None = None
    pieces: int = 32
    picture: str | None = None


@dataclass
class ScoreConfig(Config):
    """Everything that a run of log-probabilities needs."""

    score: ScoreOptions = field(default_factory=ScoreOptions)


@dataclass
class HarnessOptions:
    """How tasks of `lm-eval` are run; None: as `ringstar.harness.RingstarLM` chooses."""

    batch_size: int | None = None
    query_tokens: int | None = None
    max_length: int | None = None
    seed: int = 0


@dataclass
class HarnessConfig(Config):
    """Everything about the model in a run of `lm-eval`; the rest are its own arguments."""

    harness: HarnessOptions = field(default_factory=HarnessOptions)


@dataclass
class CompareConfig:
    """What exact and star are compared by, beside the answers."""

    # settings of star, each as `block_size=1K anchor_size=256`; none: chosen by the document
    star: list[str] = field(default_factory=list)
    # passages of the document that are quoted, and the tokens of each
    probes: int = 8
    probe_tokens: int = 32
    # facts planted in a copy of the document; None: 5, or none without a tokenizer
    needles: int | None = None
    # how often, with other facts: an encode more for exact and for each setting
    needle_trials: int = 1
    picture: str | None = None


@dataclass
class ComparisonConfig(Config):
    """Everything that one comparison needs; `strategy` is that of the exact side."""

    # here it may be given several times
    question: list[str] = field(default_factory=list)  # type: ignore[assignment]
    compare: CompareConfig = field(default_factory=CompareConfig)


@dataclass
class EvaluateConfig:
    """What exact and star are evaluated on; see docs/evaluate.md.

    `tasks` are names or patterns, `lengths` tokens, both separated by spaces or commas.
    """

    tasks: str = "*"
    lengths: str = "4K"
    # settings of star, each as `block_size=1/4 anchor_size=256`; empty: quarters and eighths;
    # `none` alone: only exact
    star: list[str] = field(default_factory=list)
    # of each task at each length
    samples: int = 10
    seed: int = 0
    # how many even depths needles by depth have, and the samples at each; None: as `samples`
    depths: int = 5
    depth_samples: int | None = None
    # a long natural text, and paragraphs with questions; None: what needs no file
    essay_path: str | None = None
    qa_path: str | None = None
    picture: str | None = None


@dataclass
class EvaluationConfig(Config):
    """Everything that one evaluation needs; exact is ring, or dense on one rank."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass
class BenchOptions:
    """What is measured: a grid of lengths, ranks, strategies and batches, and who is beside.

    Lists are texts, as `1K,4K`.  Lengths count the whole prompt, in tokens.
    """

    lengths: str = "1K,4K"
    # numbers of ranks; None: one, and what launch.nproc, the GPUs or two say
    worlds: str | None = None
    # each as `ring layout=striped` or `star block_size=1/4`; none: ring, and star by quarters
    strategy: list[str] = field(default_factory=list)
    batches: str = "1"
    # calls that are measured in each cell, each of a whole batch, and calls before them
    requests: int = 3
    warm_ups: int = 1
    # how often everyone is measured, one round after another
    rounds: int = 1
    new_tokens: int = 32
    # of the prompt's end: what is asked about the rest
    question_tokens: int = 16
    seed: int = 0
    # names, or auto (those that can run here), all, none
    peers: str = "auto"
    picture: str | None = None
    # a result to compare with, and how much slower than there nothing may be
    against: str | None = None
    tolerance: float = 0.25
    # set for the processes that measure: where each cell is written
    cells: str | None = None


@dataclass
class BenchConfig(Config):
    """Everything that a benchmark needs."""

    bench: BenchOptions = field(default_factory=BenchOptions)


def config_of(
    strategy: str | StrategyConfig,
    layout: str,
    transport: TransportConfig,
    kernel: str,
    model: ModelConfig,
    rope: RopeConfig,
    chunk_tokens: int,
    cache: CacheConfig | None = None,
) -> Config:
    """The config of what Python's callers give by name; `layout` is of strategy `ring`."""
    if strategy != "ring" and layout != "zigzag":
        raise UserError("layout", layout, 'is of strategy="ring"; allowed: RingConfig(layout=...)')
    chosen = strategy_config(strategy) if isinstance(strategy, str) else strategy
    if strategy == "ring":
        chosen = RingConfig(layout=layout)
    config = Config(chosen, transport, KernelConfig(kernel), model, rope)
    config.encode.chunk_tokens = chunk_tokens
    config.cache = cache or config.cache
    return config


def check(config: Config) -> None:
    """Raise UserError for the first value that no run could use."""
    for key, value, good, allowed in _rules(config):
        if not good:
            raise UserError(key, value, allowed)


def check_generation(generation: GenerationConfig) -> None:
    """The part of `check` that a single question can get wrong."""
    for key, value, good, allowed in _generation_rules(generation):
        if not good:
            raise UserError(key, value, allowed)


Rule = tuple[str, object, bool, str]


def _rules(config: Config) -> Iterator[Rule]:
    strategy, transport, model = config.strategy, config.transport, config.model
    known = isinstance(strategy, RingConfig | StarConfig | DenseConfig)
    allowed = "allowed: RingConfig(...), StarConfig(...) or DenseConfig()"
    yield "strategy", getattr(strategy, "name", strategy), known, allowed
    yield _one_of("strategy", strategy.name, STRATEGIES)
    if isinstance(strategy, RingConfig):
        yield _one_of("strategy.layout", strategy.layout, LAYOUTS)
        yield _one_of("strategy.past_by", strategy.past_by, PAST_BY)
    if isinstance(strategy, StarConfig):
        yield from _star_rules(strategy)
    yield _one_of("transport", transport.name, TRANSPORTS)
    yield _count("transport.world_size", transport.world_size)
    in_range = 0 < transport.timeout_s <= MAX_TIMEOUT_S
    allowed = f"allowed: above 0, at most {MAX_TIMEOUT_S:g}"
    yield "transport.timeout_s", transport.timeout_s, in_range, allowed
    yield _count("transport.threads_per_rank", transport.threads_per_rank)
    yield _one_of("kernel", config.kernel.name, KERNELS)
    yield _one_of("model", model.name, MODELS)
    yield _one_of("model.dtype", model.dtype, DTYPES)
    yield _count("model.ff_slice_tokens", model.ff_slice_tokens)
    yield from _rope_rules(config.rope)
    every, save = config.document.checkpoint_every, config.document.save
    yield _count("document.checkpoint_every", every)
    needs = every is None or (save is not None and config.document.load is None)
    yield "document.checkpoint_every", every, needs, "needs document.save and something to encode"
    rings = every is None or not isinstance(strategy, StarConfig)
    yield "document.checkpoint_every", every, rings, "star encodes in any order; allowed: with ring"
    yield _count("encode.chunk_tokens", config.encode.chunk_tokens)
    yield _count("encode.answer_tokens", config.encode.answer_tokens)
    yield from _cache_rules(config.cache)
    yield _count("profile.max_events", config.profile.max_events)
    yield _count("launch.nproc", config.launch.nproc)
    yield from _generation_rules(config.generation)
    if isinstance(config, ComparisonConfig):
        yield from _compare_rules(config.compare)
    if isinstance(config, ScoreConfig):
        yield _count("score.pieces", config.score.pieces)
    if isinstance(config, HarnessConfig):
        yield _count("harness.batch_size", config.harness.batch_size)
        yield _count("harness.query_tokens", config.harness.query_tokens)
        yield _count("harness.max_length", config.harness.max_length)
    if isinstance(config, BenchConfig):
        yield from _bench_rules(config.bench)
    if isinstance(config, EvaluationConfig):
        yield _count("evaluate.samples", config.evaluate.samples)
        yield _count("evaluate.depths", config.evaluate.depths)
        yield _count("evaluate.depth_samples", config.evaluate.depth_samples)


def _rope_rules(rope: RopeConfig) -> Iterator[Rule]:
    yield _one_of("rope.precision", rope.precision, PRECISIONS)
    yield _one_of("rope.scaling", rope.scaling, SCALINGS)
    factor, scaled = rope.factor, rope.scaling != "none"
    allowed = f"rope.scaling={rope.scaling} needs it; allowed: a number above 1, as 4"
    yield "rope.factor", factor, not scaled or factor is not None, allowed
    in_range = factor is None or 1 < factor < float("inf")
    yield "rope.factor", factor, in_range, "allowed: a number above 1, as 4"
    allowed = f"allowed: only with rope.scaling={', '.join(SCALINGS[1:])}"
    yield "rope.factor", factor, scaled or factor is None, allowed


def _cache_rules(cache: CacheConfig) -> Iterator[Rule]:
    size, fraction = cache.max_bytes, cache.memory_fraction
    allowed = "allowed: bytes above 0, as 1000000 or 24GiB"
    yield "cache.max_bytes", size, size is None or _bytes(size) > 0, allowed
    in_range = fraction is None or 0 < fraction <= 1
    yield "cache.memory_fraction", fraction, in_range, "allowed: above 0, at most 1"
    one = size is None or fraction is None
    yield "cache.memory_fraction", fraction, one, "cache.max_bytes is given too; drop one"
    yield _count("cache.page_tokens", cache.page_tokens)
    yield _one_of("cache.dtype", cache.dtype, KV_DTYPES)
    yield _one_of("cache.offload", cache.offload, OFFLOADS)
    used = cache.offload_path is None or cache.offload == "disk"
    yield "cache.offload_path", cache.offload_path, used, "needs cache.offload=disk"


def _bytes(size: int | str) -> int:
    """A size in bytes; −1 for what is none."""
    try:
        return byte_size(size)
    except ValueError:
        return -1


def _compare_rules(compare: CompareConfig) -> Iterator[Rule]:
    yield "compare.probes", compare.probes, compare.probes >= 0, "allowed: 0 (none) or more"
    yield _count("compare.probe_tokens", compare.probe_tokens)
    in_range = 0 <= (compare.needles or 0) <= MAX_NEEDLES
    yield "compare.needles", compare.needles, in_range, f"allowed: from 0 (none) to {MAX_NEEDLES}"
    yield _count("compare.needle_trials", compare.needle_trials)


def _bench_rules(bench: BenchOptions) -> Iterator[Rule]:
    yield _count("bench.requests", bench.requests)
    yield _count("bench.rounds", bench.rounds)
    yield "bench.warm_ups", bench.warm_ups, bench.warm_ups >= 0, "allowed: 0 (none) or more"
    enough = bench.new_tokens > 1
    yield "bench.new_tokens", bench.new_tokens, enough, "allowed: 2 or more, to see what each costs"
    yield _count("bench.question_tokens", bench.question_tokens)
    allowed = "allowed: 0 or more; 0.25 lets something be a quarter slower"
    yield "bench.tolerance", bench.tolerance, 0 <= bench.tolerance < float("inf"), allowed


def _star_rules(star: StarConfig) -> Iterator[Rule]:
    """What holds whatever the document; `strategies.check_document` knows the rest."""
    block, anchor = _tokens(star.block_size), _tokens(star.anchor_size)
    allowed = "allowed: a number of tokens above 0, as 4096 or 4K"
    yield "strategy.block_size", star.block_size, block is None or block > 0, allowed
    allowed = "allowed: a number of tokens, as 4096 or 4K, or 0 for no anchor"
    yield "strategy.anchor_size", star.anchor_size, anchor is None or anchor >= 0, allowed
    fits = block is None or anchor is None or anchor <= block
    allowed = f"allowed: at most strategy.block_size={star.block_size}"
    yield "strategy.anchor_size", star.anchor_size, fits, allowed
    yield _one_of("strategy.share_anchor", star.share_anchor, SHARES)
    yield _one_of("strategy.anchor_content", star.anchor_content, CONTENTS)
    yield _one_of("strategy.anchor_positions", star.anchor_positions, POSITIONS)
    token = star.anchor_token
    of_use = token is None or (token >= 0 and star.anchor_content == "constant")
    allowed = "allowed: a token id, with strategy.anchor_content=constant"
    yield "strategy.anchor_token", token, of_use, allowed


def _tokens(size: int | str | None) -> int | None:
    """A size in tokens; −1 for what is none."""
    try:
        return None if size is None else token_size(size)
    except ValueError:
        return -1


def _generation_rules(generation: GenerationConfig) -> Iterator[Rule]:
    temperature, top_p = generation.temperature, generation.top_p
    some = generation.max_new_tokens is not None
    yield "generation.max_new_tokens", None, some, "allowed: an integer above 0"
    yield _count("generation.max_new_tokens", generation.max_new_tokens)
    finite = _is_number(temperature) and 0 <= temperature < float("inf")
    yield "generation.temperature", temperature, finite, "allowed: 0 (greedy) or more"
    share = _is_number(top_p) and 0 < top_p <= 1
    yield "generation.top_p", top_p, share, "allowed: above 0, at most 1"
    seed, stop = generation.seed, generation.stop
    in_range = isinstance(seed, Integral) and -(2**63) <= seed < 2**64
    yield "generation.seed", seed, in_range, "allowed: an integer of 64 bits"
    listed = isinstance(stop, list) and all(isinstance(text, str) for text in stop)
    yield "generation.stop", stop, listed, "allowed: a list of texts"
    yield "generation.stop", "", all(stop), "a stop text cannot be empty"


def _is_number(value: object) -> bool:
    return isinstance(value, Real)


def _one_of(key: str, value: object, allowed: tuple[str, ...]) -> Rule:
    return key, value, value in allowed, f"allowed: {', '.join(allowed)}"


def _count(key: str, value: object) -> Rule:
    good = value is None or (type(value) is int and value > 0)
    return key, value, good, "allowed: an integer above 0"
