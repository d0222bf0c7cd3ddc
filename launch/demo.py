"""A real model answers questions about 6,000 tokens whose KV is spread over four ranks.

    python -m launch.demo                       # ranks: every GPU where there are several, else 4
    python -m launch.demo launch.nproc=2 strategy.layout=striped
    python -m launch.demo strategy=star strategy.block_size=1K
    python -m launch.demo model.path=DIR        # your own model

The document is encoded twice: by Ring Attention, which is exact, and by Star Attention, which is
not, and cheaper. The same questions are put to plain Hugging Face on one device. The exit status
is 0 only if every answer of the ring is the same there, and right.
"""

from __future__ import annotations

from launch.interrupts import quiet_interrupts

if __name__ == "__main__":  # the imports below take seconds
    quiet_interrupts()

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file

from launch.demo_text import FACTS, demo_document
from launch.faults import DONE, FAULT, Reporter, exit_status
from launch.options import parse
from launch.progress import encode_bar
from launch.ranks import join_launcher, start_ranks
from launch.start import begin_rank, check_launch, run_program
from ringstar.checks import check_positions
from ringstar.config import Config, RingConfig, StarConfig, StrategyConfig
from ringstar.errors import UserError
from ringstar.models import ModelFiles, choose_dtype, find_model, quiet_transformers
from ringstar.models.one_device import OneDevice, PlainAnswer
from ringstar.ranks import make_ranks, under_torchrun
from ringstar.runtime import LongContext

TOKENS = 6000
DEFAULTS = ("model=smollm2", "model.dtype=float32", "generation.max_new_tokens=24")
MIB = 1024**2
_OWN = ("document", "question", "question_path", "output")


def main(arguments: Sequence[str]) -> int:
    """The parent prepares, starts the ranks, compares and tells; a rank only answers."""
    if {"-h", "--help"} & set(arguments):
        print((__doc__ or "").strip())
        return DONE
    reporter = Reporter(int(os.environ.get("RANK", "0")))
    return exit_status(lambda: _run(arguments, reporter), reporter)


def _run(arguments: Sequence[str], reporter: Reporter) -> int:
    quiet_transformers()
    if under_torchrun():
        config = parse(arguments)
        reporter.show_traceback = config.launch.traceback
        reporter.store = join_launcher(config.launch.report or "")
        _answer_as_rank(config, reporter.store)
        return DONE
    _check_options(arguments)
    gpus = torch.cuda.device_count()
    options = _with_defaults(arguments, [f"launch.nproc={gpus if gpus > 1 else 4}", *DEFAULTS])
    config = parse(options)
    reporter.show_traceback = config.launch.traceback
    check_launch(config)
    _say(f"model: {config.model.path or config.model.name} (the first time it is converted once)")
    files = find_model(config.model, config.rope)
    if isinstance(config.strategy, StarConfig):
        check_positions(config.strategy, files, TOKENS)
    elif why := _why_no_star(files):
        _say(f"star is left out: {why}")
    with tempfile.TemporaryDirectory(prefix="ringstar-demo-") as folder:
        request = _write_request(files, Path(folder))
        given = [
            f"model.path={files.folder / files.gguf if files.gguf else files.folder}",
            f"document.ids_path={folder}/request.json",
            f"output.path={folder}/answers.json",
        ]
        own = _with_defaults(given, options)
        status = start_ranks("launch.demo", own, config.launch.nproc or 1)
        if status != DONE:
            return status
        answers = json.loads((Path(folder) / "answers.json").read_text())
        logits = load_file(Path(folder) / "logits.safetensors")
    plain = _plain_answers(config, files, request)
    return _compare(files, answers, logits, plain)


def _check_options(arguments: Sequence[str]) -> None:
    """Raise UserError for what the demo has itself."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        section = key.partition(".")[0]
        if (key, value) == ("transport", "threads"):
            raise UserError(key, value, "the demo's ranks are processes; drop it")
        if section in _OWN or (section == "generation" and key != "generation.max_new_tokens"):
            why = "the demo has its own; python -m launch.generate takes yours"
            raise UserError(key, value, why)


def _with_defaults(arguments: Sequence[str], defaults: Sequence[str]) -> list[str]:
    """`arguments`, and those of the defaults that they do not set."""
    given = {argument.partition("=")[0] for argument in arguments}
    return [*(d for d in defaults if d.partition("=")[0] not in given), *arguments]


def _write_request(files: ModelFiles, folder: Path) -> dict[str, Any]:
    template = len(files.context_ids(""))
    document = demo_document(lambda text: len(files.context_ids(text)) - template, TOKENS - 100)
    request: dict[str, Any] = {
        "context_ids": files.context_ids(document),
        "queries": [files.query_ids(fact.question) for fact in FACTS],
    }
    (folder / "request.json").write_text(json.dumps(request))
    _say(
        f"document: {len(request['context_ids']):,} tokens of Python's documentation with"
        f" {len(FACTS)} facts planted in it"
    )
    return request


def _answer_as_rank(config: Config, phases: Any) -> None:
    begin_rank(config)
    request = json.loads(Path(config.document.ids_path or "").read_text())
    files = find_model(config.model, config.rope)
    runtime = LongContext(config, files, *make_ranks(config.transport, phases))
    runs: dict[str, Any] = {}
    logits: dict[str, torch.Tensor] = {}
    for strategy in _strategies(config.strategy, files):
        runs[strategy.name], given = _one_run(runtime, request, strategy)
        logits |= {f"{strategy.name} {number}": row for number, row in enumerate(given)}
    if runtime.rank == 0:
        output = Path(config.output.path or "")
        how = f"{runtime.world_size} ranks over {runtime.transport} on {runtime.device.type}"
        output.write_text(json.dumps({"how": how, "runs": runs}))
        save_file(logits, output.with_name("logits.safetensors"))
    runtime.close()


def _strategies(chosen: StrategyConfig, files: ModelFiles) -> list[StrategyConfig]:
    """An exact one, and star if it can be; the one that was chosen has its settings."""
    if isinstance(chosen, StarConfig):
        return [RingConfig(), chosen]
    return [chosen] if _why_no_star(files) else [chosen, StarConfig()]


def _why_no_star(files: ModelFiles) -> str | None:
    try:
        check_positions(StarConfig(), files, TOKENS)
    except UserError as error:
        return error.allowed.partition(";")[0]
    return None


def _one_run(
    runtime: LongContext, request: dict[str, Any], strategy: StrategyConfig
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """One encode and its answers, with the first token's logits for each."""
    with encode_bar(len(request["context_ids"]), shown=runtime.rank == 0) as on_progress:
        document = runtime.encode(request["context_ids"], on_progress, strategy=strategy)
    answers = [runtime.ask(document, query) for query in request["queries"]]
    run = {
        "encode_s": document.encode_s,
        "encode_bytes_sent": max(document.metrics.bytes_sent),
        "kv_bytes": max(document.metrics.kv_bytes),
        "ttft_s": statistics.median(answer.ttft_s for answer in answers),
        "tpot_s": statistics.median(answer.tpot_s for answer in answers),
        "answers": [{"text": answer.text, "ids": answer.ids} for answer in answers],
    }
    return run, [answer.first_logits.contiguous() for answer in answers]


@dataclass(frozen=True, slots=True)
class _Plain:
    encode_s: float
    answers: list[PlainAnswer]


def _plain_answers(config: Config, files: ModelFiles, request: dict[str, Any]) -> _Plain:
    _say("now the same on one device with plain Hugging Face, to compare")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, _ = choose_dtype(config.model, files.config, device)
    one = OneDevice(files, dtype, device)
    encode_s = one.encode(request["context_ids"])
    limit = config.generation.max_new_tokens
    return _Plain(encode_s, [one.ask(query, limit) for query in request["queries"]])


def _compare(
    files: ModelFiles, found: dict[str, Any], logits: dict[str, torch.Tensor], plain: _Plain
) -> int:
    """Print the tables and the verdict; DONE only if all that is exact is the same and right."""
    runs: dict[str, Any] = found["runs"]
    table = Table(title=f"{found['how']}, one device beside it", show_lines=True)
    for name in ("question", "one device answers", *(f"{name} answers" for name in runs)):
        table.add_column(name, overflow="fold")
    for number, (fact, want) in enumerate(zip(FACTS, plain.answers, strict=True)):
        told = [
            _told(run["answers"][number], want, logits[f"{name} {number}"])
            for name, run in runs.items()
        ]
        question = fact.question.removeprefix("According to the text above, ")
        table.add_row(question, Text(files.decode(want.ids).strip()), *told)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(_costs(runs, plain))
    return _verdict(runs, plain)


def _told(answer: dict[str, Any], want: PlainAnswer, logits: torch.Tensor) -> Text:
    difference = (logits - want.first_logits).norm() / want.first_logits.norm()
    text = "the same" if answer["ids"] == want.ids else answer["text"].strip()
    return Text(f"{text}\n(logits differ by {difference:.1e})")  # brackets are no markup


def _costs(runs: dict[str, Any], plain: _Plain) -> Table:
    table = Table(title="what it took; per rank, the largest")
    for name in ("", "encode s", "sent MiB", "KV MiB", "TTFT s", "TPOT ms"):
        table.add_column(name, justify="right" if name else "left")
    for name, run in runs.items():
        sent, kv = run["encode_bytes_sent"] / MIB, run["kv_bytes"] / MIB
        times = (f"{run['ttft_s']:.2f}", f"{1000 * run['tpot_s']:.0f}")
        table.add_row(name, f"{run['encode_s']:.1f}", f"{sent:.0f}", f"{kv:.0f}", *times)
    ttft, tpot = (
        statistics.median(getattr(answer, name) for answer in plain.answers)
        for name in ("ttft_s", "tpot_s")
    )
    table.add_row(
        "one device", f"{plain.encode_s:.1f}", "", "", f"{ttft:.2f}", f"{1000 * tpot:.0f}"
    )
    return table


def _verdict(runs: dict[str, Any], plain: _Plain) -> int:
    (exact, run), *others = runs.items()
    faults = []
    for number, (fact, want) in enumerate(zip(FACTS, plain.answers, strict=True), 1):
        answer = run["answers"][number - 1]
        if answer["ids"] != want.ids:
            faults.append(f"answer {number} of {exact} differs from one device's")
        if fact.expected not in answer["text"]:
            faults.append(f"answer {number} is wrong: {fact.expected!r} is not in it")
    for fault in faults:
        print(f"NOT AS IT SHOULD BE: {fault}")
    if faults:
        return FAULT
    print(f"Every answer of {exact} is right, and the same as on one device.")
    for star, approximate in others:
        answers = approximate["answers"]
        found = [fact.expected in a["text"] for fact, a in zip(FACTS, answers, strict=True)]
        print(f"{star} is approximate: {sum(found)} of its {len(found)} answers are right.")
    print("\nNext, your own document:\n")
    print("  .venv/bin/python -m launch.generate launch.nproc=4 model=smollm2 \\")
    print("      document.path=YOUR.txt question='YOUR QUESTION' output.path=result.json")
    print(
        "\n(model.path=DIR instead of model=smollm2 takes your model: llama, qwen, mistral, gemma…"
    )
    print("python -m launch.compare measures whether star is safe for it.)")
    return DONE


def _say(line: str) -> None:
    print(f"ringstar: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_program(main)
