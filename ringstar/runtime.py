"""The Python face: plan, encode, answer."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch

from ringstar import kept, scoring
from ringstar.answers import Answer, collect
from ringstar.checks import (
    Text,
    check_fits,
    check_ids,
    check_texts,
    choose_kernel,
    token_ids,
)
from ringstar.config import (
    CacheConfig,
    Config,
    DenseConfig,
    GenerationConfig,
    ModelConfig,
    RingConfig,
    RopeConfig,
    StarConfig,
    StrategyConfig,
    TransportConfig,
    check,
    check_generation,
    config_of,
    strategy_config,
)
from ringstar.conversation import Conversation
from ringstar.document import Document, Shelf
from ringstar.engine import EncodeCost, OnProgress, RankEngine
from ringstar.errors import UserError
from ringstar.group import Group, check_held, on_rank_0
from ringstar.memory import make_pool
from ringstar.metrics import RankMetrics, gather_metrics, largest, slowest
from ringstar.models import (
    ModelFiles,
    choose_dtype,
    choose_rope_precision,
    find_model,
    run_once,
)
from ringstar.ranks import Ranks, check_ranks, check_strategy, make_ranks
from ringstar.scores import Score, ScoredText, SpreadScores
from ringstar.shard import TextShard
from ringstar.store import check_place, fingerprint, unfinished_place
from ringstar.strategies import describe, make_strategy
from ringstar.trace import Trace, engine_parts
from seqpar import Transport

log = logging.getLogger("ringstar")

KVError = tuple[float, float] | None


class LongContext:
    """A model that answers questions over documents whose KV is spread over ranks.

    Under torchrun every rank makes the same calls and gets the same answers; with simulated
    ranks one process makes them once.
    """

    def __init__(self, config: Config, files: ModelFiles, ranks: Ranks, why_transport: str):
        if files.scaling != config.rope.asked_scaling:
            why = "these model files have another: find_model(config.model, config.rope)"
            raise UserError("rope.scaling", config.rope.scaling, why)
        self.config, self.files = config, files
        first = ranks.transports[0]
        dtype, why_dtype = choose_dtype(config.model, files.config, first.device)
        choice = choose_kernel(config, files, first.device)
        precision, why_precision = choose_rope_precision(
            config.rope, files, beyond_limit=config.model.allow_beyond_limit
        )
        self.transport, self.world_size, self.rank = first.name, first.world_size, first.rank
        self.device, self.dtype, self.kernel = first.device, dtype, choice.backend.name
        self._trace = Trace(config.profile, ranks) if config.profile.path is not None else None
        self.ranks = ranks = self._trace.ranks if self._trace is not None else ranks
        self.group = group = Group(ranks, config.cache)
        group.say(
            f"{self.world_size} ranks over {first.name} ({why_transport})",
            f"device {first.device.type}",
            f"dtype {str(dtype).removeprefix('torch.')} ({why_dtype})",
            choice.reason,
            f"rope in {precision} ({why_precision})",
        )
        if files.scaling:
            kind, factor = files.scaling
            group.say(
                f"rope.scaling={kind} by {factor:g} changes the model: it no longer computes what"
                f" its config says, and takes up to {files.max_positions:,} positions"
            )
        unheard = files.changes_to_logits()
        if unheard and self.rank == 0:
            log.warning(
                f"generation_config.json asks for {', '.join(unheard)}: there is none here, so that"
                " answers may differ from those of Hugging Face's own generate"
            )
        for transport in ranks.transports:
            transport.publish("load")
        model = files.load(config.model, dtype, first.device, precision)
        shapes = run_once(model)
        if self._trace is not None:
            self._trace.hook(model)

        def engine(transport: Transport) -> RankEngine:
            pool, said = make_pool(config.cache, shapes, dtype, transport)
            if transport.rank == self.rank:
                group.say(said)
            traced, kernel = engine_parts(model, transport, choice.backend)
            return RankEngine(
                traced,
                transport,
                pool,
                kernel,
                config.encode.answer_tokens,
                unified_max=config.kernel.unified_max,
            )

        group.start(engine)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        strategy: str | StrategyConfig = "ring",
        transport: str | Ranks = "auto",
        world_size: int | None = None,
        layout: str = "zigzag",
        kernel: str = "auto",
        dtype: str = "auto",
        chunk_tokens: int = 8192,
        threads_per_rank: int | None = None,
        timeout_s: float = 1800.0,
        allow_beyond_limit: bool = False,
        rope: RopeConfig | None = None,
        cache: CacheConfig | None = None,
    ) -> LongContext:
        """Load an unmodified Hugging Face model for `world_size` ranks.

        Args:
            path: a local Hugging Face folder, or a GGUF file.
            strategy: `ring` (exact, over ranks), `star` (approximate), `dense` (one rank), or a
                RingConfig, StarConfig or DenseConfig with its settings.
            transport: `auto` (torchrun's ranks if there are, else one process), `nccl`, `gloo`,
                `threads` (simulated ranks), or ranks that are connected already.
            world_size: simulated ranks; under torchrun it may be left out.
            layout: how `ring` deals tokens: `zigzag`, `striped` or `contiguous`.
            kernel: the local attention back end.
            dtype: `auto` (as stored), `float32`, `bfloat16` or `float16`.
            chunk_tokens: tokens per rank that are encoded at once; bounds memory.
            threads_per_rank: CPU threads of each rank; the cores are shared evenly unless given.
            timeout_s: how long a rank waits for another, seconds.
            allow_beyond_limit: accept more positions than the model was trained for.
            rope: the precision of rotary angles, and their scaling for longer texts.
            cache: how much memory KV may take, in which form, and what makes room for more.

        Raises:
            UserError: a setting, or a model that cannot be run exactly, by name.
        """
        named = transport if isinstance(transport, str) else "auto"
        config = config_of(
            strategy,
            layout,
            TransportConfig(named, world_size, timeout_s, threads_per_rank),
            kernel,
            ModelConfig(path=path, dtype=dtype, allow_beyond_limit=allow_beyond_limit),
            rope or RopeConfig(),
            chunk_tokens,
            cache,
        )
        return cls.from_config(config, None if isinstance(transport, str) else transport)

    @classmethod
    def from_config(cls, config: Config, ranks: Ranks | None = None) -> LongContext:
        """The same from a typed config; `ranks` that are connected already are used as they are."""
        check(config)
        files = find_model(config.model, config.rope)
        if ranks is not None:
            check_strategy(config, ranks.transports[0].world_size)
            return cls(config, files, ranks, "as given")
        check_ranks(config)
        made, why = make_ranks(config.transport)
        try:
            return cls(config, files, made, why)
        except UserError:  # the same on every rank
            for transport in made.transports:
                transport.close()
            raise

    @property
    def fingerprint(self) -> str:
        """A digest of the model's config and of samples of its weights, as they are loaded."""
        return fingerprint(self.group.any_engine.model.model)

    @property
    def shelf(self) -> Shelf:
        """The documents that it holds."""
        return self.group.shelf

    def encode(
        self,
        document: Text,
        on_progress: OnProgress | None = None,
        *,
        strategy: str | StrategyConfig | None = None,
        length: int = 0,
    ) -> Document:
        """Encode a document, given as text or as token ids.

        `on_progress` is called on rank 0 with the share of its work that is done; `strategy`
        takes the place of the one that this LongContext was made with, on the same ranks.
        `length` counts the positions of the document and of the question to come: models whose
        rotary embedding depends on it (`dynamic`, `longrope`) need it; others do not.

        Raises:
            UserError: it is empty, has ids outside the vocabulary, is too long, or does not fit
                the strategy.
        """
        one = [length] if length else None
        return self.encode_batch([document], on_progress, strategy=strategy, lengths=one)[0]

    def encode_batch(
        self,
        documents: Sequence[Text],
        on_progress: OnProgress | None = None,
        *,
        strategy: str | StrategyConfig | None = None,
        lengths: Sequence[int] | None = None,
    ) -> list[Document]:
        """Encode several documents together, of any lengths, without padding.

        By the ring they share forward passes of up to `encode.chunk_tokens` on each rank; each
        comes out as if it were alone.  By star they are encoded one after another.  `lengths` are
        those of the whole texts, as `length` of `encode`.

        Raises:
            UserError: as `encode`, of any of them; or there are none.
        """
        check_texts("documents", documents)
        if not documents or (lengths is not None and len(lengths) != len(documents)):
            what = "none are given" if not documents else f"have {len(lengths or ())} lengths"
            raise UserError("documents", len(documents), f"{what}; needed are one or more of each")
        files = self.files
        ids = [token_ids("document", d, files.context_ids, files.vocab_size) for d in documents]
        return self._encode(ids, on_progress, strategy, lengths)[0]

    def _encode(
        self,
        ids: list[list[int]],
        on_progress: OnProgress | None,
        strategy: str | StrategyConfig | None,
        lengths: Sequence[int] | None = None,
        scored: Sequence[ScoredText] = (),
    ) -> tuple[list[Document], list[Score]]:
        """Documents, and the scores of texts of which they are what is read."""
        files = self.files
        chosen = strategy_config(strategy) if isinstance(strategy, str) else strategy
        chosen = chosen or self.config.strategy
        config = replace(self.config, strategy=chosen)
        for document in ids:
            check_fits(config, files, self.world_size, len(document))
            self.group.say(describe(chosen, len(document), self.world_size))
        totals = [
            max(length, len(document))
            for length, document in zip(lengths or [0] * len(ids), ids, strict=True)
        ]
        begun = [
            None if scored else self.shelf.beginning(each, self._fits(chosen, each, total))
            for each, total in zip(ids, totals, strict=True)
        ]
        known = [found[1] if found else 0 for found in begun]
        new = [document[tokens:] for document, tokens in zip(ids, known, strict=True)]
        for document, tokens in zip(ids, known, strict=True):
            if tokens:
                self.group.say(f"{tokens:,} of {len(document):,} tokens are encoded already")

        def encode(
            transport: Transport,
        ) -> tuple[list[TextShard], list[RankMetrics], tuple[float, KVError], list[Score]]:
            transport.publish("encode")
            transport.check_agreement("strategy", chosen, scored)
            engine, index = self.group.engines[transport.rank], self.group.index(transport)
            victims = self.group.victims(transport, [found[0] for found in begun if found])
            shards = []
            for found, total in zip(begun, totals, strict=True):
                if found is None:
                    shards.append(engine.new_text(total))
                    continue
                source = found[0].shards[index]
                engine.bring_back(source, victims)
                shards.append(engine.fork(source, found[1], total, victims))
            report = on_rank_0(transport, on_progress)
            made = make_strategy(chosen, self.config.encode, transport, files.vocab_size)
            scores = SpreadScores(engine.model, scored)
            on_pass = scores.add if scored else None
            cost = engine.encode(shards, new, made, report, victims, on_pass)
            transport.publish("metrics")
            metrics = [
                gather_metrics(transport, shard.cache.nbytes, cost.bytes_sent) for shard in shards
            ]
            owned = [shard.owned for shard in shards]
            given = scores.gathered(transport, owned) if scored else []
            return shards, metrics, self._slowest_and_worst(transport, cost), given

        by_rank, (metrics, *_), (costs, *_), (scores, *_) = zip(
            *self.group.run(encode), strict=True
        )
        took_s, kv_error = costs
        encoded = [
            Document(
                document,
                chosen,
                took_s,
                figures,
                list(shards),
                self,
                self.world_size,
                cached_tokens=tokens,
                kv_error=kv_error,
            )
            for document, figures, shards, tokens in zip(
                ids, metrics, zip(*by_rank, strict=True), known, strict=True
            )
        ]
        for each in encoded:
            self.shelf.add(each)
        return encoded, scores

    def _fits(
        self, strategy: StrategyConfig, ids: Sequence[int], length: int
    ) -> Callable[[Document, int], bool]:
        """Whether the first tokens of a document are as this strategy would encode them."""

        def fits(document: Document, tokens: int) -> bool:
            shard = document.shards[0]
            engine = self.group.any_engine
            if isinstance(strategy, StarConfig) or isinstance(document.strategy, StarConfig):
                # blocks and anchors are parts of one whole document, dealt to so many ranks
                same = (
                    document.strategy == strategy
                    and document.encoded_by == self.world_size
                    and tokens == len(ids) == document.tokens
                )
            else:
                same = True
            same = same and engine.same_rope(shard.length, length)
            return same and shard.remembers(tokens)

        return fits

    def _slowest_and_worst(self, transport: Transport, cost: EncodeCost) -> tuple[float, KVError]:
        """The time of the slowest rank, and the largest rounding of KV."""
        took_s = slowest(transport, cost.seconds)
        if self.config.cache.dtype == "auto":
            return took_s, None
        keys, values = largest(transport, cost.kv_error or (0.0, 0.0))
        if not math.isfinite(keys + values):
            raise RuntimeError("the model gave keys or values that are not finite")
        if transport.rank == 0 and cost.kv_error:
            rounded = f"KV rounded to {self.config.cache.dtype}"
            self.group.say(f"{rounded}: keys by {keys:.2%}, values by {values:.2%} (RMS)")
        return took_s, (keys, values)

    def append(
        self, document: Document, more: Text, on_progress: OnProgress | None = None
    ) -> Document:
        """Encode what follows a document, given as text or as token ids, and only that.

        Exact, as if all had been encoded at once.  The KV of `document` becomes part of what this
        returns: `document` itself is used up.

        Raises:
            UserError: it was encoded by star, there is nothing to append, the whole is too long, or
                its rope depends on the length of the text.
        """
        if isinstance(document.strategy, StarConfig):
            why = "its blocks are parts of a whole document; encode that anew, or use ring"
            raise UserError("document.strategy", "star", why)
        check_held(document, self)
        ids = token_ids("more", more, self.files.more_ids, self.files.vocab_size)
        strategy = document.strategy
        if isinstance(strategy, DenseConfig) and self.world_size > 1:
            strategy = RingConfig()  # as exact: one rank encoded it, and now there are several
        config, total = replace(self.config, strategy=strategy), document.tokens + len(ids)
        check_fits(config, self.files, self.world_size, total)
        length = max(document.shards[0].length, total)
        self._check_rope(document, length, "encode the whole anew")

        begun = threading.Event()

        def append(transport: Transport) -> tuple[RankMetrics, tuple[float, KVError]]:
            begun.set()
            report = on_rank_0(transport, on_progress)
            made = make_strategy(strategy, self.config.encode, transport, self.files.vocab_size)
            engine, shard, victims = self.group.at_hand(transport, document, "encode")
            shard.rewind()
            cost = engine.encode([shard], [ids], made, report, victims)
            transport.publish("metrics")
            metrics = gather_metrics(transport, shard.cache.nbytes, cost.bytes_sent)
            return metrics, self._slowest_and_worst(transport, cost)

        shards = list(document.shards)
        with _used_up(document, begun):
            metrics, (took_s, kv_error) = self.group.run(append)[0]
        pinned = document in self.shelf.pinned
        self.shelf.remove(document)
        made = replace(
            document,
            ids=[*document.ids, *ids],
            strategy=strategy,
            encode_s=took_s,
            metrics=metrics,
            shards=shards,
            kv_error=kv_error,
        )
        self.shelf.add(made)
        if pinned:
            made.pin()
        return made

    def ask(
        self,
        document: Document,
        question: Text,
        *,
        on_text: Callable[[str], None] | None = None,
        until: Callable[[str], bool] | None = None,
        settings: GenerationConfig | None = None,
        **changes: Any,
    ) -> Answer:
        """Answer a question, given as text or as token ids, about an encoded document.

        The document can be asked again: a question leaves nothing behind.  `on_text` receives
        the answer piece by piece on rank 0; `until` is asked on every rank about the text so far,
        and ends the answer when it is true.  `changes` are fields of GenerationConfig, such as
        `max_new_tokens=32`.

        Raises:
            UserError: the question is empty or too long for the model, or a setting is wrong.
        """
        ids = token_ids("question", question, self.files.query_ids, self.files.vocab_size)
        return self.answer(
            document, ids, on_text=on_text, until=until, settings=settings, **changes
        )

    def converse(self, document: Document) -> Conversation:
        """A conversation about a document: its `ask` takes one question after another."""
        check_held(document, self)
        return Conversation(self, document)

    def answer(
        self,
        document: Document,
        ids: Sequence[int],
        *,
        top: object = None,
        before: Sequence[int] = (),
        on_text: Callable[[str], None] | None = None,
        until: Callable[[str], bool] | None = None,
        settings: GenerationConfig | None = None,
        ends: Collection[int] = (),
        **changes: Any,
    ) -> Answer:
        """`ask`, for the token ids of a question; these tokens are `ends` beside the model's own.

        `before` are earlier turns behind the document.  If there is a `top`, whose turns they
        are, KV of this turn stays for its next one; with none, nothing is left behind.
        """
        chosen = replace(settings or self.config.generation, **changes)
        check_generation(chosen)
        check_ids("question", ids, self.files.vocab_size)
        check_held(document, self)
        self.check_question(document, len(before) + len(ids), chosen.max_new_tokens)
        self.shelf.use(document)
        tokenizer, ends = self.files.tokenizer, self.files.end_tokens().union(ends)
        if chosen.stop and tokenizer is None:
            raise UserError("generation.stop", chosen.stop[0], "needs a model with a tokenizer")

        def answer(transport: Transport) -> Answer:
            started, sent = time.perf_counter(), transport.counters.bytes_sent
            engine, shard, victims = self.group.at_hand(transport, document, "question")
            shown = on_text if transport.rank == 0 else None
            read = shard.take_up(top, document.tokens + len(before)) - document.tokens
            new = [*before[read:], *ids]
            try:
                with closing(engine.generate(shard, new, chosen, victims)) as steps:
                    made = collect(steps, chosen, ends, tokenizer, shown, until)
                    transport.publish("metrics")
                    sent = transport.counters.bytes_sent - sent
                    sent += document.metrics.bytes_sent[transport.rank]
                    metrics = gather_metrics(transport, shard.cache.nbytes, sent)
            except BaseException:
                shard.rewind()  # ranks may have come to different tokens
                raise
            shard.leave(top)
            times = made.times_s
            return Answer(
                text=made.text,
                ids=made.ids,
                query_tokens=len(ids),
                finish_reason=made.finish_reason,
                ttft_s=times[0] - started,
                tpot_s=(times[-1] - times[0]) / max(1, len(times) - 1),
                latency_s=times[-1] - started,
                token_s=[time_s - started for time_s in times],
                first_logits=made.first_logits,
                metrics=metrics,
            )

        found = self.group.run(answer)[0]
        # ranks make tensors that callers could not change
        return replace(found, first_logits=found.first_logits.clone())

    def score(
        self,
        document: Document | Text,
        continuations: Sequence[Text],
        *,
        after: Text = (),
        on_progress: OnProgress | None = None,
    ) -> list[Score]:
        """How likely each of some continuations is, token by token; one Score for each.

        Each follows the document, or, between the two, `after` (such as the ids of a question);
        none sees another.  A document that is encoded already is left as it was: its last token is
        read once more, for what comes next.  One given as text or token ids is encoded for this
        alone, with `on_progress` as in `encode`, and nothing of a chat is put around a text.

        Raises:
            UserError: something is empty or too long, or, for an encoded document with nothing
                after it, layers with a window have forgotten what its last token saw.
        """
        return scoring.score(self, document, continuations, after, on_progress)

    def score_text(self, text: Text, on_progress: OnProgress | None = None) -> Score:
        """How likely each token of a text was, but for the first, which has nothing before it."""
        return self.score_texts([text], on_progress)[0]

    def score_texts(
        self,
        texts: Sequence[Text],
        on_progress: OnProgress | None = None,
        *,
        strategy: str | StrategyConfig | None = None,
        starts: Sequence[int] | None = None,
    ) -> list[Score]:
        """The same of several texts, which are encoded together as by `encode_batch`.

        Of text i the tokens from index `starts[i]` on are scored; unless given that is 1.  Each
        rank scores what follows the tokens that it computes, some at a time: texts may be as long
        as documents, and their last token is not read.  By the ring scores are exact; by star a
        token is given what the block of the one before it sees, and anchors are not counted.
        Nothing of a chat is put around texts.

        Raises:
            UserError: as `encode_batch`, or a text has nothing at its start to be scored.
        """
        to_ids, size = self.files.plain_ids, self.files.vocab_size
        check_texts("texts", texts)
        ids = [token_ids("text", text, to_ids, size) for text in texts]
        firsts = [1] * len(ids) if starts is None else starts
        scored = [ScoredText(*pair) for pair in zip(ids, firsts, strict=True)]
        for text in scored:
            if not 0 < text.start < len(text.ids):
                what = f"of {len(text.ids)} tokens is scored from the second on, and has none there"
                raise UserError("text", f"from token {text.start}", what)
        read = [text.read for text in scored]
        found = self._encode(read, on_progress, strategy, scored=scored)[1] if ids else []
        # ranks make tensors that callers could not change
        return [Score(each.ids, each.logprobs.clone(), each.greedy.clone()) for each in found]

    def logits(self, document: Document, ids: Sequence[int], last: int = 1) -> torch.Tensor:
        """What the model expects after each of the last `last` of `ids`, read after a document.

        Float32 logits (last, vocab) on the CPU, the same on every rank; the document is left as
        it was.  Row −1 − i is about the token that would follow ids[−1 − i].

        Raises:
            UserError: ids outside the vocabulary, more rows than ids, or too many positions.
        """
        check_held(document, self)
        ids = token_ids("ids", ids, self.files.query_ids, self.files.vocab_size)
        if not 0 < last <= len(ids):
            raise UserError("last", last, f"allowed: from 1 to the {len(ids)} ids")
        self.check_question(document, len(ids))
        self.shelf.use(document)

        def logits(transport: Transport) -> torch.Tensor:
            engine, shard, victims = self.group.at_hand(transport, document, "score")
            return engine.logits(shard, ids, last, victims)

        return self.group.run(logits)[0].cpu().clone()

    def save(self, document: Document, folder: str) -> None:
        """Write an encoded document to a folder, whole or not at all.

        A document that is saved there already is replaced once the new one is complete.  All
        ranks write to the same folder, each its share; another run that does is waited for.

        Raises:
            UserError: the folder holds something else, or there is no room; what was saved there
                before is as it was.
        """
        kept.save(self, document, folder)

    def encode_kept(
        self,
        document: Text,
        folder: str,
        checkpoint_every: int,
        on_progress: OnProgress | None = None,
        *,
        length: int = 0,
    ) -> Document:
        """Encode a document and save it, part by part: a run that was stopped goes on.

        After every `checkpoint_every` chunks what is encoded is on the disk, in a folder beside
        `folder` whose name ends in `.unfinished`; there the next run with the same document takes
        it up, at the same or another number of ranks.  `length` is as in `encode`.

        Raises:
            UserError: as `encode` and `save`; or the unfinished folder has another document, or
                another run writes to it.
        """
        if isinstance(self.config.strategy, StarConfig):
            why = "star's blocks are encoded in any order; allowed: with ring"
            raise UserError("document.checkpoint_every", checkpoint_every, why)
        if checkpoint_every < 1:
            raise UserError("document.checkpoint_every", checkpoint_every, "allowed: 1 or more")
        unfinished = unfinished_place(folder)
        for place in (folder, unfinished):
            check_place("document.save", place)
        ids = token_ids("document", document, self.files.context_ids, self.files.vocab_size)
        check_fits(self.config, self.files, self.world_size, len(ids))
        with kept.alone(self, unfinished, wait=False):
            return kept.encode_kept(self, ids, folder, checkpoint_every, on_progress, length)

    def load(self, folder: str) -> Document:
        """A document that was saved, by this model, at any number of ranks and in any layout.

        Raises:
            UserError: it is damaged, or was made by another model or with other settings.
        """
        return kept.load(self, folder)

    def check_question(self, document: Document, query: int, new: int = 0) -> None:
        """Raise UserError if so many tokens cannot follow a document, with so many new ones."""
        check_held(document, self)
        config = replace(self.config, strategy=document.strategy)
        # as it was encoded, maybe by other ranks
        check_fits(config, self.files, document.encoded_by, document.tokens, query, new)
        read = document.tokens + query
        self._check_rope(document, read, f"encode it with length={read} for this question")

    def check_lengths(self, lengths: Collection[int]) -> int:
        """The longest; UserError unless one encoded document can begin texts of all these tokens.

        It is encoded with this `length`.
        """
        longest = max(lengths)
        for length in lengths:
            if not self.group.any_engine.same_rope(longest, length):
                why = (
                    "this model's rotary embedding depends on the length of the text: with what is"
                    f" read after it, it would be encoded for {length} tokens and for {longest}"
                )
                raise UserError("document", None, f"{why}; ask in runs of their own")
        return longest

    def _check_rope(self, document: Document, length: int, instead: str) -> None:
        engine = self.group.any_engine
        if not engine.same_rope(document.shards[0].length, length):
            raise UserError(
                "document",
                f"{document.tokens} tokens",
                "this model's rotary embedding depends on the length of the text: " + instead,
            )

    def close(self) -> None:
        """Leave the group of ranks; the last call.  Writes the trace, if there is one.

        Raises:
            UserError: it cannot be written.
        """
        try:
            if self._trace is not None:
                self._finish_trace(self._trace)
        finally:
            self.group.close()

    def _finish_trace(self, trace: Trace) -> None:
        written = trace.finish(
            {
                "strategy": self.config.strategy.name,
                "transport": self.transport,
                "world_size": self.world_size,
                "device": self.device.type,
                "dtype": str(self.dtype).removeprefix("torch."),
                "kernel": self.kernel,
            }
        )
        if written is not None:
            for line in written.lines:
                log.info(line)


@contextmanager
def _used_up(document: Document, begun: threading.Event) -> Iterator[None]:
    """Its KV becomes another's; only if that is refused or not `begun`, it is what it was."""
    try:
        yield
    except UserError:
        raise
    except BaseException:
        if begun.is_set():
            document.shards.clear()
        raise
    document.shards.clear()
