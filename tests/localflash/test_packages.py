# python -m pytest tests/localflash/test_packages.py -q
"""The adapters of attention packages, called on stand-ins that keep each package's conventions."""

import math
import sys
from types import ModuleType

import pytest
import torch

from localflash import BACKENDS, Band, Case, attend_reference, backends, installed, packages
from localflash.tiles import attend_tiles

CUDA = torch.device("cuda")
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 8e-4}  # as in test_attend.py
BANDS = {
    "all": None,
    "causal": Band(0, 1, 0, 1),
    "offset": Band(13, 1, 0, 1),
    "window": Band(0, 1, 0, 1, 5),
    "window ahead": Band(40, 1, 20, 1, 17),
    "unequal": Band(10, 3, 0, 2),
}


def softmax_bottom_right(q_THD, k_THD, v_THD, scale, causal):
    """out (Tq, H, D) in q's dtype and natural lse (H, Tq); the last row sees the last key."""
    for x in (q_THD, k_THD, v_THD):
        assert x.dtype in TOLERANCE and x.ndim == 3 and min(x.shape) > 0
        assert x.stride(2) == 1, "the last dimension must be contiguous"
        assert all(s % 8 == 0 for s in x.stride()[:2]) and x.data_ptr() % 16 == 0
    group = q_THD.shape[1] // k_THD.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k_THD, v_THD))
    scores = torch.einsum("qhd,khd->hqk", q_THD.float(), k) * scale
    if causal:
        rows, keys = scores.shape[1:]
        hidden = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(2)
    return torch.einsum("hqk,khd->qhd", scores.softmax(2), v).to(q_THD.dtype), lse


def batched(q, k, v, scale, causal):
    assert q.shape[0] == k.shape[0] == v.shape[0]
    parts = [softmax_bottom_right(*x, scale, causal) for x in zip(q, k, v, strict=True)]
    return tuple(torch.stack(x) for x in zip(*parts, strict=True))


def fa3_flash_attn_func(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
    """Of tokenspeed-fa3 3.0.0; fa3-fwd 0.0.3 names it alike."""
    out, lse = batched(q, k, v, softmax_scale or q.shape[3] ** -0.5, causal)
    return (out, lse) if return_attn_probs else out


def fa4_flash_attn_func(q, k, v, softmax_scale=None, causal=False, return_lse=False):
    """Of flash-attn-4 4.0.0b36: always a pair."""
    out, lse = batched(q, k, v, softmax_scale or q.shape[3] ** -0.5, causal)
    return out, lse if return_lse else None


def single_prefill_with_kv_cache(q, k, v, causal=False, sm_scale=None, return_lse=False):
    """Of flashinfer-python 0.7.2: no batch, lse (Tq, H) in base 2."""
    out, lse_HT = softmax_bottom_right(q, k, v, sm_scale or q.shape[2] ** -0.5, causal)
    return (out, (lse_HT / math.log(2)).T.contiguous()) if return_lse else out


STAND_INS = {
    "fa3": ("flash_attn_interface", fa3_flash_attn_func),
    "fa3-fwd": ("fa3_fwd_interface", fa3_flash_attn_func),
    "fa4": ("flash_attn.cute", fa4_flash_attn_func),
    "flashinfer": ("flashinfer", single_prefill_with_kv_cache),
}
EVERY = pytest.mark.parametrize("package", STAND_INS)


@pytest.fixture
def tile(package, monkeypatch):
    """The adapter, with the package's stand-in as the only one installed."""
    name, function = STAND_INS[package]
    module = ModuleType(name)
    setattr(module, function.__name__.removeprefix("fa3_").removeprefix("fa4_"), function)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(installed, "_is_there", name.__eq__)
    packages._function.cache_clear()
    yield getattr(packages, package.removesuffix("-fwd"))
    packages._function.cache_clear()


def data(tq, tk, dtype, heads=(6, 2), dim=16, batch=2):
    g = torch.Generator().manual_seed(tq * 1000 + tk)
    shapes = (batch, tq, heads[0], dim), (batch, tk, heads[1], dim), (batch, tk, heads[1], dim)
    return [(2 * torch.randn(s, generator=g)).to(dtype) for s in shapes]


def check(tile, q, k, v, band, scale=0.3):
    got = attend_tiles(tile, q, k, v, band, scale, None)
    want = attend_reference(q.double(), k.double(), v.double(), band, scale)
    tol = TOLERANCE[q.dtype]
    assert got[0].dtype == got[1].dtype == torch.float32
    assert (got[0].double() - want[0]).norm() <= tol * want[0].norm()
    empty = want[1] == -torch.inf
    assert torch.equal(got[1] == -torch.inf, empty)
    torch.testing.assert_close(got[1][~empty].double(), want[1][~empty], rtol=1e-5, atol=1e-5)


@EVERY
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("band", BANDS)
def test_bands(tile, dtype, band):
    for tq, tk in [(33, 47), (47, 33), (1, 50), (50, 1), (29, 29)]:
        check(tile, *data(tq, tk, dtype), BANDS[band])


@EVERY
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (9, 3)])
@pytest.mark.parametrize("batch", [1, 3])
def test_grouped_heads(tile, heads, batch):
    check(tile, *data(21, 35, torch.bfloat16, heads, batch=batch), Band(14, 1, 0, 1))


@EVERY
@pytest.mark.parametrize("dims", [(1, 2), (2, 3)], ids=["heads first", "last dim apart"])
def test_strides(tile, dims):
    q, k, v = (
        x.transpose(*dims).contiguous().transpose(*dims) for x in data(30, 30, torch.bfloat16)
    )
    assert not q.is_contiguous()
    check(tile, q, k, v, Band(0, 1, 0, 1))


@pytest.mark.parametrize("package", ["flashinfer"])
def test_the_stand_ins_hold_to_their_conventions(package, tile):
    """Base 2 and its shape; what is not contiguous is refused."""
    q, k, v = (x[0] for x in data(7, 9, torch.bfloat16))
    out, lse = single_prefill_with_kv_cache(q, k, v, sm_scale=0.3, return_lse=True)
    want = attend_reference(q[None].float(), k[None].float(), v[None].float(), scale=0.3)[1]
    assert out.shape == (7, 6, 16) and lse.shape == (7, 6)
    torch.testing.assert_close(torch.exp2(lse.T), want[0].exp(), rtol=1e-4, atol=0)
    with pytest.raises(AssertionError, match="last dimension"):
        single_prefill_with_kv_cache(*(x.mT.contiguous().mT for x in (q, k, v)))


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def why_not(name, dtype=torch.bfloat16, dim=128, device=CUDA):
    return BACKENDS[name].unsupported(Case(device, dtype, dim, None))


def install(folder, monkeypatch, *names):
    """Modules that fail when imported, on a path of their own; none else is found."""
    for name in names:
        path = folder.joinpath(*name.split("."))
        path.mkdir(parents=True)
        (path / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.setattr(sys, "path", [str(folder)])


@pytest.mark.parametrize("name", ["fa3", "fa4", "flashinfer"])
def test_a_missing_device_is_named_first_and_then_a_missing_package(
    name, request, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not(name) == why_not(name, device=torch.device("cpu")) == "needs a CUDA device"
    request.getfixturevalue("hopper")
    install(tmp_path, monkeypatch)
    assert why_not(name, torch.float32) == "takes bfloat16, float16"
    package = {"fa3": "FlashAttention-3", "fa4": "flash-attn-4", "flashinfer": "flashinfer-python"}
    assert why_not(name).startswith("needs ") and package[name] in why_not(name)


@pytest.mark.usefixtures("hopper")
def test_installed_packages_are_found_and_not_imported(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "flash_attn_interface", "flash_attn.cute", "flashinfer")
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise AssertionError('imported')\n")
    assert why_not("fa3") is why_not("fa4") is why_not("flashinfer") is None
    assert why_not("fa3", torch.float16) is None
    assert "64, 128 and 256" in why_not("flashinfer", dim=96)
    assert not {"flash_attn", "flash_attn_interface", "flashinfer"} & set(sys.modules)


@pytest.mark.usefixtures("hopper")
def test_fa3_fwd_takes_bfloat16_only(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "fa3_fwd_interface")
    assert why_not("fa3") is None
    assert "bfloat16 only" in why_not("fa3", torch.float16)


@pytest.mark.usefixtures("hopper")
def test_flash_attention_2_alone_is_not_4(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "flash_attn")
    assert why_not("fa4") == "needs the package flash-attn-4"


@pytest.mark.parametrize(
    ("capability", "dim", "fa3", "fa4"),
    [
        ((8, 0), 128, "runs on Hopper only", "needs compute capability 9, 10 or 11"),
        ((9, 0), 192, None, None),
        ((10, 0), 128, "runs on Hopper only", None),
        ((10, 0), 192, "runs on Hopper only", "takes head dims up to 128, and 256, on Blackwell"),
        ((10, 3), 256, "runs on Hopper only", None),
        ((12, 0), 128, "runs on Hopper only", "needs compute capability 9, 10 or 11"),
    ],
)
def test_which_devices_they_run_on(hopper, monkeypatch, capability, dim, fa3, fa4):
    monkeypatch.setattr(backends, "installed", lambda modules: modules[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert (why_not("fa3", dim=dim), why_not("fa4", dim=dim)) == (fa3, fa4)
