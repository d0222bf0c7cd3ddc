"""python -m pytest tests/gpu

The runtime on one CUDA device, against Hugging Face on that device and in float32: ranks as
threads, as gloo processes that share the card, and as NCCL ranks where NCCL lets them share it.
The same code runs on the CPU, so that it is known to work where there is no card.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from localflash import BACKENDS, Case
from ringstar import LongContext
from ringstar.config import CacheConfig, Config, EncodeConfig, ModelConfig, RingConfig, StarConfig
from seqpar import ThreadWorld, Transport
from seqpar.process import ProcessWorld
from seqpar.spawn import Start
from tests.support.models import Expected, expected, random_ids, relative_error, tiny_folder
from tests.support.ranks import in_processes
from tests.support.star_oracle import anchored, first_anchor, star

BOUND, GREEDY = 1e-5, 16
DOCUMENT, QUESTION, BLOCK, ANCHOR = 203, 9, 40, 24
CHUNK_TOKENS = 30  # several chunks, so that a past is reached too
NCCL_SHARES_A_CARD = (2, 30)
ON_EACH = pytest.mark.parametrize("device", ["cpu", "cuda"])

IDS, ASKED = random_ids(DOCUMENT, seed=1), random_ids(QUESTION, seed=2)
STRATEGIES = {
    "zigzag": RingConfig(),
    "striped": RingConfig(layout="striped"),
    "queries travel": RingConfig(past_by="queries"),
    "star": StarConfig(block_size=BLOCK, anchor_size=ANCHOR),
    "star, one block": StarConfig(block_size=DOCUMENT),
}
STAR = "star"  # the one of them that is not exact


def needs(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@functools.cache
@torch.inference_mode()
def one_device(device: str) -> Expected:
    """What Hugging Face's eager attention says on this device, with its float64 twin."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder("llama"), attn_implementation="eager", dtype=torch.float32
    )
    prompt = torch.tensor([IDS + ASKED], device=device)
    out = model.to(device).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=GREEDY,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    twin = expected(tiny_folder("llama"), IDS + ASKED, GREEDY).logits64_V
    tokens = out.sequences[0, len(IDS + ASKED) :].tolist()
    return Expected(out.logits[0][0].float().cpu(), twin, tokens)


def check(name: str, device: str, logits_V: torch.Tensor, tokens: list[int]) -> None:
    if name == STAR:
        blocks = anchored(DOCUMENT, BLOCK, first_anchor(IDS, ANCHOR))
        answer = star(tiny_folder("llama"), IDS, ASKED, blocks, GREEDY)
        assert relative_error(logits_V, answer.first_V) <= BOUND, name
        assert tokens == answer.ids, name
        return
    want = one_device(device)
    for logits in (want.logits_V, want.logits64_V):
        assert relative_error(logits_V, logits) <= BOUND, name
    assert tokens == want.ids, name


def answer(runtime: LongContext, name: str) -> tuple[Any, list[int]]:
    """First logits (vocab,) as numpy, and greedy tokens."""
    document = runtime.encode(IDS, strategy=STRATEGIES[name])
    given = runtime.ask(document, ASKED, max_new_tokens=GREEDY)
    return given.first_logits.cpu().numpy(), given.ids


def settings(folder: str) -> Config:
    return Config(
        model=ModelConfig(path=folder, dtype="float32"),
        strategy=RingConfig(),
        encode=EncodeConfig(CHUNK_TOKENS),
        cache=CacheConfig(reuse=False),
    )


def rank_answers(transport: Transport, folder: str) -> list[tuple[Any, list[int]]]:
    torch.set_float32_matmul_precision("highest")  # no TF32
    runtime = LongContext.from_config(settings(folder), ProcessWorld(transport))
    assert runtime.device.type == transport.device.type
    return [answer(runtime, name) for name in STRATEGIES]


def run_processes(world: int, start: Start) -> list[list[tuple[Any, list[int]]]]:
    folder = tiny_folder("llama")
    return in_processes(world, rank_answers, folder, start=start, timeout_s=150)


def check_ranks(ranks: list[list[tuple[Any, list[int]]]], device: str) -> None:
    for answers in ranks:
        for name, (logits, tokens) in zip(STRATEGIES, answers, strict=True):
            check(name, device, torch.from_numpy(logits), tokens)
            same = ranks[0][list(STRATEGIES).index(name)]
            assert (logits == same[0]).all() and tokens == same[1], f"{name}: ranks differ"


@pytest.fixture(autouse=True)
def _no_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@ON_EACH
@pytest.mark.parametrize("world", [1, 2, 4])
def test_threads(device, world):
    needs(device)
    ranks = ThreadWorld(world, device=device, timeout_s=120, threads_per_rank=1)
    runtime = LongContext.from_config(settings(tiny_folder("llama")), ranks)
    for name in STRATEGIES:
        logits, tokens = answer(runtime, name)
        check(name, device, torch.from_numpy(logits), tokens)


@ON_EACH
@pytest.mark.parametrize("world", [2, 4])
def test_gloo_processes_on_one_card(device, world):
    """CUDA tensors go through copies in host memory; on the CPU that is forced."""
    needs(device)
    start = Start(device="cuda:0") if device == "cuda" else Start(staged=True)
    check_ranks(run_processes(world, start), device)


def test_copies_in_host_memory_change_no_bit():
    plain, staged = (run_processes(2, Start(staged=s)) for s in (False, True))
    for one, other in zip(plain, staged, strict=True):
        for (logits, tokens), (staged_logits, staged_tokens) in zip(one, other, strict=True):
            assert (logits == staged_logits).all() and tokens == staged_tokens


@pytest.mark.parametrize("device", ["cuda"])
def test_two_nccl_ranks_on_one_card(device):
    needs(device)
    version = torch.cuda.nccl.version() if dist.is_nccl_available() else (0,)
    if version < NCCL_SHARES_A_CARD:
        has, needed = (".".join(map(str, v)) for v in (version, NCCL_SHARES_A_CARD))
        pytest.skip(f"NCCL {has} refuses two ranks on a card; {needed} allows it")
    # an experimental setting; fewer blocks, so that the kernels of both ranks run side by side
    environment = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "4"}
    check_ranks(run_processes(2, Start("nccl", "cuda:0", environment=environment)), device)


def kernel_error(runtime: LongContext, want_V: torch.Tensor) -> float:
    document = runtime.encode(IDS)
    (logits_V,) = runtime.logits(document, ASKED)
    return relative_error(logits_V, want_V)


@ON_EACH
@pytest.mark.parametrize("kernel", BACKENDS)
def test_every_kernel_in_bfloat16(device, kernel):
    """No further from float64 than twice Hugging Face's own bfloat16 is."""
    needs(device)
    why = BACKENDS[kernel].unsupported(Case(torch.device(device), torch.bfloat16, 16, None))
    if why:
        pytest.skip(f"{kernel}: {why}")
    folder = tiny_folder("llama")
    want_V = expected(folder, IDS + ASKED, GREEDY).logits64_V
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.bfloat16
    ).to(device)
    with torch.inference_mode():
        theirs = model(torch.tensor([IDS + ASKED], device=device), logits_to_keep=1).logits[0, -1]
    config = settings(folder)
    config.model.dtype, config.kernel.name = "bfloat16", kernel
    ranks = ThreadWorld(2, device=device, timeout_s=120, threads_per_rank=1)
    runtime = LongContext.from_config(config, ranks)
    assert kernel_error(runtime, want_V) <= 2 * relative_error(theirs.cpu(), want_V)
