"""What keeping KV does to answers in bfloat16: on disk, aside, shared; and in 8 bits.

    python -m benchmarks.kept [flips] [needles]

Prints tables and writes `benchmarks/results/DATE-kept.json` and `.md`.  *Flips*: the next token
after each of many positions, of documents that were encoded at once and of the same ones that were
loaded, put aside, and so on: in bfloat16 another order of sums may change the first of two that are
as good as equal.  *Needles*: 40 questions of `benchmarks.needles` at 2,048 tokens, with KV in 8
bits, beside the answers with KV as the model computes it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.needles import documents, one_trial, read_trials
from launch.circumstances import circumstances
from ringstar import CacheConfig, LongContext
from ringstar.config import ModelConfig
from ringstar.document import Document
from ringstar.models import find_model, quiet_transformers

RESULTS = Path(__file__).parent / "results"
TOKENS, READ, DOCUMENTS, CUT = 1200, 100, 3, 800
NEAR = 0.5  # logits between two tokens that may change places
KINDS = ("int8",)
CELL = (2048, 1)
EXACT = ("exact", *CELL)


def runtime(folder: str, world: int, layout: str = "zigzag", **cache: Any) -> LongContext:
    """Simulated ranks in bfloat16."""
    return LongContext.from_pretrained(
        folder,
        dtype="bfloat16",
        transport="threads",
        world_size=world,
        layout=layout,
        chunk_tokens=256,
        threads_per_rank=1,
        cache=CacheConfig(**cache),
    )


# --- flips


def flips(folder: str) -> dict[str, Any]:
    """For each way to come by a document: positions, flips, and the widest margin of one."""
    ids = texts(folder)
    fresh = runtime(folder, 2, reuse=False)
    want = [logits(fresh, fresh.encode(head), tail) for head, tail in ids]
    rows = {}
    for name, way in WAYS.items():
        got = [logits(*pair, tail) for pair, (_, tail) in zip(way(folder, ids), ids, strict=True)]
        rows[name] = compared(torch.cat(got), torch.cat(want))
    return {
        "what": f"SmolLM2-135M, bfloat16: the next token after each of {READ} tokens behind"
        f" {DOCUMENTS} documents of {TOKENS}; the same documents, encoded by 2 ranks in one go",
        "rows": rows,
    }


def texts(folder: str) -> list[tuple[list[int], list[int]]]:
    """Documents, and what comes after each: pieces of Python's own documentation."""
    files = find_model(ModelConfig(path=folder))
    ids = files.plain_ids("\n\n".join(topics[name] for name in sorted(topics))[:60_000])
    starts = [number * (len(ids) - TOKENS - READ) // DOCUMENTS for number in range(DOCUMENTS)]
    return [(ids[s : s + TOKENS], ids[s + TOKENS : s + TOKENS + READ]) for s in starts]


def logits(ring: LongContext, document: Document, tail: list[int]) -> Tensor:
    return ring.logits(document, tail, last=len(tail))


def compared(got_TV: Tensor, want_TV: Tensor) -> dict[str, float]:
    """How often another token comes first, and by how much the first was ahead of it at most."""
    ours_T, theirs_T = got_TV.argmax(1), want_TV.argmax(1)
    flipped_T = ours_T != theirs_T
    ahead_T = (want_TV.gather(1, theirs_T[:, None]) - want_TV.gather(1, ours_T[:, None])).squeeze(1)
    return {
        "positions": len(ours_T),
        "flips": int(flipped_T.sum()),
        "largest margin": float(ahead_T.max()),
        "largest difference": float((got_TV - want_TV).abs().max()),
    }


Texts = list[tuple[list[int], list[int]]]
Pairs = Iterator[tuple[LongContext, Document]]


def loaded(world: int, layout: str) -> Callable[[str, Texts], Pairs]:
    """Saved by two ranks."""

    def pairs(folder: str, ids: Texts) -> Pairs:
        saver, loader = runtime(folder, 2), runtime(folder, world, layout)
        with tempfile.TemporaryDirectory() as place:
            for head, _ in ids:
                saver.save(saver.encode(head), f"{place}/document")
                yield loader, loader.load(f"{place}/document")

    return pairs


def aside(folder: str, ids: Texts) -> Pairs:
    """Put on disk by the next document, and back."""
    most = (TOKENS + 600) // 2 * 2 * 30 * 3 * 64 * 2
    ring = runtime(folder, 2, max_bytes=most, offload="disk")
    made = [ring.encode(head) for head, _ in ids]
    assert not made[0].shards[0].is_here
    yield from ((ring, document) for document in made)


def begun(folder: str, ids: Texts) -> Pairs:
    """Each goes on where another, which is encoded first, has something else."""
    ring = runtime(folder, 2)
    for head, _ in ids:
        ring.encode([*head[:CUT], *head[:200]])
        document = ring.encode(head)
        assert document.cached_tokens >= CUT
        yield ring, document


def appended(folder: str, ids: Texts) -> Pairs:
    ring = runtime(folder, 2, reuse=False)
    for head, _ in ids:
        yield ring, ring.append(ring.encode(head[:CUT]), head[CUT:])


def resumed(folder: str, ids: Texts) -> Pairs:
    """Encoded with checkpoints by two ranks, stopped, and taken up by three."""
    two, three = runtime(folder, 2), runtime(folder, 3)
    for head, _ in ids:
        with tempfile.TemporaryDirectory() as place:
            two.save(two.encode(head[:512]), f"{place}/kept.unfinished")
            yield three, three.encode_kept(head, f"{place}/kept", 1)


WAYS: dict[str, Callable[[str, Texts], Pairs]] = {
    "saved and loaded": loaded(2, "zigzag"),
    "loaded by 3 ranks, striped": loaded(3, "striped"),
    "put on disk and back": aside,
    "a shared beginning": begun,
    "appended to": appended,
    "resumed by 3 ranks": resumed,
}


# --- needles


def needles(folder: str) -> dict[str, Any]:
    """Found, and answers that are those of KV that is not rounded, for each form of KV."""
    before = {t.document: t for t in read_trials() if (t.method, t.tokens, t.keys) == EXACT}
    rings = {kind: runtime(folder, 1, dtype=kind, reuse=False) for kind in ("auto", *KINDS)}
    work = list(documents(*CELL, rings["auto"].files))
    rows = {"auto": row([(t.found, t.answer) for t in before.values()], before)}
    whole = rings["auto"].encode(work[0][2]).metrics.kv_bytes[0]
    for kind in KINDS:
        answers = []
        for number, (needle,), ids in tqdm(work, kind):
            document = rings[kind].encode(ids)
            trial = one_trial(rings[kind], document, needle, kind, CELL, number)
            answers.append((trial.found, trial.answer))
        keys, values = document.kv_error or (0.0, 0.0)
        rows[kind] = row(answers, before) | {
            "kv_bytes / bfloat16's": document.metrics.kv_bytes[0] / whole,
            "error of keys": keys,
            "error of values": values,
        }
    return {
        "what": f"SmolLM2-135M, bfloat16, documents of {CELL[0]} tokens: KV as computed (auto, from"
        " needles.jsonl) and in 8 bits; errors are root mean squares over those of the numbers",
        "rows": rows,
    }


def row(answers: list[tuple[bool, str]], before: dict[int, Any]) -> dict[str, float]:
    """Beside the answers `before`, to the same questions."""
    pairs = zip(answers, (before[number] for number in sorted(before)), strict=True)
    return {
        "trials": len(answers),
        "found": sum(found for found, _ in answers),
        "same answer": sum(answer == trial.answer for (_, answer), trial in pairs),
        "kv_bytes / bfloat16's": 1.0,
        "error of keys": 0.0,
        "error of values": 0.0,
    }


def table(part: dict[str, Any]) -> str:
    """As Markdown."""
    rows = part["rows"]
    names = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, row in rows.items():
        shown = [str(row[each]) if type(row[each]) is int else f"{row[each]:.3g}" for each in names]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return f"{part['what']}.\n\n" + "\n".join(lines) + "\n"


PARTS = {"flips": flips, "needles": needles}


def main(names: list[str]) -> None:
    quiet_transformers()
    torch.set_grad_enabled(False)
    folder = str(find_model(ModelConfig(name="smollm2")).folder)
    command = " ".join(["python", "-m", "benchmarks.kept", *names])
    where = circumstances(command)
    results = {name: PARTS[name](folder) for name in names or list(PARTS)}
    path = RESULTS / "-".join([where["date"], "kept", *names])
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    head = (
        f"# Kept KV, {where['date']}\n\n`{command}` at {where['commit']} on {where['hardware']};"
        f" {versions}.\n\n"
    )
    text = head + "\n".join(f"## {name}\n\n{table(part)}" for name, part in results.items())
    path.with_suffix(".json").write_text(
        json.dumps({"circumstances": where, **results}, indent=1) + "\n"
    )
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
