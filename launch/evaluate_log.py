"""Scored samples as JSON lines, which a stopped run goes on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.evaluate_plan import Plan
from launch.lines import LineLog, whole_lines
from launch.outputs import OF_MODEL, check_begun_alike, write_config
from ringstar.config import EvaluationConfig
from ringstar.errors import UserError
from ringstar.runtime import LongContext

# what a sample and its answer are called by
Key = tuple[str, int, float | None, int, str]
# sections and options of the config that samples and scores depend on
_DECISIVE = (*OF_MODEL, "evaluate.seed")


@dataclass(frozen=True, slots=True)
class Scored:
    """One sample, put to one contender; docs/evaluate.md describes each field."""

    task: str
    length: int
    depth: float | None
    index: int
    strategy: str
    seed: int
    digest: str
    tokens: int
    document_tokens: int
    query_tokens: int
    question: str
    references: list[str]
    answer: str
    answer_tokens: int
    finish_reason: str
    score: float
    encode_s: float
    ttft_s: float
    tpot_s: float
    kv_bytes: int
    bytes_sent: int
    world_size: int
    transport: str
    kernel: str
    dtype: str
    device: str
    text_sha256: str | None = None
    # None: of before there was one
    fingerprint: str | None = None
    template: str | None = None

    @property
    def key(self) -> Key:
        return self.task, self.length, self.depth, self.index, self.strategy


def samples_path(path: str) -> Path:
    """Where samples go: beside the result."""
    return Path(path).expanduser().with_suffix(".samples.jsonl")


def scored_before(config: EvaluationConfig, plan: Plan) -> list[Scored]:
    """What an earlier run left; UserError if it scored other samples, or another model."""
    path = config.output.path
    if path is None or not samples_path(path).exists():
        return []
    lines = [
        _scored(path, number, text)
        for number, text in enumerate(whole_lines(samples_path(path)), 1)
    ]
    if samples_path(path).stat().st_size:  # be it half a line
        check_begun_alike(config, path, _DECISIVE)
        _check_samples(config, plan, lines)
    return lines


def _scored(path: str, number: int, text: str) -> Scored:
    try:
        return Scored(**json.loads(text))
    except (ValueError, TypeError) as error:
        where = f"{samples_path(path)}:{number}"
        why = "is no sample of an evaluation; give another output.path"
        raise UserError("output.path", where, why) from error


def _check_samples(config: EvaluationConfig, plan: Plan, lines: Sequence[Scored]) -> None:
    """The first sample of each cell tells whether words and tokenizer are the same, too."""
    if any(line.template not in (None, plan.files.prompt.digest) for line in lines):
        why = "has samples with another chat template; give another output.path"
        raise UserError("output.path", config.output.path, why)
    digests = {line.key[:4]: line.digest for line in lines}
    texts: dict[tuple[str, int, float | None], set[str | None]] = {}
    for line in lines:
        texts.setdefault(line.key[:3], set()).add(line.text_sha256)
    for cell in plan.cells:
        key, first = (cell.task.name, cell.length, cell.depth), plan.sample(cell, 0)
        same_text = texts.get(key, set()) <= {first.text_sha256}
        if not same_text or digests.get((*key, 0)) not in (None, first.prompt.digest):
            why = (
                f"{samples_path(config.output.path or '').name} has other samples of"
                f" {cell.task.name}: made from other texts, words or tokens;"
                " give another output.path"
            )
            raise UserError("output.path", config.output.path, why)


def models_of(lines: Sequence[Scored]) -> list[tuple[str, str | None]]:
    """What models they were put to, each once: dtype and fingerprint."""
    return list(dict.fromkeys((line.dtype, line.fingerprint) for line in lines))


def check_model(
    path: str | None, before: Sequence[tuple[str, str | None]], runtime: LongContext
) -> None:
    """Raise UserError if any of these is another model than this one."""
    mine = str(runtime.dtype).removeprefix("torch."), runtime.fingerprint
    for theirs in before:
        for what, was, now in zip(("dtype", "fingerprint"), theirs, mine, strict=True):
            if was not in (None, now):
                why = f"has samples of a model of another {what}, {was[:16]}; here {now[:16]}"
                raise UserError("output.path", path, f"{why}; give another output.path")


class SampleLog:
    """Keeps scored samples, in a file if there is one; rank 0 has it."""

    def __init__(self, config: EvaluationConfig, before: list[Scored]):
        self.lines, self._file, self._config = [*before], None, config
        if config.output.path is not None:
            self._file = LineLog(samples_path(config.output.path), len(before))

    def begin(self) -> None:
        """Say beside the file how its samples are made, before the first is."""
        if self._config.output.path is not None:
            write_config(self._config, self._config.output.path)

    def close(self) -> None:
        """Other runs may add to the file."""
        if self._file is not None:
            self._file.close()

    def add(self, line: Scored) -> None:
        """One more, on the disk when this returns."""
        if self._file is not None:
            self._file.add(asdict(line))
        self.lines.append(line)
