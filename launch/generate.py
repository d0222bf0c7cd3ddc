"""Answer a question about a long document.

    python -m launch.generate launch.nproc=4 model.path=DIR document.path=book.txt \\
        question="What's the ship's name?" output.path=result.json
    torchrun --standalone --nproc-per-node 4 -m launch.generate model.path=DIR ...
    python -m launch.generate transport=threads transport.world_size=4 model=smollm2 ...

The answer goes to standard output as it is made, choices and timings to standard error.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # the imports below take seconds, and Ctrl-C is quiet meanwhile too
    # a rank waits in native code, where Python would not hear it
    _quiet = signal.SIG_DFL if "RANK" in os.environ else lambda *_: os._exit(130)
    signal.signal(signal.SIGINT, _quiet)

import io
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch

from launch.faults import DONE, leave
from launch.help import help_text
from launch.inputs import Request, read_request
from launch.options import parse
from launch.outputs import check_writable, write_results
from launch.progress import encode_bar
from launch.start import RankCommand
from launch.weights import check_weights
from ringstar.answers import Answer
from ringstar.config import Config
from ringstar.models import ModelFiles, find_model, quiet_transformers
from ringstar.ranks import check_ranks, make_ranks, under_torchrun
from ringstar.runtime import Document, LongContext, choose_kernel
from ringstar.store import check_place
from ringstar.strategies import blocks_of


def main(arguments: Sequence[str]) -> int:
    """Parse, start ranks if asked to, run; returns the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(help_text(__doc__ or ""))
        return DONE
    command = RankCommand("launch.generate", parse, check_request, run_rank)
    return command.main(arguments)


def check_request(config: Config) -> tuple[ModelFiles, Request]:
    """All that can be found wrong before ranks start and weights load."""
    files = check_document_request(config)
    return files, read_request(config, files)


def check_document_request(config: Config) -> ModelFiles:
    """The part of it that does not depend on the question."""
    quiet_transformers()
    check_writable(config.output)
    if config.document.save is not None:
        check_place("document.save", config.document.save)
    files = find_model(config.model, config.rope)
    if not torch.cuda.is_available():  # ranks with GPUs ask on theirs, before weights load
        choose_kernel(config, files, torch.device("cpu"))
    check_weights(files)
    return files


def run_rank(config: Config, phases: Any) -> None:
    """What every rank does: connect, encode, answer; rank 0 prints and writes."""
    show_choices()
    check_ranks(config)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that it cannot show ends no run
    files, request = check_request(config)
    ranks, why = make_ranks(config.transport, phases)
    runtime = LongContext(config, files, ranks, why)
    if runtime.rank == 0 and config.document.ids_path is None:
        logging.getLogger("ringstar").info(f"prompt split by {files.prompt.source}")
    document = encoded_document(config, runtime, request)
    answer = runtime.ask(document, request.query_ids, on_text=print_piece)
    if runtime.rank == 0:
        print_piece("\n" if files.tokenizer else f"{' '.join(map(str, answer.ids))}\n")
        result = result_of(runtime, document, answer)
        _print_summary(result)
        write_results(config, result, answer.first_logits)
    runtime.close()


def encoded_document(config: Config, runtime: LongContext, request: Request) -> Document:
    """Loaded, or encoded with a progress bar; and saved, if it shall be."""
    ids, given = request.context_ids, config.document
    if given.load is not None:
        document = runtime.load(given.load)
    else:
        with encode_bar(len(ids), shown=runtime.rank == 0) as on_progress:
            length = len(ids) + len(request.query_ids)
            if given.save is not None and given.checkpoint_every is not None:
                kept = (given.save, given.checkpoint_every)
                return runtime.encode_kept(ids, *kept, on_progress, length=length)
            document = runtime.encode(ids, on_progress, length=length)
    if given.save is not None:
        runtime.save(document, given.save)
    return document


def result_of(runtime: LongContext, document: Document, answer: Answer) -> dict[str, Any]:
    """The result JSON; `docs/results.md` describes each field."""
    strategy = document.strategy
    blocks = blocks_of(strategy, document.tokens, runtime.world_size)
    ttft_s = document.encode_s + answer.ttft_s
    latency_s = document.encode_s + answer.latency_s
    return {
        "answer": answer.text,
        "answer_ids": answer.ids,
        "context_tokens": document.tokens,
        "query_tokens": answer.query_tokens,
        "new_tokens": len(answer.ids),
        "finish_reason": answer.finish_reason,
        "strategy": strategy.name,
        "layout": getattr(strategy, "layout", None),
        "block_size": blocks.size if blocks else None,
        "anchor_size": blocks.anchor if blocks else None,
        "world_size": runtime.world_size,
        "transport": runtime.transport,
        "kernel": runtime.kernel,
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "device": str(runtime.device),
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


def show_choices() -> None:
    """Let rank 0's choices reach standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("ringstar: %(message)s"))
    logger = logging.getLogger("ringstar")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def print_piece(piece: str) -> None:
    """Print at once; a pipe that nobody reads any more ends no run."""
    try:
        print(piece, end="", flush=True)
    except BrokenPipeError:  # nobody reads any more; the result is still made and written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_summary(result: dict[str, Any]) -> None:
    mib = 1024**2
    print(
        f"ringstar: {result['context_tokens']:,} tokens encoded in {result['encode_s']:.2f} s,"
        f" first token after {result['ttft_s']:.2f} s, then {1000 * result['tpot_s']:.0f} ms each;"
        f" per rank at most {max(result['kv_bytes']) / mib:.1f} MiB of KV"
        f" and {max(result['bytes_sent']) / mib:.1f} MiB sent",
        file=sys.stderr,
    )


if __name__ == "__main__":
    if not under_torchrun():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_grad_enabled(False)
    leave(main(sys.argv[1:]))
