"""What an answer costs with SmolLM2 on this machine, beside what else could be used.

    python -m benchmarks.peers            # about 40 minutes on two cores; leave them alone
    python -m benchmarks.peers report     # the page again, from what was measured

It runs `launch.bench` twice, one prompt at a time and four together, and writes
`benchmarks/results/DATE-cpu-peers.json`, `-peers-batch.json`, a picture of each, and one page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from os.path import relpath
from pathlib import Path
from typing import Any

from launch.bench.__main__ import main as bench
from launch.bench.cells import Key
from launch.bench.result import REFERENCES, Row, by_key
from launch.circumstances import circumstances

RESULTS = Path(__file__).parent / "results"
GRIDS = {
    "peers": ("bench.lengths=1K,2K,4K", "bench.batches=1"),
    "peers-batch": ("bench.lengths=1K", "bench.batches=4"),
}
ALWAYS = ("model=smollm2", "bench.worlds=1,2", "bench.peers=all")
# what others do on the machine falls on everyone
ROUNDS = ("bench.rounds=3", "bench.requests=1")
QUANTITIES = {"ttft": "TTFT", "tpot": "TPOT"}
_UNKNOWN = "why was not found out"
_CLOSE = "up to a tenth is within what repeats differ by"
_ONE_BY_ONE = "it attends to several prompts in one call, and ours to one after another"
# why a peer is faster than the best of ours, where it is
WHY = {
    ("llama.cpp", "TPOT"): "it reads weights of 4 bits and KV of 16, where ours are float32: a step"
    " is as fast as memory gives them",
    ("hf-eager", "TPOT"): _CLOSE,
    ("hf-sdpa", "TPOT"): _CLOSE,
    ("hf-sdpa", "TTFT"): _CLOSE,
    ("hf-batch", "TTFT"): _CLOSE,
}
WHY_SEVERAL = {**WHY, ("hf-eager", "TPOT"): _ONE_BY_ONE, ("hf-sdpa", "TPOT"): _ONE_BY_ONE}


def main(arguments: list[str]) -> int:
    """Measure, unless only the report is asked for; returns the exit status."""
    date = circumstances("")["date"]
    for name, grid in GRIDS.items() if arguments != ["report"] else ():
        status = bench(
            [*ALWAYS, *ROUNDS, *grid, f"output.path={relpath(RESULTS)}/{date}-cpu-{name}.json"]
        )
        if status:
            return status
    newest = sorted(RESULTS.glob("*-cpu-peers.json"))[-1].name.removesuffix("-peers.json")
    page = RESULTS / f"{newest}-peers.md"
    page.write_text(document(newest))
    print(f"written: {page}")
    return 0


def document(stem: str) -> str:
    """Both runs as Markdown."""
    results = {name: json.loads((RESULTS / f"{stem}-{name}.json").read_text()) for name in GRIDS}
    where = results["peers"]["circumstances"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    parts = [
        f"# What an answer costs, and elsewhere, {where['date']}",
        f"`python -m benchmarks.peers` at {where['commit']} on {where['hardware']}; {versions}."
        f" {results['peers']['model']}, {results['peers']['dtype']}; everyone has all cores while"
        f" it is measured. Medians of {results['peers']['rounds']} rounds, as multiples of"
        " `hf-sdpa`'s in the same run; lower is better."
        " Same tokens: of the answer, before the first that differs from `hf-sdpa`'s. How it is"
        " measured: [docs/bench.md](../../docs/bench.md).",
    ]
    for name, result in results.items():
        parts += [f"![times]({stem}-{name}.png)"]
        for batch in sorted({row["batch"] for row in result["cells"]}):
            parts += [f"## Batch {batch}", table(result, batch)]
        if result["attention"]:
            parts += [f"## Attention alone, beside batch {batch}", attention(result)]
        parts += ["\n".join(f"- {line}" for line in faster(result))]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(result: dict[str, Any], batch: int) -> str:
    """A row for each contender, a pair of columns for each length."""
    known = by_key(result)
    lengths = sorted({row["length"] for row in result["cells"] if row["batch"] == batch})
    who = list(dict.fromkeys((row["contender"], row["world"]) for row in result["cells"]))
    head = ["", "ranks"]
    for length in lengths:
        head += [f"TTFT, {length:,}", f"TPOT, {length:,}", "same tokens", "MiB"]
    lines = [head, ["---"] * len(head)]
    for name, world in who:
        line = [f"`{name}`", str(world)]
        for length in lengths:
            row, unit = (known.get((*k, length, batch)) for k in ((name, world), ("hf-sdpa", 1)))
            line += list(_figures(row, unit)) if row and unit else ["not measured", "", "", ""]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures(row: Row, unit: Row) -> Iterator[str]:
    for quantity in QUANTITIES:
        name = f"median_{quantity}_ms"
        yield f"{row[name] / unit[name]:.2f}"
    yield f"{row['same_tokens']:.0%}"
    yield f"{sum(row['peak_memory_bytes']) / 2**20:,.0f}"


def attention(result: dict[str, Any]) -> str:
    """As multiples of one process's time at each length."""
    rows = [row for row in result["attention"] if row["why_not"] is None]
    unit = {row["length"]: row["median_ms"] for row in rows if row["world"] == 1}
    lines = [["", "ranks", "tokens", "times one process"], ["---"] * 4]
    for row in rows:
        times = f"{row['median_ms'] / unit[row['length']]:.2f}"
        lines.append([f"`{row['contender']}`", str(row["world"]), f"{row['length']:,}", times])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def faster(result: dict[str, Any]) -> Iterator[str]:
    """Each peer that beats the best of ours that is exact, where, and why."""
    known = by_key(result)
    for who in result["contenders"]:
        for quantity, shown in QUANTITIES.items():
            found = dict(_faster(known, who, f"median_{quantity}_ms"))
            if not found or who not in REFERENCES:
                continue
            where = ", ".join(
                f"{times:.2f} at {length:,} tokens" for length, times in found.items()
            )
            reasons = WHY_SEVERAL if any(row["batch"] > 1 for row in result["cells"]) else WHY
            why = reasons.get((who, shown), _UNKNOWN)
            if why == _CLOSE and min(found.values()) < 0.9:
                why = _UNKNOWN
            than = f"a shorter {shown}** than the best exact one of ours"
            yield f"**`{who}` has {than}: {where}; {why}."


def _faster(known: Mapping[Key, Row], who: str, name: str) -> Iterator[tuple[int, float]]:
    """Lengths, and the share of our time that it takes there."""
    for (contender, _, length, batch), row in known.items():
        ours = [
            other[name]
            for key, other in known.items()
            if key[0] == "ring" and key[2:] == (length, batch)
        ]
        if contender == who and ours and round(row[name] / min(ours), 2) < 1:
            yield length, row[name] / min(ours)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
