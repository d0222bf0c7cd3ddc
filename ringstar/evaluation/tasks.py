"""RULER's thirteen tasks (Hsieh et al., arXiv:2404.06654), and one needle by depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ringstar.evaluation.cwe import COMMON, CommonWords
from ringstar.evaluation.fwe import RANKS, FrequentWords
from ringstar.evaluation.material import Material
from ringstar.evaluation.niah import Needles
from ringstar.evaluation.qa import QuestionAnswering
from ringstar.evaluation.samples import CountTokens, Draft, Match, Sample
from ringstar.evaluation.sizing import TooShort, fill
from ringstar.evaluation.vt import HOPS, VariableTracking


class Maker(Protocol):
    """What writes the drafts of a task."""

    def drafts(
        self, name: str, length: int, material: Material, depth: float | None = None
    ) -> Iterator[Draft]:
        """Drafts of one sample, best first; all that is random in them depends on `name`."""
        ...


@dataclass(frozen=True, slots=True)
class Task:
    """A task as RULER has it; `references` is how many parts a score has."""

    name: str
    maker: Maker
    new_tokens: int
    references: int = 1
    match: Match = "all"


BY_DEPTH = "needle_by_depth"
_NEEDLE_TOKENS = 128
_ALL = (
    Task("niah_single_1", Needles("noise"), _NEEDLE_TOKENS),
    Task("niah_single_2", Needles("essay"), _NEEDLE_TOKENS),
    Task("niah_single_3", Needles("essay", value="uuids"), _NEEDLE_TOKENS),
    Task("niah_multikey_1", Needles("essay", keys=4), _NEEDLE_TOKENS),
    Task("niah_multikey_2", Needles("needles"), _NEEDLE_TOKENS),
    Task("niah_multikey_3", Needles("needles", key="uuids", value="uuids"), _NEEDLE_TOKENS),
    Task("niah_multivalue", Needles("essay", values=4), _NEEDLE_TOKENS, 4),
    Task("niah_multiquery", Needles("essay", keys=4, queried=4), _NEEDLE_TOKENS, 4),
    Task("vt", VariableTracking(), 30, HOPS + 1),
    Task("cwe", CommonWords(), 120, COMMON),
    Task("fwe", FrequentWords(), 50, len(RANKS)),
    Task("qa_1", QuestionAnswering(several=False), 32, match="part"),
    Task("qa_2", QuestionAnswering(several=True), 32, match="part"),
    Task(BY_DEPTH, Needles("essay"), _NEEDLE_TOKENS),
)
TASKS = {task.name: task for task in _ALL}
RULER = tuple(name for name in TASKS if name != BY_DEPTH)


class NoSample(ValueError):
    """What a task is made of holds nothing for it."""


def make_sample(
    task: Task,
    length: int,
    number: int,
    seed: int,
    material: Material,
    count: CountTokens,
    depth: float | None = None,
) -> Sample:
    """Sample `number` of a task: at most `length` tokens with the answer's, and hardly fewer.

    Needles at different depths are the same needle in the same text.

    Raises:
        TooShort: what the task needs at least is longer; its `least` counts the answer too,
            and is another one where the words are others.
        NoSample: the material has no question of this kind.
    """
    name, least = f"{seed}/{task.name}/{length}/{number}", []
    for draft in task.maker.drafts(name, length, material, depth):
        try:
            prompt, tokens = fill(draft, length - task.new_tokens, count)
        except TooShort as error:
            least.append(error.least + task.new_tokens)
            continue
        tokens += task.new_tokens
        return Sample(prompt, draft.references, tokens, task.new_tokens, draft.text_sha256)
    if not least:
        raise NoSample("holds no question of this kind")
    raise TooShort(min(least))


def even_depths(count: int) -> Sequence[float]:
    """`count` depths from the beginning of a text (0) to its end (1); one is the middle."""
    return [0.5] if count == 1 else [number / (count - 1) for number in range(count)]
