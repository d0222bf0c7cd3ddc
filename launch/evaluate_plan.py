"""All that an evaluation will do, checked before anything heavy starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from fnmatch import filter as matching
from functools import partial
from pathlib import Path

from launch.evaluate_prompt import prompt_ids, token_counter
from launch.evaluate_star import KEY, NONE, Contender, contenders
from launch.inputs import is_stream, read_text
from launch.sizes import listed, read_lengths
from ringstar.checks import check_fits
from ringstar.config import EvaluateConfig, EvaluationConfig
from ringstar.errors import UserError
from ringstar.evaluation import (
    BY_DEPTH,
    TASKS,
    CountTokens,
    Essay,
    Material,
    NoSample,
    QuestionSet,
    Sample,
    Task,
    TooShort,
    check_packages,
    default_essay,
    essay_of,
    even_depths,
    invented_questions,
    make_sample,
    read_questions,
)
from ringstar.evaluation.qa import QuestionAnswering
from ringstar.models import ModelFiles
from ringstar.ranks import world_size_of

# told to templates that print today's date: a run that goes on tomorrow has the same prompts
_DAY = datetime(2025, 1, 1)
_ALONE = f"{KEY}={NONE} evaluates exact alone"


@dataclass(frozen=True, slots=True)
class Cell:
    """Samples that are scored together; `depth` is that of a needle, if it is chosen."""

    task: Task
    length: int
    depth: float | None


@dataclass(frozen=True)
class Plan:
    """Every contender gets every sample; `sample` makes the same one on every rank.

    `files` make prompts: their day is always the same.
    """

    contenders: list[Contender]
    cells: list[Cell]
    config: EvaluateConfig
    material: Material
    files: ModelFiles
    count: CountTokens
    notes: list[str]

    def numbers(self, cell: Cell) -> range:
        """Of the samples of a cell."""
        depth_samples = self.config.depth_samples or self.config.samples
        return range(self.config.samples if cell.depth is None else depth_samples)

    def jobs(self) -> Iterator[tuple[Cell, int]]:
        """Every sample; the first of each cell before the second of any."""
        most = max(len(self.numbers(cell)) for cell in self.cells)
        for number in range(most):
            yield from ((cell, number) for cell in self.cells if number in self.numbers(cell))

    def sample(self, cell: Cell, number: int) -> Sample:
        """UserError if the length is too short for it, or the material has none."""
        task, length = cell.task, cell.length
        made = (task, length, number, self.config.seed, self.material, self.count, cell.depth)
        try:
            return make_sample(*made)
        except TooShort as error:
            why = f"{task.name} needs some {error.least} tokens with this tokenizer"
            raise UserError("evaluate.lengths", length, why) from error
        except NoSample as error:
            why = f"{error} ({task.name}); name other tasks in evaluate.tasks"
            raise UserError("evaluate.qa_path", self.config.qa_path, why) from error


def make_plan(config: EvaluationConfig, files: ModelFiles) -> Plan:
    """Read and check the whole input; raises UserError."""
    if files.tokenizer is None:
        raise UserError("model.path", files.folder, "has no tokenizer, and tasks are texts")
    files = files.dated(_DAY)
    check_packages()
    given = config.evaluate
    world = config.launch.nproc or world_size_of(config.transport)
    every, why = contenders(given.star, world)
    lengths, tasks = read_lengths("evaluate.lengths", given.lengths), read_tasks(given.tasks)
    for length in lengths:  # before texts of that length are made
        with _blamed_on(length):
            check_fits(replace(config, strategy=every[0].strategy(length)), files, world, length)
    cells = [
        Cell(task, length, depth)
        for length in lengths
        for task in tasks
        for depth in (even_depths(given.depths) if task.name == BY_DEPTH else [None])
    ]
    material, notes = read_material(given), [f"exact side: {why}"]
    notes.extend(_few_questions(tasks, material, given.samples))
    plan = Plan(every, cells, given, material, files, token_counter(files), notes)
    for cell in cells:
        _check_cell(config, files, world, plan, cell)
    return plan


def _few_questions(tasks: Sequence[Task], material: Material, samples: int) -> Iterator[str]:
    for task in tasks:
        if isinstance(task.maker, QuestionAnswering):
            count = len(material.questions.of_hops(task.maker.several))
            if 0 < count < samples:
                yield f"{task.name}: {count} questions for {samples} samples: they come again"


def read_tasks(text: str) -> list[Task]:
    """Tasks by name or pattern, in RULER's order; raises UserError."""
    patterns = listed(text)
    unknown = next((word for word in patterns if not matching(TASKS, word)), None)
    if unknown is not None or not patterns:
        why = f"{unknown}: no such task; " if unknown else ""
        raise UserError("evaluate.tasks", text, f"{why}allowed: {', '.join(TASKS)}, or patterns")
    chosen = {name for word in patterns for name in matching(TASKS, word)}
    return [task for name, task in TASKS.items() if name in chosen]


def read_material(given: EvaluateConfig) -> Material:
    """A user's files, or what needs none; read, or a UserError, once a task needs them."""
    essay, qa = given.essay_path, given.qa_path
    return Material(
        default_essay if essay is None else partial(_read_essay, essay),
        invented_questions if qa is None else partial(_read_qa, qa),
    )


def _read_essay(path: str) -> Essay:
    return essay_of(_file_text("evaluate.essay_path", path), Path(path).name)


def _read_qa(path: str) -> QuestionSet:
    text = _file_text("evaluate.qa_path", path)
    try:
        return read_questions(text, Path(path).name)
    except ValueError as error:
        raise UserError("evaluate.qa_path", path, str(error)) from error


def _file_text(key: str, path: str) -> str:
    """Of a file: a run that goes on reads it again."""
    if is_stream(path):
        raise UserError(key, path, "the name of a text file is needed")
    return read_text(key, path)


def _check_cell(
    config: EvaluationConfig, files: ModelFiles, world: int, plan: Plan, cell: Cell
) -> None:
    """Raise UserError for a cell whose first sample the model or a contender cannot take."""
    sample = plan.sample(cell, 0)
    context, query = map(len, prompt_ids(files, sample.prompt))
    sizes = (context, query, sample.new_tokens)
    for contender in plan.contenders:
        with _blamed_on(cell.length, contender.given):
            contender.fitting(config, files, world, *sizes)


@contextmanager
def _blamed_on(length: int, star: str = "") -> Iterator[None]:
    """What does not fit is said of the length, or of the setting of star that it does not fit."""
    try:
        yield
    except UserError as error:
        if star and error.key == KEY:
            raise UserError(KEY, star, f"at {length} tokens: {error.allowed}") from error
        if star and error.key.startswith("strategy"):
            why = str(error).replace("strategy.", "").replace("use strategy=ring", _ALONE)
            raise UserError(KEY, star, f"at {length} tokens: {why}") from error
        raise UserError("evaluate.lengths", length, str(error)) from error
