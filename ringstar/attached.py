"""A user's own model and script, with its prompts spread over ranks."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ringstar.checks import check_ids, check_positions, choose_kernel
from ringstar.config import (
    CacheConfig,
    Config,
    DenseConfig,
    ModelConfig,
    RingConfig,
    RopeConfig,
    StarConfig,
    StrategyConfig,
    TransportConfig,
    check,
    config_of,
)
from ringstar.engine import OnProgress, RankEngine
from ringstar.errors import Refusal, UserError, in_a_line
from ringstar.memory import make_pool
from ringstar.models import (
    causal_output,
    check_attachable,
    check_call,
    check_generation,
    choose_rope_precision,
    new_tokens,
    sharded_past,
    wanted_logits,
)
from ringstar.models.bind import bind, put
from ringstar.models.geometry import run_once
from ringstar.models.quantised import quantised
from ringstar.ranks import Ranks, check_ranks, check_strategy, make_ranks, run_or_refuse
from ringstar.shard import TextShard
from ringstar.strategies import check_document, describe, make_strategy
from seqpar import Transport

log = logging.getLogger("ringstar")

_NAME = "ringstar"
# what of a prompt's end star reads with exact attention, for nobody says where a question begins
_STAR_QUERY_TOKENS = 256


class Attached:
    """A Hugging Face model whose forward runs over ranks; `detach` makes it what it was."""

    def __init__(
        self,
        model: Any,
        config: Config,
        ranks: Ranks | None,
        query_tokens: int | None,
        on_progress: OnProgress | None,
    ):
        facts = check_attachable(model)
        check(config)
        self.config, self._facts, self._model = config, facts, model
        if ranks is None:
            check_ranks(config)
            self._ranks, why = make_ranks(config.transport, device=model.device)
            self._made = True
        else:
            self._ranks, why, self._made = ranks, "as given", False
        first = self._ranks.transports[0]
        self.transport, self.world_size, self.rank = first.name, first.world_size, first.rank
        self._said: set[str] = set()
        self._name = uuid.uuid4().hex
        self._engines: dict[int, RankEngine] = {}
        self._on_progress = on_progress if on_progress and self.rank == 0 else lambda _: None
        self._undo = ExitStack()
        try:
            self._prepare(query_tokens, why)
        except BaseException:
            self.detach()
            raise

    def _prepare(self, query_tokens: int | None, why: str) -> None:
        config, model, first = self.config, self._model, self._ranks.transports[0]
        check_strategy(config, self.world_size)
        if model.device != first.device:
            what = f"model.to({str(first.device)!r}) first: that is this rank's device"
            raise UserError("model", f"on {model.device}", what)
        choice = choose_kernel(config, self._facts, first.device)
        precision, why_precision = choose_rope_precision(
            config.rope, self._facts, beyond_limit=False
        )
        star = isinstance(config.strategy, StarConfig)
        self._query_tokens = query_tokens or (_STAR_QUERY_TOKENS if star else 1)
        how = "as asked" if query_tokens else "query_tokens by default"
        self._say(
            f"{self.world_size} ranks over {first.name} ({why})",
            choice.reason,
            f"rope in {precision} ({why_precision})",
            *[f"the last {self._query_tokens} tokens of a prompt see all of it ({how})"] * star,
        )
        bound = bind(model, ff_slice_tokens=config.model.ff_slice_tokens, rope_precision=precision)
        self._undo = bound.undo
        small = quantised(model.config)
        self._say(*[small] if small else [])
        try:
            shapes = run_once(bound)
        except Exception as error:
            why = f"{small or 'weights'} do not run in {model.dtype} here: {in_a_line(error)}"
            raise UserError("model", type(model).__name__, why) from error

        def engine(transport: Transport) -> RankEngine:
            pool, said = make_pool(config.cache, shapes, model.dtype, transport)
            self._say(*[said] if transport is first else [])
            answer_tokens = config.encode.answer_tokens
            return RankEngine(bound, transport, pool, choice.backend.name, answer_tokens)

        engines = self._ranks.run(engine)
        self._engines = {
            transport.rank: each
            for transport, each in zip(self._ranks.transports, engines, strict=True)
        }
        self._generate = model.generate
        put(bound.undo, model, "generate", _in_place_of(model.generate, self.generate))
        put(bound.undo, model, "forward", _in_place_of(model.forward, self.forward))
        setattr(model, _NAME, self)
        bound.undo.callback(delattr, model, _NAME)

    def detach(self) -> None:
        """Make the model what it was, and leave the group of ranks if it was made for it."""
        self._undo.close()
        self._settle()
        self._leave()

    def _settle(self) -> None:
        """Give back the memory of texts that the script has no more."""
        for engine in self._engines.values():
            engine.pool.settle()

    def _leave(self) -> None:
        for transport in self._ranks.transports if self._made else ():
            transport.close()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's own `generate`, on every rank, with the same arguments and result.

        Raises:
            UserError: what it cannot do over ranks, such as beam search, by name.
            TransportError: ranks came to different results.
        """
        clocks = self.world_size if len(self._ranks.transports) < self.world_size else 1
        strategy, facts = self.config.strategy, self._facts
        kwargs = check_generation(
            self._model,
            self._generate,
            args,
            kwargs,
            clocks=clocks,
            check_length=lambda tokens: check_positions(strategy, facts, tokens),
        )
        made = self._generate(*args, **kwargs)
        kwargs.clear()  # its past_key_values
        self._settle()
        ids = (made if isinstance(made, Tensor) else made.sequences).tolist()
        self._ranks.run(lambda transport: transport.check_agreement("answer", ids))
        return made

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: Any = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """As the model's own, for texts (batch, tokens) that are the same on every rank.

        Logits (batch, logits_to_keep, vocab) in the model's dtype; `past_key_values` holds what
        this process's ranks keep.  Texts of a batch may be padded on the left: padding is neither
        computed nor kept.
        """
        check_call(others)
        device = self._model.device.type
        if torch.is_autocast_enabled(device):
            why = "ranks compute in the model's own dtype; load the model in the one you want"
            raise UserError("torch.autocast", torch.get_autocast_dtype(device), why)
        past = sharded_past(past_key_values, self._name, self.world_size)
        shards = next(iter(past.shards.values()), [])
        seen = [shard.tokens for shard in shards]
        facts = (self._facts.window, self._facts.rope_by_length)
        new = new_tokens(input_ids, attention_mask, position_ids, past, seen, *facts)
        last = wanted_logits(logits_to_keep, new, input_ids.shape[1])
        for ids in new:
            check_ids("input_ids", ids, self._facts.vocab_size)
        self._check_texts(new, seen or [0] * len(new), last)
        columns = past.columns + input_ids.shape[1]

        def forward(transport: Transport) -> Tensor:
            past.whole = False
            transport.check_agreement("input_ids", new, last)
            engine = self._engines[transport.rank]
            texts = past.shards.setdefault(transport.rank, [engine.new_text() for _ in new])
            return self._extend_and_read(transport, texts, new, last)

        try:
            logits = run_or_refuse(self._ranks, forward)[0]
        except Refusal:  # often before anything was added
            past.whole = all(
                shard.tokens == start
                for shards in past.shards.values()
                for shard, start in zip(shards, seen or [0] * len(new), strict=True)
            )
            if past.whole and not seen:
                past.reset()  # the next call may have another batch
            raise
        past.columns, past.whole = columns, True
        shaped = logits.clone().view(len(new), last, -1).to(self._model.dtype)
        output = causal_output(shaped, None if use_cache is False else past)
        return output.to_tuple() if return_dict is False else output

    def _extend_and_read(
        self, transport: Transport, texts: list[TextShard], new: list[list[int]], last: int
    ) -> Tensor:
        """One rank's part: what is spread over ranks, then what every rank reads."""
        engine = self._engines[transport.rank]
        # as one device has it, the longest text of a batch says how rope is scaled
        length = max(text.tokens + len(ids) for text, ids in zip(texts, new, strict=True))
        spread = [
            self._spread(text.tokens, ids, last) for text, ids in zip(texts, new, strict=True)
        ]
        long = [number for number, tokens in enumerate(spread) if tokens]
        if long:
            made = make_strategy(
                self.config.strategy, self.config.encode, transport, self._facts.vocab_size
            )
            heads = [new[number][: spread[number]] for number in long]
            on_progress = self._on_progress if transport.rank == 0 else lambda _: None
            engine.extend([texts[number] for number in long], heads, made, on_progress, length)
        transport.publish("decode" if max(map(len, new)) == 1 else "question")
        tails = [ids[tokens:] for ids, tokens in zip(new, spread, strict=True)]
        logits = engine.read(texts, tails, last, length=length, growing=True)
        if self.world_size > 1:  # the same bits everywhere, so that samples are the same too
            transport.broadcast(logits, root=0).wait()
        return logits

    def _spread(self, start: int, new: Sequence[int], last: int) -> int:
        """How many of a text's new tokens are encoded by the strategy, each rank its share."""
        if start and isinstance(self.config.strategy, StarConfig):
            return 0  # what follows a document sees all of it
        return max(0, len(new) - max(last, self._query_tokens))

    def _check_texts(self, new: list[list[int]], starts: list[int], last: int) -> None:
        for ids, start in zip(new, starts, strict=True):
            check_positions(self.config.strategy, self._facts, start + len(ids))
            spread = self._spread(start, ids, last)
            if spread:
                strategy, world = self.config.strategy, self.world_size
                check_document(strategy, spread, world, self._facts.vocab_size)
                self._say(describe(strategy, spread, world))

    def _say(self, *lines: str) -> None:
        for line in lines if self.rank == 0 else ():
            if line not in self._said:
                log.info(line)
            self._said.add(line)


def _in_place_of(own: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` with the signature of a model's `own`, which transformers reads."""

    @functools.wraps(own)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    return call


def attach(
    model: Any,
    strategy: str | StrategyConfig = "ring",
    transport: str | Ranks = "auto",
    *,
    world_size: int | None = None,
    layout: str = "zigzag",
    kernel: str = "auto",
    rope_precision: str = "auto",
    chunk_tokens: int = 8192,
    query_tokens: int | None = None,
    threads_per_rank: int | None = None,
    timeout_s: float = 1800.0,
    cache: CacheConfig | None = None,
    on_progress: OnProgress | None = None,
) -> Attached:
    """Spread the prompts of a user's own Hugging Face model over ranks.

    Afterwards `model.generate(...)`, called on every rank with the same arguments, returns there
    what it returns on one device: greedy or sampled, with streamers, stopping criteria and
    batches padded on the left.  The KV of prompts and answers stays sharded over the ranks.

    Args:
        model: a loaded causal language model of a supported family, on this rank's device, with
            any attention implementation; quantised weights stay as they are.
        strategy: `ring` (exact), `star` (approximate), `dense` (one rank), or a RingConfig,
            StarConfig or DenseConfig with its settings.
        transport: `auto` (torchrun's ranks if there are, else one process), `nccl`, `gloo`,
            `threads` (simulated ranks), or ranks that are connected already.
        world_size: simulated ranks; under torchrun it may be left out.
        layout: how `ring` deals tokens: `zigzag`, `striped` or `contiguous`.
        kernel: the local attention back end.
        rope_precision: of rotary angles: `float32` as the model's own, `float64`, or `auto`.
        chunk_tokens: tokens per rank that are encoded at once; bounds memory.
        query_tokens: tokens at the end of a prompt that every rank reads, with exact attention to
            all before them; 1 unless given, for star 256.
        threads_per_rank: CPU threads of each rank; the cores are shared evenly unless given.
        timeout_s: how long a rank waits for another, seconds.
        cache: how much memory KV may take, and in which form; texts that the script has no more
            make room for others, and nothing is put aside.
        on_progress: called on rank 0 with the share of a prompt's encode that is done.

    Returns:
        A handle; `model.ringstar` is the same.

    Raises:
        UserError: a setting, or a model that cannot be run exactly, by name.
    """
    if not isinstance(strategy, str | RingConfig | StarConfig | DenseConfig):
        raise UserError("strategy", strategy, "allowed: ring, star, dense, or a config of one")
    if cache is not None and cache.offload != "none":
        why = "whose texts are whose to put aside, only the script knows; allowed: none"
        raise UserError("cache.offload", cache.offload, why)
    if query_tokens is not None and (not isinstance(query_tokens, int) or query_tokens < 1):
        raise UserError("query_tokens", query_tokens, "allowed: 1 or more")
    named = transport if isinstance(transport, str) else "auto"
    config = config_of(
        strategy,
        layout,
        TransportConfig(named, world_size, timeout_s, threads_per_rank),
        kernel,
        ModelConfig(dtype=str(getattr(model, "dtype", "")).removeprefix("torch.")),
        RopeConfig(rope_precision),
        chunk_tokens,
        cache,
    )
    ranks = None if isinstance(transport, str) else transport
    return Attached(model, config, ranks, query_tokens, on_progress)


def detach(model: Any) -> None:
    """Make an attached model what it was; raises UserError if it is not attached."""
    attached = getattr(model, _NAME, None)
    if not isinstance(attached, Attached):
        raise UserError("model", type(model).__name__, "is not attached to ranks")
    attached.detach()
