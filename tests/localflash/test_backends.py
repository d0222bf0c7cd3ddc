# python -m pytest tests/localflash/test_backends.py -q
"""The choice of a back end, the CPU path's own rules, the CUDA adapters' calls (meta tensors)."""

import pytest
import torch

from benchmarks.live_bytes import LiveBytes
from localflash import Band, attend, attend_reference, choose, merge_many, torch_cpu, torch_cuda

CPU = {"device": "cpu", "dtype": torch.float32, "head_dim": 64}


def test_auto_says_why():
    choice = choose("auto", **CPU)
    assert choice.backend.name == "torch"
    assert choice.reason == "kernel torch is the first choice for float32, head dim 64 on cpu."
    capped = choose(None, **CPU, softcap=30.0)
    assert capped.backend.name == "torch"
    passed = choose(None, device="meta", dtype=torch.float32, head_dim=64)
    assert passed.backend.name == "reference"


def test_what_cannot_run_is_refused_by_name():
    with pytest.raises(ValueError, match=r"kernel=flex: has no softcap .*available: auto, torch"):
        choose("flex", **CPU, softcap=30.0)
    for name in ("cudnn", "efficient"):
        with pytest.raises(ValueError, match=rf"kernel={name}: needs a CUDA device"):
            choose(name, **CPU)
    with pytest.raises(ValueError, match="kernel=auto: nothing runs int8"):
        choose("auto", device="cpu", dtype=torch.int8, head_dim=64)


def error(out, want):
    """What a model sees: rounded to its dtype."""
    return ((out.bfloat16().double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("parts", [8, 16])
@pytest.mark.parametrize("sharpness", [1.0, 3.0])
def test_merged_bf16_partials_are_no_worse_than_one_call(parts, sharpness):
    torch.manual_seed(0)
    q = (sharpness * torch.randn(1, 64, 6, 64)).bfloat16()
    k, v = (torch.randn(1, 2048, 2, 64).bfloat16() for _ in range(2))
    want = attend_reference(q.double(), k.double(), v.double())[0]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    single = kernel(*(x.transpose(1, 2) for x in (q, k, v)))[0].transpose(1, 2)
    pairs = zip(k.chunk(parts, 1), v.chunk(parts, 1), strict=True)
    outs, lses = zip(*(attend(q, *kv, backend="torch") for kv in pairs), strict=True)
    merged = merge_many(torch.stack(outs), torch.stack(lses))[0]
    assert error(merged, want) <= 1.2 * error(single, want)


@pytest.mark.parametrize("rows", [511, 1300])
def test_softcap_is_computed_block_by_block(rows):
    """Across the sizes of its blocks, and without holding all scores."""
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(1, rows, 2, 16) for _ in range(3))
    for band in (None, Band(0, 1, 0, 1), Band(7, 1, 0, 1, 600)):
        with LiveBytes() as memory:
            got = attend(q, k, v, band, softcap=4.0, backend="torch")
        want = attend_reference(q.double(), k.double(), v.double(), band, softcap=4.0)
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
        if rows > 1024:
            assert memory.peak < 0.75 * (4 * 2 * rows * rows * 4)  # four such tensors at once


def test_model_tensors_enter_without_a_copy():
    heads_first = torch.randn(1, 3, 40, 16)  # as Hugging Face makes them
    x = heads_first.transpose(1, 2)
    assert torch_cpu._heads_first(x).data_ptr() == heads_first.data_ptr()


@pytest.mark.parametrize("rows", [2049, 2500])
def test_long_16_bit_squares_are_widened_in_blocks(rows):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, rows, 1, 8).bfloat16() for _ in range(3))
    got = attend(q, k, v, Band(0, 1, 0, 1), backend="torch")
    want = attend_reference(q.double(), k.double(), v.double(), Band(0, 1, 0, 1))
    assert ((got[0] - want[0]).norm() / want[0].norm()) < 1e-5
    assert (got[1] - want[1]).abs().max() < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_result(threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 400, 2, 16) for _ in range(3))
    got = attend(q, k, v, Band(0, 1, 0, 1), backend="torch")
    want = attend_reference(q.double(), k.double(), v.double(), Band(0, 1, 0, 1))
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [torch_cuda.flash, torch_cuda.cudnn, torch_cuda.efficient])
@pytest.mark.parametrize(("tq", "tk", "causal"), [(40, 40, True), (1, 33, False), (7, 1, False)])
def test_cuda_adapters_call_and_shape(tile, tq, tk, causal):
    """Arguments and shapes only: PyTorch's own meta kernels stand in for the device."""
    q = torch.empty(2, tq, 6, 64, dtype=torch.bfloat16, device="meta")
    k, v = (torch.empty(2, tk, 2, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    out, lse = tile(q, k, v, causal, 0.125)
    assert out.shape == (2, tq, 6, 64)
    assert lse.shape == (2, 6, tq) and lse.dtype == torch.float32


def test_cuda_lse_is_cut_and_its_infinity_turned():
    lse = torch.tensor([[[1.0, torch.inf, 2.0, 9.0]]])
    assert torch_cuda._normal(lse, 3).tolist() == [[[1.0, -torch.inf, 2.0]]]


def test_cudnn_one_key_is_its_value():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 6, 8), torch.randn(2, 1, 2, 8), torch.randn(2, 1, 2, 8)
    for got, want in zip(
        torch_cuda._one_key(q, k, v, 0.3), attend_reference(q, k, v, scale=0.3), strict=True
    ):
        torch.testing.assert_close(got, want)
