# python -m pytest tests/localflash/test_flex.py -q
"""FlexAttention's adapter beyond the conformance suite: its mask, its compilation, its silence."""

import warnings

import pytest
import torch
from torch.nn.attention import flex_attention

from localflash import BACKENDS, Band, Case, attend, attend_reference, torch_flex


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 700])
def test_the_mask_is_pytorchs_own(rows):
    """Written down without the pairs; PyTorch finds the same blocks by looking at all of them."""
    cpu = torch.device("cpu")
    got = torch_flex._causal_blocks(rows, cpu)
    want = flex_attention.create_block_mask(torch_flex._sees, 1, 1, rows, rows, device="cpu")
    assert got.shape == want.shape and got.BLOCK_SIZE == want.BLOCK_SIZE
    for kind in ("kv", "full_kv"):
        counts = getattr(want, f"{kind}_num_blocks")
        assert torch.equal(getattr(got, f"{kind}_num_blocks"), counts)
        at, at_want = (getattr(mask, f"{kind}_indices")[0, 0] for mask in (got, want))
        for row, count in enumerate(counts[0, 0].tolist()):
            assert torch.equal(at[row, :count], at_want[row, :count])
    assert torch_flex._causal_blocks(rows, cpu) is got


@pytest.mark.parametrize("causal", [False, True])
def test_one_graph_serves_many_lengths(causal):
    """Compiled as for CUDA, the graph run as it is: inductor has no lse on CPUs."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    call = torch_flex._fused(causal, torch.float32, 6, 2, 16, backend=count)
    band = Band(0, 1, 0, 1) if causal else None
    for rows in (300, 700, 301, 1025, 400):
        q, k, v = (torch.randn(1, rows, heads, 16) for heads in (6, 2, 2))
        mask = torch_flex._causal_blocks(rows, q.device) if causal else None
        out, lse = call(*(x.transpose(1, 2) for x in (q, k, v)), mask, 0.3, True)
        want = attend_reference(q, k, v, band, 0.3)
        torch.testing.assert_close(out.transpose(1, 2), want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, want[1], rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


def test_the_cpu_form_warns_nobody(monkeypatch):
    monkeypatch.setattr(flex_attention, "_WARNINGS_SHOWN", set(), raising=False)
    torch_flex._warned.cache_clear()
    q = torch.randn(1, 5, 2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(q, q, q, Band(0, 1, 0, 1), backend="flex")
    torch_flex._warned.cache_clear()  # PyTorch's memory of the warning goes with monkeypatch


def test_compilations_are_kept_for_each_kind():
    kind = (True, torch.bfloat16, 8, 2, 64)
    assert torch_flex._fused(*kind) is torch_flex._fused(*kind)
    assert torch_flex._fused(*kind) is not torch_flex._fused(False, *kind[1:])


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case(torch.device("cpu"), torch.float32, 8, None), None),
        (Case(torch.device("cpu"), torch.float32, 64, 30.0), "has no softcap"),
        (Case(torch.device("cpu"), torch.float64, 64, None), "takes bfloat16, float16, float32"),
        (Case(torch.device("cuda"), torch.bfloat16, 64, None), None),
        (Case(torch.device("cuda"), torch.float32, 80, None), None),
        (Case(torch.device("cuda"), torch.bfloat16, 8, None), "takes head dims from 16 to 256"),
        (Case(torch.device("meta"), torch.bfloat16, 64, None), "runs on cpu and cuda"),
    ],
)
def test_what_it_takes(monkeypatch, case, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert BACKENDS["flex"].unsupported(case) == why
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if case.device.type == "cuda":
        assert BACKENDS["flex"].unsupported(case) == "needs a CUDA device"
