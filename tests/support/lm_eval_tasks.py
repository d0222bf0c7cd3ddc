"""lm-eval's own tasks on local data: its files, with another place for the data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

_OWN = Path(lm_eval.__file__).parent / "tasks"


def task_manager(folders: Sequence[Path], own: Sequence[str], metadata: Any) -> TaskManager:
    """Of tasks in `folders` and in some of lm-eval's own: it has 14,000 files to look through."""
    paths = [str(folder) for folder in (*folders, *(_OWN / name for name in own))]
    return TaskManager(include_path=paths, include_defaults=False, metadata=metadata)


def local_task(folder: Path, own: str, rows: Sequence[dict[str, Any]]) -> str:
    """The task of lm-eval's file `own`, with `rows` for every split of its data; its new name."""
    name = f"local_{Path(own).stem}"
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = "\n".join(f"    {split}: {data}" for split in ("train", "validation", "test"))
    (folder / f"{name}.yaml").write_text(
        f"include: {_OWN / own}\n"
        f"task: {name}\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs:\n  data_files:\n{splits}\n"
    )
    return name


def choices(count: int) -> list[dict[str, Any]]:
    """Questions of the form of arc_easy."""
    questions = [
        ("What do plants need to make food?", ["light", "iron", "coal", "salt"], "A"),
        ("Which planet is closest to the sun?", ["Mars", "Mercury", "Venus", "Saturn"], "B"),
        ("What does a thermometer measure?", ["mass", "length", "temperature", "time"], "C"),
        ("Water that is cooled below zero becomes", ["steam", "oil", "sand", "ice"], "D"),
    ]
    return [
        {"question": q, "choices": {"text": texts, "label": list("ABCD")}, "answerKey": key}
        for q, texts, key in (questions * count)[:count]
    ]


def evaluated(model: Any, tasks: list[str], manager: TaskManager, limit: int, **more: Any) -> Any:
    return lm_eval.simple_evaluate(
        model=model, tasks=tasks, limit=limit, task_manager=manager, bootstrap_iters=0, **more
    )


def responses(results: Any) -> dict[str, list[Any]]:
    """Of each task, what the model gave for each sample, before any filter."""
    return {
        name: [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        for name, samples in results["samples"].items()
    }
