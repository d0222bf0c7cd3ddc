"""Answer a question about a long document.

    python -m launch.generate launch.nproc=4 model.path=DIR document.path=book.txt \\
        question="What's the ship's name?" output.path=result.json
    torchrun --standalone --nproc-per-node 4 -m launch.generate model.path=DIR ...
    python -m launch.generate transport=threads transport.world_size=4 model=smollm2 ...

The answer goes to standard output as it is made, choices and timings to standard error.
"""

from __future__ import annotations

from launch.interrupts import quiet_interrupts

if __name__ == "__main__":  # the imports below take seconds
    quiet_interrupts()

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from launch.encode import encoded_document
from launch.help import help_text
from launch.inputs import Request, read_request
from launch.options import GENERATE
from launch.outputs import check_writable, write_logits, write_result
from launch.result_fields import runtime_fields, strategy_fields
from launch.start import RankCommand, run_program
from launch.streams import print_piece
from launch.weights import usable_model
from ringstar.answers import Answer
from ringstar.config import Config
from ringstar.models import ModelFiles
from ringstar.ranks import make_ranks
from ringstar.runtime import Document, LongContext

log = logging.getLogger("ringstar")


def main(arguments: Sequence[str]) -> int:
    """Parse, start ranks if asked to, run; returns the exit status."""
    command = RankCommand(
        "launch.generate",
        GENERATE.parse,
        check_request,
        run_rank,
        help=lambda: help_text(__doc__ or "", GENERATE),
    )
    return command.main(arguments)


def check_request(config: Config) -> tuple[ModelFiles, Request]:
    """All that can be found wrong before ranks start and weights load."""
    check_writable(config)
    files = usable_model(config)
    return files, read_request(config, files)


def run_rank(config: Config, phases: Any) -> None:
    """What every rank does: connect, encode, answer; rank 0 prints and writes."""
    files, request = check_request(config)
    runtime = LongContext(config, files, *make_ranks(config.transport, phases))
    if runtime.rank == 0 and config.document.ids_path is None:
        log.info(f"prompt split by {files.prompt.source}")
    document = encoded_document(config, runtime, request)
    show = partial(print_piece, kept=config.output.path is not None)
    answer = runtime.ask(document, request.query_ids, on_text=show)
    if runtime.rank == 0:
        show("\n" if files.tokenizer else f"{' '.join(map(str, answer.ids))}\n")
        result = result_of(runtime, document, answer)
        _say_summary(result, loaded=config.document.load is not None)
        write_result(config, result)
        write_logits(config, answer.first_logits)
    runtime.close()


def result_of(runtime: LongContext, document: Document, answer: Answer) -> dict[str, Any]:
    """The result JSON; `docs/results.md` describes each field."""
    ttft_s = document.encode_s + answer.ttft_s
    latency_s = document.encode_s + answer.latency_s
    return {
        "answer": answer.text,
        "answer_ids": answer.ids,
        "context_tokens": document.tokens,
        "query_tokens": answer.query_tokens,
        "new_tokens": len(answer.ids),
        "finish_reason": answer.finish_reason,
        **strategy_fields(document.strategy, document.tokens, document.encoded_by),
        **runtime_fields(runtime),
        "cached_tokens": document.cached_tokens,
        "encode_s": document.encode_s,
        "ttft_s": ttft_s,
        "tpot_s": answer.tpot_s,
        "tokens_per_s": len(answer.ids) / latency_s if latency_s else 0.0,
        "peak_memory_bytes": answer.metrics.peak_memory_bytes,
        "kv_bytes": answer.metrics.kv_bytes,
        "bytes_sent": answer.metrics.bytes_sent,
        "kv_error": document.kv_error,
    }


def _say_summary(result: dict[str, Any], *, loaded: bool) -> None:
    mib, done = 1024**2, "loaded" if loaded else "encoded"
    log.info(
        f"{result['context_tokens']:,} tokens {done} in {result['encode_s']:.2f} s,"
        f" first token after {result['ttft_s']:.2f} s, then {1000 * result['tpot_s']:.0f} ms each;"
        f" per rank at most {max(result['kv_bytes']) / mib:.1f} MiB of KV"
        f" and {max(result['bytes_sent']) / mib:.1f} MiB sent"
    )


if __name__ == "__main__":
    run_program(main)
