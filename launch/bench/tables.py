"""A benchmark for people: a block for each cell as it is done, and tables of all at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.bench.against import Change
from launch.bench.result import Row, by_key, reference_of

_WIDTH = 140  # where standard output is no terminal
_BLOCK = 66
_RULES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
}


def block(row: Row) -> str:
    """One cell, as `vllm bench serve` prints a run."""
    ranks = f"{row['world']} rank" + "s" * (row["world"] > 1)
    title = f" {row['contender']}, {ranks}, {row['length']:,} tokens, batch {row['batch']} "
    lines = [f"{title:=^{_BLOCK}}"]
    if row["why_not"] is not None:
        return "\n".join([*lines, f"not measured: {row['why_not']}", "=" * _BLOCK, ""])
    lines += [
        _line("Successful requests:", row["completed"]),
        _line("Benchmark duration (s):", row["duration"]),
        _line("Total input tokens:", row["total_input_tokens"]),
        _line("Total generated tokens:", row["total_output_tokens"]),
        _line("Request throughput (req/s):", row["request_throughput"]),
        _line("Output token throughput (tok/s):", row["output_throughput"]),
        _line("Total token throughput (tok/s):", row["total_token_throughput"]),
    ]
    for name, (short, long) in _RULES.items():
        lines.append(f"{long:-^{_BLOCK}}")
        lines += [
            _line(f"{kind} {short} (ms):", row[f"{key}_{name}_ms"])
            for kind, key in (("Mean", "mean"), ("Median", "median"), ("P99", "p99"))
        ]
    return "\n".join([*lines, "=" * _BLOCK, ""])


def _line(name: str, value: float) -> str:
    return f"{name:42}{value:<24,}" if isinstance(value, int) else f"{name:42}{value:<24.2f}"


def tables(result: dict[str, Any]) -> str:
    """Everything side by side, as wide as standard output."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    with console.capture() as capture:
        for batch in sorted({row["batch"] for row in result["cells"]}):
            for length in sorted({row["length"] for row in result["cells"]}):
                rows = [r for r in result["cells"] if (r["length"], r["batch"]) == (length, batch)]
                console.print(_table(result, rows, f"{length:,} tokens, batch {batch}"))
        if result["attention"]:
            console.print(_attention(result["attention"]))
        console.print(Text("\n".join(_said(result))))
    return capture.get()


def _table(result: dict[str, Any], rows: Sequence[Row], title: str) -> Table:
    known = by_key(result)
    key = (rows[0]["contender"], rows[0]["world"], rows[0]["length"], rows[0]["batch"])
    found = reference_of(key, known)
    beside = None if found is None else known[found]
    table = Table(title=f"{title}; medians", title_justify="left")
    table.add_column("", no_wrap=True)
    names = ["ranks", "TTFT ms", "of peer's", "of floor", "TPOT ms", "of peer's", "of floor"]
    for name in [*names, "tokens/s", "MiB", "same tokens"]:
        table.add_column(name, justify="right")
    for row in rows:
        if row["why_not"] is not None:
            table.add_row(Text(row["contender"]), str(row["world"]), Text("not measured"))
            continue
        mark = " *" if row is beside else ""
        table.add_row(
            Text(row["contender"] + mark),
            str(row["world"]),
            *_time(row, beside, "ttft"),
            *_time(row, beside, "tpot"),
            f"{row['total_token_throughput']:,.0f}",
            f"{sum(row['peak_memory_bytes']) / 2**20:,.0f}" if row["peak_memory_bytes"] else "",
            "" if row["same_tokens"] is None else f"{row['same_tokens']:.0%}",
        )
    return table


def _time(row: Row, beside: Row | None, name: str) -> Iterator[str]:
    """Milliseconds; as a multiple of the peer's, and of the floor."""
    median = f"median_{name}_ms"
    yield f"{row[median]:,.1f}"
    yield "" if beside is None else f"{row[median] / beside[median]:.2f}"
    # a floor is of all prompts of a batch, which some read one after another
    whole = row["median_prompts_ms" if name == "ttft" else median]
    floor = row.get(f"floor_{name}_ms")
    yield "" if not floor else f"{whole / floor:.1f}"


def _attention(rows: Sequence[Row]) -> Table:
    table = Table(
        title="attention alone, causal; medians of the slowest rank", title_justify="left"
    )
    table.add_column("", no_wrap=True)
    for name in ("ranks", "tokens", "ms"):
        table.add_column(name, justify="right")
    for row in rows:
        time = f"{row['median_ms']:,.1f}" if row["why_not"] is None else row["why_not"]
        table.add_row(row["contender"], str(row["world"]), f"{row['length']:,}", Text(time))
    return table


def _said(result: dict[str, Any]) -> Iterator[str]:
    """What the figures are, and what was not measured."""
    yield (
        "of peer's: as a multiple of the row with *. of floor: as a multiple of the least time that"
        " the model's products or bytes take at the machine's measured ceilings. MiB: of all ranks,"
        " model included. same tokens: of the answer, until the first that differs from the peer's."
    )
    yield from (f"{name}: {what}" for name, what in result["contenders"].items())
    for row in result["cells"]:
        if row["why_not"] is not None:
            where = f"{row['contender']}, {row['length']:,} tokens, batch {row['batch']}"
            yield f"not measured: {where}: {row['why_not']}"


def comparison(found: Sequence[Change], how: str, tolerance: float, path: str) -> str:
    """What changed since an earlier result."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    table = Table(title=Text(f"against {path}: {how}"), title_justify="left")
    for name in ("", "ranks", "tokens", "batch", "", "times as long"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for change in found:
        slow = " slower" if change.times > 1 + tolerance else ""
        table.add_row(
            Text(change.contender),
            *(f"{number:,}" for number in (change.world, change.length, change.batch)),
            change.what,
            f"{change.times:.2f}{slow}",
        )
    with console.capture() as capture:
        console.print(table)
    return capture.get()
