"""The perplexity of a long text over ranks, by ring and by star, against one device.

    python -m benchmarks.perplexity [TOKENS]

SmolLM2-135M in float32 on Python's own documentation, 6,000 tokens unless given.  The reference is
plain Hugging Face in one process.  Writes `benchmarks/results/DATE-cpu-perplexity.json`, `.md` and
`.png`; takes a few minutes on two cores.
"""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from matplotlib import pyplot

from benchmarks.model import PRELOAD, rank_runtime
from launch.circumstances import circumstances
from ringstar.config import ModelConfig, RingConfig, StarConfig, StrategyConfig
from ringstar.models import ModelFiles, find_model, quiet_transformers
from ringstar.models.one_device import OneDevice
from ringstar.scores import Score
from seqpar import Transport
from seqpar.spawn import run_processes

TOKENS, WORLDS, PIECES = 6000, (2, 4), 24
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> None:
    quiet_transformers()
    tokens = int(arguments[0]) if arguments else TOKENS
    files = find_model(ModelConfig(name="smollm2"))
    ids = text_ids(files, tokens)
    plain = OneDevice(files, torch.float32, torch.device("cpu")).logprobs(ids)
    found = {
        f"{name}, {world} ranks": score
        for world in WORLDS
        for name, score in over_ranks(str(files.folder), world, ids).items()
    }
    where = circumstances(" ".join(["python", "-m", "benchmarks.perplexity", *arguments]))
    results = {"circumstances": where, "tokens": tokens} | figures(plain, found)
    print(table(results))
    path = RESULTS / f"{where['date']}-cpu-perplexity"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(document(results, path.name))
    path.with_suffix(".png").write_bytes(picture(results))
    print(f"written: {path}.json, .md and .png")


def text_ids(files: ModelFiles, tokens: int) -> list[int]:
    """The beginning of Python's documentation, topic by topic."""
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    ids = files.plain_ids(text[: 8 * tokens])[:tokens]
    assert len(ids) == tokens
    return ids


def settings(tokens: int) -> dict[str, StrategyConfig]:
    quarter, eighth = -(-tokens // 4), -(-tokens // 8)
    return {
        "ring": RingConfig(),
        "star, quarters": StarConfig(block_size=quarter),
        "star, eighths": StarConfig(block_size=eighth),
        "star, quarters, no anchor": StarConfig(block_size=quarter, anchor_size=0),
    }


def over_ranks(folder: str, world: int, ids: list[int]) -> dict[str, Score]:
    ranks = run_processes(world, scored, folder, ids, preload=PRELOAD, timeout_s=3600)
    return {name: Score(ids[1:], *map(torch.tensor, rows)) for name, rows in ranks[0].items()}


def scored(
    transport: Transport, folder: str, ids: list[int]
) -> dict[str, tuple[list[float], list[bool]]]:
    """One rank's part of all settings; every rank has all of every score."""
    runtime, found = rank_runtime(transport, folder, "float32"), {}
    for name, strategy in settings(len(ids)).items():
        (score,) = runtime.score_texts([ids], strategy=strategy)
        found[name] = (score.logprobs.tolist(), score.greedy.tolist())
    return found


def figures(plain: torch.Tensor, found: dict[str, Score]) -> dict[str, Any]:
    """Perplexities, and how far each is from one device's."""
    exact = math.exp(-float(plain.mean()))
    rows = {
        name: {
            "perplexity": score.perplexity,
            "relative difference": score.perplexity / exact - 1,
            "largest difference of a token, nats": float((score.logprobs - plain).abs().max()),
            "mean difference of a token, nats": float((score.logprobs - plain).abs().mean()),
        }
        for name, score in found.items()
    }
    alone = Score([0] * len(plain), plain.float(), plain > 0).perplexities(PIECES)
    curves = {
        name: [mine / theirs for (_, mine), (_, theirs) in zip(values, alone, strict=True)]
        for name, values in ((name, score.perplexities(PIECES)) for name, score in found.items())
    }
    pieces = [end for end, _ in alone]
    return {"one device": exact, "over ranks": rows, "pieces": pieces, "curves": curves}


def table(results: dict[str, Any]) -> str:
    lines = [
        "| | perplexity | against one device | a token, mean | a token, at most |",
        "|---|---|---|---|---|",
        f"| Hugging Face `sdpa`, one process | {results['one device']:.6f} | | | |",
    ]
    for name, row in results["over ranks"].items():
        value, relative, most, mean = row.values()
        lines.append(f"| {name} | {value:.6f} | {relative:+.1e} | {mean:.1e} | {most:.1e} |")
    return "\n".join(lines) + "\n"


def document(results: dict[str, Any], name: str) -> str:
    where = results["circumstances"]
    versions = ", ".join(f"{key} {version}" for key, version in where["versions"].items())
    return (
        f"# Perplexity of a long text over ranks, {where['date']}\n\n"
        f"`{where['command']}` at {where['commit']} on {where['hardware']}; {versions}.\n\n"
        f"SmolLM2-135M-Instruct, float32, the first {results['tokens']:,} tokens of Python's own"
        f" documentation, {results['tokens'] - 1:,} of them scored; gloo processes. Differences of"
        " a token's log-probability are in nats. Anchors are as long as a block unless it says"
        " none; star's figures are of its first phase, in which a token sees its block and the"
        f" anchor.\n\n{table(results)}\n![perplexity by position]({name}.png)\n"
    )


def picture(results: dict[str, Any]) -> bytes:
    """Each setting's perplexity, piece by piece, as a share of one device's."""
    figure, axis = pyplot.subplots(figsize=(8, 4.4), layout="constrained")
    last = f", {WORLDS[-1]} ranks"
    for name, shares in results["curves"].items():
        if name.endswith(last):
            edges, label = (0, *results["pieces"]), name.removesuffix(last)
            axis.stairs(shares, edges, label=label, linewidth=1.5, baseline=None)
    axis.set_xlabel("position in the text, tokens")
    axis.set_ylabel("perplexity, one device = 1")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(sys.argv[1:])
