"""The tasks of the public harness `lm-eval`, unchanged, with their texts spread over ranks.

    from ringstar.harness import RingstarLM                       # needs the extra `lm-eval`
    lm_eval.simple_evaluate(model=RingstarLM("DIR", strategy="star"), tasks=[...])

Every rank makes the same calls and gets the same results.  To the harness they are one: its own
ranks would share out samples, ours share each text.  What `simple_evaluate` returns it gives to the
first rank of each machine, and None to others.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError
from tqdm import tqdm

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("lm-eval is not installed: pip install 'ringstar[lm-eval]'") from error

from ringstar.checks import check_any_length
from ringstar.config import GenerationConfig, StarConfig, check_generation
from ringstar.errors import Refusal, UserError
from ringstar.runtime import Document, LongContext
from ringstar.scores import Score

log = logging.getLogger("ringstar")

T = TypeVar("T")
R = TypeVar("R")

# of each context, read after what star encodes, and seeing all of it
STAR_QUERY_TOKENS = 256
MAX_GEN_TOKS = 256
_MOST_TEXTS = 64
# what a task may ask for without changing what is generated
_NEUTRAL = {
    "early_stopping": False,
    "length_penalty": 1.0,
    "min_p": 0.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "top_k": 0,
    "typical_p": 1.0,
    "use_cache": True,
}
_OF_SAMPLING = ("min_p", "top_k", "typical_p")


@dataclass(frozen=True, slots=True)
class _Context:
    """Token ids of a context, and the requests that have it, by number."""

    ids: list[int]
    requests: list[int]


@register_model("ringstar")
class RingstarLM(TemplateLM):
    """A language model of `lm-eval` whose contexts are encoded over ranks, once each.

    Args:
        pretrained: a local Hugging Face folder, or a GGUF file.
        runtime: in its place, a LongContext that is made already.
        batch_size: contexts that are encoded together, `auto`: as many as one forward pass of all
            ranks takes.  By star they are encoded one after another.
        max_length: positions; the model's own unless given.  Longer contexts lose their beginning.
        max_gen_toks: of an answer, where a task does not say it.
        query_tokens: tokens at the end of a context that every rank reads, with exact attention to
            all before them; 1 unless given, for star 256.
        add_bos_token: whether texts get special tokens; as the tokenizer has it unless given.
        device: lm-eval's own choice, which means nothing here: the transport says where.
        seed: of sampled answers; each request of a task has one of its own, made of this.
        options: of `LongContext.from_pretrained`, such as `strategy`, `transport`, `world_size`.

    Raises:
        UserError: as `LongContext.from_pretrained`, or the model has no tokenizer.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        runtime: LongContext | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        query_tokens: int | None = None,
        add_bos_token: bool | None = None,
        device: str | None = None,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__()
        if (runtime is None) == (pretrained is None):
            raise UserError("pretrained", pretrained, "needed: a model's folder, or a runtime")
        if runtime is not None and options:
            name, value = next(iter(options.items()))
            raise UserError(name, value, "the runtime that is given has its own; drop it")
        self.runtime = runtime or LongContext.from_pretrained(str(pretrained), **options)
        if self.runtime.files.tokenizer is None:
            raise UserError("pretrained", pretrained, "has no tokenizer, and tasks are text")
        self.tokenizer: Any = self.runtime.files.tokenizer
        automatic = str(batch_size).startswith("auto")  # lm-eval also has `auto:4`
        given = max_batch_size if automatic else int(batch_size)
        self.batch_size = given or _MOST_TEXTS
        self.max_length = max_length or self.runtime.files.max_positions
        self.max_gen_toks = max_gen_toks
        check_any_length(self.runtime.config.strategy)
        star = isinstance(self.runtime.config.strategy, StarConfig)
        self.query_tokens = query_tokens or (STAR_QUERY_TOKENS if star else 1)
        self._add_bos_token, self._seed = add_bos_token, seed
        self._warned: set[str] = set()
        if device is not None:
            self._warn(f"device={device} is not asked: each rank has its own, by the transport")

    def _warn(self, line: str) -> None:
        """Once, on rank 0."""
        if self.runtime.rank == 0 and line not in self._warned:
            log.warning(line)
        self._warned.add(line)

    def __str__(self) -> str:
        return "ringstar"

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """As lm-eval's Hugging Face backend: nothing is put before a text that has it already."""
        special = self._add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode(self.prefix_token_id)
        ):
            special = False
        return self.tokenizer.encode(
            string, **({} if special is None else {"add_special_tokens": special})
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """As lm-eval's Hugging Face backend: without a system's part where a template has none."""

        def applied(history: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return applied(chat_history)
        except TemplateError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            self._warn(f"the chat template takes no system's part: left out ({error})")
            return applied(others)

    def get_model_info(self) -> dict[str, Any]:
        """What stands in lm-eval's results beside the name of the model."""
        runtime = self.runtime
        return {
            "model_path": str(runtime.files.folder),
            "model_dtype": str(runtime.dtype).removeprefix("torch."),
            "strategy": str(runtime.config.strategy),
            "ranks": runtime.world_size,
            "transport": runtime.transport,
            "query_tokens": self.query_tokens,
        }

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): the sum, and whether all of it is greedy."""
        found: dict[int, tuple[float, bool]] = {}
        kept = [(before + ids)[-self.max_length - 1 :] for _, before, ids in requests]
        contexts = [ids[: -len(request[2])] for ids, request in zip(kept, requests, strict=True)]
        sizes = [len(request[2]) - 1 for request in requests]

        def score(document: Document, after: list[int], number: int) -> None:
            texts, _, ids = requests[number]
            (score,) = self.runtime.score(document, [ids], after=after)
            found[number] = (score.logprob, score.is_greedy)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[number])

        self._each(contexts, sizes, score, "loglikelihood", disable_tqdm)
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, each rank its share of the tokens; longer ones in windows."""
        sums = [0.0] * len(requests)
        windows = [
            (number, *make_disjoint_window(pair))
            for number, request in enumerate(requests)
            for pair in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
        ]
        bar = self._bar(len(windows), "loglikelihood_rolling", disable_tqdm)
        for batch in self._batches([len(before) + len(ids) for _, before, ids in windows]):
            some = [windows[index] for index in batch]
            texts = [(before + ids, len(before)) for _, before, ids in some]
            scores = _apart_if_refused(self._scored, texts)
            for (number, _, _), score in zip(some, scores, strict=True):
                sums[number] += score.logprob
            bar.update(len(some))
        bar.close()
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _scored(self, texts: Sequence[tuple[list[int], int]]) -> list[Score]:
        ids, starts = zip(*texts, strict=True)
        return self.runtime.score_texts(list(ids), starts=list(starts))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop text, an end token, or as many tokens as the task allows."""
        found: dict[int, str] = {}
        settings = [self._settings(number, r.args[1]) for number, r in enumerate(requests)]
        contexts = [
            self._context(request.args[0], self.max_length - each.max_new_tokens)
            for request, each in zip(requests, settings, strict=True)
        ]
        settings = [self._before_jump(*pair) for pair in zip(contexts, settings, strict=True)]

        def answer(document: Document, after: list[int], number: int) -> None:
            chosen = settings[number]
            ends = self._ends(chosen.stop)
            made = self.runtime.answer(document, after, settings=chosen, ends=ends)
            text = self.tokenizer.decode(made.ids, skip_special_tokens=True)
            found[number] = postprocess_generated_text(text, chosen.stop, None)
            self.cache_hook.add_partial("generate_until", requests[number].args, found[number])

        self._each(contexts, [0] * len(contexts), answer, "generate_until", disable_tqdm)
        return [found[number] for number in range(len(requests))]

    def _ends(self, stops: Sequence[str]) -> set[int]:
        """The tokenizer's own end, and stop texts that are special tokens: no text has those."""
        added = self.tokenizer.added_tokens_decoder
        whole = [self.tokenizer.encode(text, add_special_tokens=False) for text in stops]
        special = {ids[0] for ids in whole if len(ids) == 1 and ids[0] in added}
        own = self.tokenizer.eos_token_id
        return {token for token in special if added[token].special} | ({own} - {None})

    def _context(self, text: str, room: int) -> list[int]:
        """The last tokens of a text, as many as there is room for."""
        if room < 2:
            raise UserError("max_gen_toks", None, f"leaves {room} of {self.max_length} positions")
        ids = self.tok_encode(text)[-room:]
        if len(ids) < 2:
            raise UserError("context", text, "needed to go on from: two tokens or more")
        return ids

    def _before_jump(self, context: list[int], asked: GenerationConfig) -> GenerationConfig:
        """An answer that ends before its model's rope would change what is encoded."""
        after, read = self.runtime.files.rope_jumps_after, len(context)
        if after is None or not read <= after < read + asked.max_new_tokens - 1:
            return asked
        self._warn(
            f"after {after} positions this model's rotary embedding (longrope) changes: answers"
            " that would cross it end there, and in lm-eval's own backend they go on"
        )
        return replace(asked, max_new_tokens=after - read + 1)

    def _settings(self, number: int, asked: dict[str, Any]) -> GenerationConfig:
        """Of request `number`; UserError for what a task asks of sampling and we do not have."""
        kwargs = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        samples = bool(kwargs.pop("do_sample"))
        stop = [text for text in kwargs.pop("until") if text]
        new, temperature = kwargs.pop("max_gen_toks"), float(kwargs.pop("temperature", 0.0))
        top_p = kwargs.pop("top_p", None)
        for name, value in kwargs.items():
            neutral = value is None or (name in _OF_SAMPLING and not samples)
            if not neutral and value != _NEUTRAL.get(name):
                raise UserError(
                    f"generation_kwargs.{name}", value, "the runtime has no such option"
                )
        if not samples:
            return GenerationConfig(new, stop=stop)
        if temperature <= 0:
            why = "do_sample needs one above 0"
            raise UserError("generation_kwargs.temperature", temperature, why)
        self._warn_of_sampling(asked)
        # of neighbouring seeds none may have the samples of another
        seed = random.Random(f"{self._seed}/{number}").getrandbits(31)
        share = 1.0 if top_p is None else top_p
        chosen = GenerationConfig(new, temperature, share, seed, stop)
        check_generation(chosen)
        return chosen

    def _warn_of_sampling(self, asked: dict[str, Any]) -> None:
        """Say what lm-eval's own backend would sample by, where a task does not say."""
        if asked.get("top_k") is None:
            self._warn(
                "a task that samples names no top_k: all tokens are sampled from, and in lm-eval's"
                " own backend the 50 likeliest, or as many as generation_config.json says"
            )
        theirs = self.runtime.files.sampling_limits()
        unheard = [name for name in theirs if asked.get(name) is None]
        if unheard:
            self._warn(
                f"generation_config.json limits sampling by {', '.join(unheard)}, which a task that"
                " samples does not name: there is no such limit here, and in lm-eval's own backend"
                " there is"
            )

    def _each(
        self,
        contexts: Sequence[list[int]],
        sizes: Sequence[int],
        use: Callable[[Document, list[int], int], None],
        name: str,
        quiet: bool,
    ) -> None:
        """Encode every context once, and call `use` for each request that has it.

        `sizes` are the tokens that each request will read behind its context before it needs the
        next one.  `use` takes the document, the tokens of the context that are not in it, and the
        request's number.
        """
        bar = self._bar(len(contexts), name, quiet)
        groups = self._groups(contexts, sizes)
        for batch in self._batches([len(group.ids) for group in groups]):
            some = [groups[index] for index in batch]
            cuts = [max(1, len(group.ids) - self.query_tokens) for group in some]
            lengths = [len(g.ids) + max(sizes[number] for number in g.requests) for g in some]
            heads = [group.ids[:cut] for group, cut in zip(some, cuts, strict=True)]
            texts = list(zip(heads, lengths, strict=True))
            documents = _apart_if_refused(self._encoded, texts)
            for group, cut, document, text in zip(some, cuts, documents, texts, strict=True):
                for number in group.requests:
                    if document.evicted:  # it made room for those before it
                        (document,) = self._encoded([text])
                    use(document, group.ids[cut:], number)
                    bar.update()
            del documents, document  # they may be dropped: each context has all its requests
        bar.close()

    def _encoded(self, texts: Sequence[tuple[list[int], int]]) -> list[Document]:
        ids, lengths = zip(*texts, strict=True)
        return self.runtime.encode_batch(list(ids), lengths=list(lengths))

    def _groups(self, contexts: Sequence[list[int]], sizes: Sequence[int]) -> list[_Context]:
        """Requests by their context; and by their size, where rope depends on that."""
        by_length = self.runtime.files.rope_by_length
        found: dict[tuple[int, ...], _Context] = {}
        for number, ids in enumerate(contexts):
            key = (sizes[number] if by_length else 0, *ids)
            found.setdefault(key, _Context(ids, [])).requests.append(number)
        return list(found.values())

    def _batches(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Texts that are encoded together, by number: the longest first, each pass filled."""
        room = self.runtime.config.encode.chunk_tokens * self.runtime.world_size
        batch: list[int] = []
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            if batch and (len(batch) == self.batch_size or _total(sizes, [*batch, index]) > room):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _bar(self, total: int, name: str, quiet: bool) -> Any:
        return tqdm(total=total, desc=name, disable=quiet or self.runtime.rank != 0)


def _apart_if_refused(work: Callable[[list[T]], list[R]], items: list[T]) -> list[R]:
    """All together; one by one where there is no room for all."""
    try:
        return work(items)
    except Refusal:
        if len(items) == 1:
            raise
        return [result for item in items for result in work([item])]


def _total(sizes: Sequence[int], batch: Iterable[int]) -> int:
    return sum(sizes[index] for index in batch)
