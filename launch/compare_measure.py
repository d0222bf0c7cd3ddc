"""One setting after another: encode, answer, and be held against exact.

Every rank makes the same calls; logits are kept and compared on rank 0 alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from launch.compare_needles import Haystack, is_found
from launch.compare_plan import Plan
from launch.compare_star import Setting
from launch.progress import WorkBar
from ringstar.answers import Answer
from ringstar.divergence import kl_divergence, same_top
from ringstar.runtime import Document, LongContext

# as much of the document is encoded once before, so that no setting pays for the first steps
_WARM_UP_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Divergence:
    """At each position KL(exact ‖ setting) in nats, and whether both have the same first choice."""

    kl: list[float]
    same_top: list[bool]


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer about one needle."""

    answer: str
    found: bool


@dataclass
class Measured:
    """What was seen of one setting.

    Times are seconds, `kv_bytes` and `bytes_sent` one value a rank, of encoding the document.
    `quoted` is, for each passage, the share of its tokens that the model expected next.
    `of_answers` and `of_passages` are empty for exact; `trials` has a list for each haystack.
    """

    setting: Setting
    encode_s: float
    kv_bytes: list[int]
    bytes_sent: list[int]
    answers: list[Answer] = field(default_factory=list)
    of_answers: list[Divergence] = field(default_factory=list)
    of_passages: list[Divergence] = field(default_factory=list)
    quoted: list[float] = field(default_factory=list)
    trials: list[list[Finding]] = field(default_factory=list)
    trial_encode_s: list[float] = field(default_factory=list)


class Measurement:
    """Puts settings through a plan: exact first, whose answers and logits the others are held to.

    At most one document is encoded at a time.
    """

    def __init__(self, runtime: LongContext, plan: Plan, bar: WorkBar):
        self._runtime, self._plan, self._bar = runtime, plan, bar
        self._exact: Measured | None = None
        self._exact_logits: list[Tensor] = []  # of each answer, then of each passage; rank 0's

    def run(self) -> list[Measured]:
        """Exact, then every setting of star, in the order of the plan."""
        self._check_lengths()
        self._runtime.encode(self._plan.document[:_WARM_UP_TOKENS])
        found = []
        for setting in self._plan.settings:
            found.append(self._measure(setting))
            self._exact = self._exact or found[0]
        return found

    def _measure(self, setting: Setting) -> Measured:
        document = self._encode(self._plan.document, self._read, setting)
        metrics = document.metrics
        seen = Measured(setting, document.encode_s, metrics.kv_bytes, metrics.bytes_sent)
        for question in self._plan.questions:
            seen.answers.append(self._ask(document, question.ids))
        self._hold_answers(document, seen)
        self._hold_passages(document, seen)
        del document  # before the next one takes its place
        for haystack in self._plan.haystacks:
            self._search(haystack, seen)
        return seen

    def _hold_answers(self, document: Document, seen: Measured) -> None:
        """Exact's answers are given word by word: what would this setting have said next?"""
        answers = (self._exact or seen).answers
        for number, (question, answer) in enumerate(
            zip(self._plan.questions, answers, strict=True)
        ):
            told, last = forced(question.ids, answer)
            logits_TV = self._score(document, told, last)
            self._hold(number, logits_TV, seen.of_answers)

    def _hold_passages(self, document: Document, seen: Measured) -> None:
        before = len(self._plan.questions)
        for number, passage in enumerate(self._plan.passages):
            logits_TV = self._score(document, passage.ids, len(passage.ids))
            self._hold(before + number, logits_TV, seen.of_passages)
            seen.quoted.append(quoted_share(passage.ids, logits_TV))

    def _hold(self, number: int, logits_TV: Tensor, into: list[Divergence]) -> None:
        if self._runtime.rank != 0:
            return
        if self._exact is None:
            self._exact_logits.append(logits_TV)
            return
        exact_TV = self._exact_logits[number]
        kl, same = kl_divergence(exact_TV, logits_TV), same_top(exact_TV, logits_TV)
        into.append(Divergence(kl.tolist(), same.tolist()))

    def _search(self, haystack: Haystack, seen: Measured) -> None:
        document = self._encode(haystack.ids, self._asked(haystack), seen.setting)
        seen.trial_encode_s.append(document.encode_s)
        findings = []
        for needle in haystack.needles:
            fact = needle.fact
            answer = self._ask(document, self._runtime.files.query_ids(fact.question))
            findings.append(Finding(answer.text, is_found(fact, answer.text)))
        seen.trials.append(findings)

    def _check_lengths(self) -> None:
        """Raise UserError now if a document would have to be encoded for each question anew."""
        self._length(self._plan.document, self._read)
        for haystack in self._plan.haystacks:
            self._length(haystack.ids, self._asked(haystack))

    @property
    def _read(self) -> list[int]:
        """The tokens that are read after the document: questions, with answers, and passages."""
        new = self._runtime.config.generation.max_new_tokens
        asked = [len(question.ids) + more for question in self._plan.questions for more in (0, new)]
        return asked + [len(passage.ids) for passage in self._plan.passages]

    def _asked(self, haystack: Haystack) -> list[int]:
        files = self._runtime.files
        return [len(files.query_ids(needle.fact.question)) for needle in haystack.needles]

    def _length(self, ids: Sequence[int], read: Sequence[int]) -> int:
        return self._runtime.check_lengths([len(ids) + tokens for tokens in read])

    def _encode(self, ids: Sequence[int], read: Sequence[int], setting: Setting) -> Document:
        length = self._length(ids, read)
        with self._bar.encode(setting.label, len(ids)) as on_progress:
            return self._runtime.encode(ids, on_progress, strategy=setting.strategy, length=length)

    def _ask(self, document: Document, query_ids: Sequence[int]) -> Answer:
        with self._bar.question(self._runtime.config.generation.max_new_tokens):
            return self._runtime.ask(document, query_ids)

    def _score(self, document: Document, ids: Sequence[int], last: int) -> Tensor:
        with self._bar.score(len(ids)):
            return self._runtime.logits(document, ids, last)


def forced(query_ids: Sequence[int], answer: Answer) -> tuple[list[int], int]:
    """The tokens to give, and at how many of the last something is chosen.

    That is every token of the answer; and that it ends there, if it ended by itself.
    """
    ids = answer.ids if answer.finish_reason == "stop" else answer.ids[:-1]
    return [*query_ids, *ids], len(ids) + 1


def quoted_share(ids: Sequence[int], logits_TV: Tensor) -> float:
    """Of the tokens after the first, how many were the likeliest; 0 if there are none."""
    right = [
        top == token for top, token in zip(logits_TV.argmax(-1).tolist(), ids[1:], strict=False)
    ]
    return sum(right) / max(1, len(right))
