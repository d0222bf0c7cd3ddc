"""Needles found in long documents: exact attention, Star Attention, and its ablations.

    python -m benchmarks.needles                  # every cell; goes on where it was left
    python -m benchmarks.needles 2048/1 4096/4    # tokens/keys
    python -m benchmarks.needles "7168/1/exact"   # of one method
    python -m benchmarks.needles report           # tables and picture from what is there

The same documents are given to every method.  Each trial is a line of
`benchmarks/results/needles.jsonl` as soon as it is done.  All cells take some three hours of one
core; several processes may work at different cells at once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.needle_text import Needle, fitted_text, make_needles
from ringstar import CacheConfig, LongContext
from ringstar.config import DenseConfig, ModelConfig, StarConfig, StrategyConfig
from ringstar.models import ModelFiles, find_model, quiet_transformers

TRIALS = Path(__file__).parent / "results" / "needles.jsonl"
DEPTHS = tuple((2 * i + 1) / 20 for i in range(10))
TRIALS_PER_CELL = 40
BLOCKS = 4
NEW_TOKENS = 12  # a space, seven digits, and some that are not the number
MAIN = {"exact": None, "first block": {}, "no anchor": {"anchor_size": 0}}
ABLATIONS = {
    "first block, random positions": {"anchor_positions": "random"},
    "first block, previous block's positions": {"anchor_positions": "previous"},
    "constant token": {"anchor_content": "constant"},
    "random tokens": {"anchor_content": "random"},
    "shuffled first block": {"anchor_content": "shuffled"},
    "previous block": {"anchor_content": "previous"},
}
CELLS: dict[tuple[int, int], dict[str, dict[str, Any] | None]] = {
    (4096, 1): MAIN,
    (4096, 4): MAIN,
    (2048, 1): MAIN | ABLATIONS,
    (7168, 1): MAIN,
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One question about one document, put to one method."""

    method: str
    tokens: int
    keys: int
    document: int
    depth: float
    value: str
    answer: str
    found: bool
    encode_s: float


def strategy_of(changes: dict[str, Any] | None, tokens: int) -> StrategyConfig:
    """Star with `BLOCKS` blocks and these changes; None is exact."""
    if changes is None:
        return DenseConfig()
    return StarConfig(block_size=-(-tokens // BLOCKS), **changes)


def documents(tokens: int, keys: int, files: ModelFiles) -> Iterator[tuple[int, Any, list[int]]]:
    """(number, needles, token ids) of each document of a cell: all depths equally often."""
    template = len(files.context_ids(""))
    for number in range(TRIALS_PER_CELL // keys):
        depths = [DEPTHS[(number + key * len(DEPTHS) // keys) % len(DEPTHS)] for key in range(keys)]
        needles = make_needles(f"{tokens} {keys} {number}", depths)
        room = tokens - template
        text = fitted_text(needles, room, lambda t: len(files.context_ids(t)) - template)
        yield number, needles, files.context_ids(text)


def run_cell(
    cell: tuple[int, int], methods: dict[str, Any], runtime: LongContext, bar: Any
) -> None:
    """Every trial of a cell that is not on file yet."""
    tokens, keys = cell
    done = {(t.method, t.document) for t in read_trials() if (t.tokens, t.keys) == cell}
    for number, needles, ids in documents(tokens, keys, runtime.files):
        for method, changes in methods.items():
            if (method, number) not in done:
                document = runtime.encode(ids, strategy=strategy_of(changes, len(ids)))
                trials = [
                    one_trial(runtime, document, needle, method, cell, number) for needle in needles
                ]
                with TRIALS.open("a") as file:  # whole documents, so that none is half there
                    file.write("".join(json.dumps(asdict(trial)) + "\n" for trial in trials))
            bar.update()


def one_trial(
    runtime: LongContext,
    document: Any,
    needle: Needle,
    method: str,
    cell: tuple[int, int],
    number: int,
) -> Trial:
    """Ask for one needle; the answer is made to begin as the sentence did."""
    files = runtime.files
    query = files.query_ids(needle.question)
    query += files.tokenizer(needle.answer_prefix, add_special_tokens=False)["input_ids"]
    answer = runtime.ask(document, query, max_new_tokens=NEW_TOKENS)
    found = needle.value in answer.text
    text = answer.text.strip()
    times = round(document.encode_s, 3)
    return Trial(method, *cell, number, needle.depth, needle.value, text, found, times)


def select(argument: str) -> tuple[tuple[int, int], dict[str, Any]]:
    """A cell and its methods from `tokens/keys` or `tokens/keys/method`."""
    tokens, keys, *method = argument.split("/")
    cell = int(tokens), int(keys)
    return cell, {name: CELLS[cell][name] for name in method or CELLS[cell]}


def read_trials() -> list[Trial]:
    """What is on file."""
    if not TRIALS.exists():
        return []
    return [Trial(**json.loads(line)) for line in TRIALS.read_text().splitlines()]


def main(arguments: list[str]) -> None:
    if arguments == ["report"]:
        from benchmarks.needle_report import write_report

        write_report(read_trials(), TRIALS.parent)
        return
    chosen = [select(a) for a in arguments] or list(CELLS.items())
    quiet_transformers()
    torch.set_num_threads(1)
    folder = str(find_model(ModelConfig(name="smollm2")).folder)
    runtime = LongContext.from_pretrained(
        folder,
        strategy="dense",
        dtype="bfloat16",
        threads_per_rank=1,
        cache=CacheConfig(reuse=False),
    )
    total = sum(len(methods) * TRIALS_PER_CELL // cell[1] for cell, methods in chosen)
    started = time.perf_counter()
    with tqdm(total=total, desc="documents", unit="document") as bar:
        for cell, methods in chosen:
            run_cell(cell, methods, runtime, bar)
    print(f"done in {time.perf_counter() - started:.0f} s: {TRIALS}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(sys.argv[1:])
