"""How the cost of an encode grows: with its length at fixed ranks, and with ranks at a fixed share.

Ring and star, attention alone and a small random model.  CPU time is that of all ranks together;
peak bytes are those of live tensors, sent bytes those that ranks count; each of the rank with most.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from benchmarks.growth_plan import (
    BLOCK,
    COSTS,
    DIM,
    HEADS,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    Job,
    attention_tiles,
    buffer_bytes,
    model_peak,
    planned,
)
from benchmarks.live_bytes import LiveBytes
from benchmarks.model import PRELOAD
from localflash import attend, empty_partial
from ringattn import ring_attention
from ringstar import LongContext
from ringstar.config import CacheConfig, Config, ModelConfig, RingConfig, StarConfig
from ringstar.models.modeling import auto_model
from seqpar import Layout, Tile, Transport, token_count
from seqpar.process import ProcessWorld
from seqpar.spawn import run_processes
from starattn import make_blocks, star_attention

WARM_UPS, REPEATS = 1, 3
VOCAB = 97
# shorter than most shares: a longer one would be the peak, until shares are longer still
FF_SLICE_TOKENS = 512
# of every sweep: ranks while the length grows, tokens of a rank while the ranks grow
WORLD, SHARE = 4, {"attention": 4096, "model": 2048}
LENGTHS = {"attention": (8192, 16384, 32768, 49152), "model": (4096, 8192, 16384, 32768)}
WORLDS = (1, 2, 4, 8)

_WHAT = (
    f"encodes, float32, gloo ranks of one thread; {HEADS} query and {KV_HEADS} KV heads of {DIM};"
    f" the model has {LAYERS} layers, {HEADS * DIM} wide, feed-forward {INTERMEDIATE} in slices of"
    f" {FF_SLICE_TOKENS} tokens; star's blocks and anchors are {BLOCK} tokens; by length on {WORLD}"
    f" ranks, by ranks with {SHARE['attention']} (model: {SHARE['model']}) tokens each; medians of"
    f" {REPEATS} after {WARM_UPS} warm-up"
)

Sweeps = dict[str, list[Job]]


def sweeps() -> Sweeps:
    """The jobs of each line of the picture, by its name, in the order of what grows."""
    found: Sweeps = {}
    for work, lengths in LENGTHS.items():
        for strategy in ("ring", "star"):
            job: Any = partial(Job, work, strategy)
            found[f"length, {work}, {strategy}"] = [job(n, WORLD) for n in lengths]
            found[f"ranks, {work}, {strategy}"] = [job(SHARE[work] * w, w) for w in WORLDS]
    return found


def run() -> dict[str, Any]:
    """Each sweep with what was measured, and what its plan says, at each of its jobs."""
    chosen = sweeps()
    jobs = list(dict.fromkeys(job for line in chosen.values() for job in line))
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        found = measure(jobs, folder)
    return {
        "what": _WHAT,
        "sweeps": {name: [found[job] for job in line] for name, line in chosen.items()},
    }


def measure(jobs: list[Job], folder: str) -> dict[Job, dict[str, Any]]:
    """Each job measured, and planned; ranks are started once for all jobs of so many."""
    found = {}
    for world in sorted({job.world for job in jobs}):
        own = [job for job in jobs if job.world == world]
        ranks = run_processes(world, measure_rank, own, folder, preload=PRELOAD, timeout_s=3600)
        for number, job in enumerate(own):
            found[job] = _together(job, [rank[number] for rank in ranks])
    return found


def _together(job: Job, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The ranks' CPU time together in each repeat, and the most bytes of any rank."""
    cpu = [sum(times) for times in zip(*(rank["cpu_s"] for rank in ranks), strict=True)]
    plan = planned(job)
    return {
        **asdict(job),
        "cpu_s": statistics.median(cpu),
        "cpu_s_repeats": cpu,
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "sent_bytes": [rank["sent_bytes"] for rank in ranks],
        "kv_bytes": [rank["kv_bytes"] for rank in ranks],
        "planned": asdict(plan),
        "planned_peak_bytes": max(rank["planned_peak_bytes"] for rank in ranks),
    }


def measure_rank(transport: Transport, jobs: list[Job], folder: str) -> list[dict[str, Any]]:
    """What each job took on this rank; repeats go round all jobs, so that none has a bad minute."""
    works = [make_work(transport, job, folder) for job in jobs]
    found = [_bytes(transport, work) for work in works]
    cpu: list[list[float]] = [[] for _ in jobs]
    for repeat in range(WARM_UPS + REPEATS):
        for work, times in zip(works, cpu, strict=True):
            transport.barrier()
            started = time.process_time()
            work.run()
            if repeat >= WARM_UPS:
                times.append(time.process_time() - started)
    return [{**seen, "cpu_s": times} for seen, times in zip(found, cpu, strict=True)]


@dataclass(frozen=True)
class RankWork:
    """What runs a job once on this rank and returns the bytes of KV that it keeps.

    `planned_peak` gives the bytes that should live at once.
    """

    run: Callable[[], int]
    planned_peak: Callable[[], int]


def _bytes(transport: Transport, work: RankWork) -> dict[str, int]:
    """The most that lives at once, and what is sent and kept, in one run that is not timed."""
    sent = transport.counters.bytes_sent
    with LiveBytes() as memory:
        kept = work.run()
    sent = transport.counters.bytes_sent - sent
    return {
        "peak_bytes": memory.peak,
        "sent_bytes": sent,
        "kv_bytes": kept,
        "planned_peak_bytes": work.planned_peak(),
    }


def make_work(transport: Transport, job: Job, folder: str) -> RankWork:
    """A job on this rank."""
    if job.work == "model":
        model = ModelConfig(path=folder, dtype="float32", ff_slice_tokens=FF_SLICE_TOKENS)
        config = Config(model=model, cache=CacheConfig(reuse=False))
        runtime = LongContext.from_config(config, ProcessWorld(transport))
        return _model_work(runtime, job)
    return _attention_work(transport, job)


def _model_work(runtime: LongContext, job: Job) -> RankWork:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (job.tokens,), generator=generator).tolist()
    star = StarConfig(block_size=BLOCK, anchor_size=BLOCK)
    strategy = star if job.strategy == "star" else RingConfig()

    def run() -> int:
        return runtime.encode(ids, strategy=strategy).metrics.kv_bytes[runtime.rank]

    def planned_peak() -> int:
        rank, tokens = runtime.rank, planned(job).tokens[runtime.rank]
        attention = _planned_peak(job, rank, torch.zeros(1, tokens, HEADS, DIM))
        room = -(-runtime.config.encode.answer_tokens // job.world)
        return model_peak(job, rank, room, FF_SLICE_TOKENS, attention)

    return RankWork(run, planned_peak)


def _attention_work(transport: Transport, job: Job) -> RankWork:
    whole: Any
    if job.strategy == "ring":
        runs = Layout("zigzag", 0, job.tokens, transport.world_size).runs(transport.rank)
        whole, sizes = ring_attention, {}
    else:
        runs = make_blocks(job.tokens, transport.world_size, BLOCK, BLOCK).owned(transport.rank)
        whole, sizes = star_attention, {"block_size": BLOCK, "anchor_size": BLOCK}
    generator = torch.Generator().manual_seed(transport.rank)
    q, k, v = (
        torch.randn(1, token_count(runs), heads, DIM, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )

    def run() -> int:
        whole(q, k, v, transport=transport, length=job.tokens, **sizes)
        return k.nbytes + v.nbytes

    return RankWork(run, lambda: _planned_peak(job, transport.rank, q))


def _planned_peak(job: Job, rank: int, q: Tensor) -> int:
    """Transfer buffers, the running result, and what the kernel alone takes for its worst tile."""
    tiles = attention_tiles(job, rank)
    workspace = max((_workspace(q, tile) for tile in tiles), default=0)
    return buffer_bytes(job, rank) + q.shape[1] * COSTS.partial_bytes + workspace


def _workspace(q: Tensor, tile: Tile) -> int:
    """Bytes that one kernel call takes beyond its arguments; which keys they are is all one."""
    rows, keys = q[:, tile.q], tile.k.stop - tile.k.start
    k, v = (torch.zeros(1, keys, KV_HEADS, DIM) for _ in range(2))
    into = empty_partial(rows)
    with LiveBytes() as memory:
        attend(rows, k, v, tile.band, into=into)
    return memory.peak


def save_model(folder: str) -> None:
    """A random llama with the sizes of the plan."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=HEADS * DIM,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2 * max(LENGTHS["model"]),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    auto_model().from_config(config).save_pretrained(folder)
