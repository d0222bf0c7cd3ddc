"""All that a comparison will do, read and checked before anything heavy starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from launch.compare_facts import Fact, make_facts
from launch.compare_needles import Haystack, even_depths, plant
from launch.compare_star import (
    Setting,
    blamed,
    default_settings,
    exact_setting,
    star_settings,
)
from launch.inputs import check_one_reader, given_text, read_document, read_text
from ringstar.checks import check_fits, check_ids
from ringstar.config import ComparisonConfig
from ringstar.errors import UserError
from ringstar.models import ModelFiles
from ringstar.ranks import world_size_of

DEFAULT_NEEDLES = 5
# the exact side's logits are kept until every setting was held against them
MOST_LOGITS_BYTES = 4 * 1024**3


@dataclass(frozen=True, slots=True)
class Question:
    """What a user asks; `text` is None if token ids were given."""

    text: str | None
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens of the document, from index `start`, which is at `depth` (0 to 1) of it."""

    start: int
    depth: float
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Plan:
    """What every setting is put through; `notes` say what was chosen, and why."""

    document: list[int]
    questions: list[Question]
    passages: list[Passage]
    haystacks: list[Haystack]
    exact: Setting
    stars: list[Setting]
    notes: list[str]

    @property
    def settings(self) -> list[Setting]:
        return [self.exact, *self.stars]

    @property
    def encodes(self) -> int:
        return len(self.settings) * (1 + len(self.haystacks))


def make_plan(config: ComparisonConfig, files: ModelFiles) -> Plan:
    """Read and check the whole input; raises UserError."""
    check_one_reader(config)
    text, own_query = read_document(config.document)
    document = files.context_ids(text) if isinstance(text, str) else list(text)
    check_ids("document", document, files.vocab_size)
    questions = list(_questions(config, files, own_query))
    world = config.launch.nproc or world_size_of(config.transport)
    exact, why = exact_setting(world)
    given = config.compare.star
    stars = star_settings(given, len(document), world) if given else []
    stars = stars or default_settings(len(document), world)
    count, no_needles = _needle_count(config, files)
    first = _first_own_token(files, text, document)
    if isinstance(text, list):
        text = files.decode(document) if count else ""
    facts = [make_facts(trial, count, text) for trial in range(config.compare.needle_trials)]
    haystacks = [_haystack(files, document, first, some) for some in facts if some]
    passages = _passages(config, document, first)
    notes = [f"exact side: {why}", *no_needles]
    if not given:
        quoted = ", ".join(f'"{star.given}"' for star in stars)
        notes.append(f"settings of star, from the document's {len(document):,} tokens: {quoted}")
    plan = Plan(document, questions, passages, haystacks, exact, stars, notes)
    _check_plan(config, files, world, plan)
    return plan


def _questions(
    config: ComparisonConfig, files: ModelFiles, own_query: list[int] | None
) -> Iterator[Question]:
    given = [given_text("question", question) for question in config.question]
    if config.question_path is not None:
        given.append(read_text("question_path", config.question_path).strip("\r\n"))
    if own_query is not None and given:
        key = "question" if config.question else "question_path"
        raise UserError(key, None, "document.ids_path has query_ids already; give one")
    if own_query is None and not given:
        raise UserError("question", None, "at least one is needed: question or question_path")
    yield from (Question(text, files.query_ids(text)) for text in given)
    if own_query is not None:
        yield Question(None, own_query)


def _first_own_token(files: ModelFiles, text: str | list[int], document: list[int]) -> int:
    """Where the user's own text begins: what a chat template puts first is nothing to quote."""
    before = len(files.context_ids("")) if isinstance(text, str) else 0
    return min(before, len(document) - 1)


def _passages(config: ComparisonConfig, document: list[int], first: int) -> list[Passage]:
    """Verbatim, at even depths; of a shorter document all of it."""
    tokens = min(config.compare.probe_tokens, len(document) - first)
    room = len(document) - first - tokens
    starts = [first + round(depth * room) for depth in even_depths(config.compare.probes)]
    whole = len(document)
    return [Passage(start, start / whole, document[start : start + tokens]) for start in starts]


def _needle_count(config: ComparisonConfig, files: ModelFiles) -> tuple[int, list[str]]:
    """How many, and what to say if that is none without having been asked for."""
    asked = config.compare.needles
    if asked == 0:
        return 0, []
    why = _why_no_prompt(files)
    if why is None:
        return DEFAULT_NEEDLES if asked is None else asked, []
    if asked is not None:
        raise UserError("compare.needles", asked, f"cannot be asked about: {why}")
    return 0, [f"no needles: {why}"]


def _why_no_prompt(files: ModelFiles) -> str | None:
    if files.tokenizer is None:
        return "the model has no tokenizer"
    try:
        _ = files.prompt
    except UserError as error:
        return error.allowed
    return None


def _haystack(files: ModelFiles, document: list[int], first: int, facts: list[Fact]) -> Haystack:
    tokenizer = files.tokenizer
    assert tokenizer is not None

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return plant(document, first, facts, encode, files.decode)


def _check_plan(config: ComparisonConfig, files: ModelFiles, world: int, plan: Plan) -> None:
    """Raise UserError for what the model, a setting, or memory cannot take."""
    if config.generation.stop and files.tokenizer is None:
        raise UserError("generation.stop", config.generation.stop[0], "needs a tokenizer")
    for question in plan.questions:
        check_ids("question", question.ids, files.vocab_size)
    exact = replace(config, strategy=plan.exact.strategy)
    sizes = _sizes(config, files, plan)
    for option, some in sizes.items():
        with _blamed_on(option, config):
            check_fits(exact, files, world, *some)
    for star in plan.stars:
        with blamed(star.given or star.label):
            for some in sizes.values():
                check_fits(replace(config, strategy=star.strategy), files, world, *some)
    _check_memory(config, files, plan)


def _sizes(
    config: ComparisonConfig, files: ModelFiles, plan: Plan
) -> dict[str, tuple[int, int, int]]:
    """The most tokens of document, question and answer, for the options that ask for them."""
    tokens, new = len(plan.document), config.generation.max_new_tokens
    sizes = {"question": (tokens, max(len(question.ids) for question in plan.questions), new)}
    if plan.passages:
        sizes["probes"] = (tokens, len(plan.passages[0].ids), 0)
    for haystack in plan.haystacks:
        asked = max(len(files.query_ids(needle.fact.question)) for needle in haystack.needles)
        size = (len(haystack.ids), asked, new)
        sizes["needles"] = max(sizes.get("needles", size), size, key=sum)
    return sizes


@contextmanager
def _blamed_on(option: str, config: ComparisonConfig) -> Iterator[None]:
    """What does not fit because of passages or needles is said of their option."""
    try:
        yield
    except UserError as error:
        if option == "question":
            raise
        value = getattr(config.compare, option)
        raise UserError(f"compare.{option}", value, f"with them, {error}; 0 is none") from error


def _check_memory(config: ComparisonConfig, files: ModelFiles, plan: Plan) -> None:
    rows = len(plan.questions) * (config.generation.max_new_tokens + 1)
    rows += sum(len(passage.ids) for passage in plan.passages)
    size = rows * files.vocab_size * 4
    if size > MOST_LOGITS_BYTES:
        raise UserError(
            "compare",
            None,
            f"{rows:,} positions of answers and passages are {size / 1024**3:.1f} GiB of logits,"
            f" and at most {MOST_LOGITS_BYTES / 1024**3:.0f} GiB are kept; lower"
            " generation.max_new_tokens, compare.probes or compare.probe_tokens, or ask less",
        )
