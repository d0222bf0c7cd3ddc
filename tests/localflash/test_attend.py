# python -m pytest tests/localflash/test_attend.py -q
"""Conformance: every back end that runs here against the reference in float64."""

import pytest
import torch

from localflash import BACKENDS, Band, Case, attend, attend_reference, merge

B, H, HKV, D = 2, 6, 2, 16
# Relative to the norm, for float32 results of inputs that are already rounded to the dtype.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 6e-3,
    torch.float16: 8e-4,
}
BANDS = {
    "all": None,
    "causal": Band(0, 1, 0, 1),
    "offset": Band(13, 1, 0, 1),
    "negative": Band(0, 1, 7, 1),
    "minus one": Band(0, 4, 1, 4),
    "keys all past": Band(1000, 1, 0, 1),
    "keys all ahead": Band(0, 1, 1000, 1),
    "window": Band(0, 1, 0, 1, 5),
    "window ahead": Band(40, 1, 20, 1, 17),
    "window of one": Band(3, 1, 0, 1, 1),
    "unequal": Band(10, 3, 0, 2),
    "unequal window": Band(30, 2, 0, 3, 25),
}
SIZES = [(33, 47), (47, 33), (1, 50), (50, 1), (29, 29), (1, 1)]


def run_on(name: str, device: str, dtype=torch.float32, softcap=None, dim=D) -> None:
    """Skips what cannot run here, with the back end's own reason."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{name}: no CUDA device here")
    why = BACKENDS[name].unsupported(Case(torch.device(device), dtype, dim, softcap))
    if why:
        pytest.skip(f"{name}: {why}")


def data(tq, tk, dtype=torch.float32, device="cpu", heads=(H, HKV), dim=D, batch=B):
    g = torch.Generator().manual_seed(tq * 1000 + tk)
    shapes = (batch, tq, heads[0], dim), (batch, tk, heads[1], dim), (batch, tk, heads[1], dim)
    return [(2 * torch.randn(s, generator=g)).to(device=device, dtype=dtype) for s in shapes]


def agree(got, q, k, v, band, tol=None, **options):
    want = attend_reference(q.double(), k.double(), v.double(), band, **options)
    tol = TOLERANCE[q.dtype] if tol is None else tol
    kept = torch.float64 if q.dtype == torch.float64 else torch.float32
    assert got[0].dtype == got[1].dtype == kept
    assert got[0].shape == q.shape and got[1].shape == (q.shape[0], q.shape[2], q.shape[1])
    error = (got[0].double() - want[0]).norm() / want[0].norm().clamp_min(1e-30)
    assert error <= tol, f"relative error {error:.1e}"
    empty = want[1] == -torch.inf
    assert torch.equal(got[1] == -torch.inf, empty)
    assert (got[0].transpose(1, 2)[empty] == 0).all()
    torch.testing.assert_close(got[1][~empty].double(), want[1][~empty], rtol=tol, atol=4 * tol)


ANY_CPU = Case(torch.device("cpu"), torch.float32, D, None)
ON_CPU = [name for name, b in BACKENDS.items() if b.unsupported(ANY_CPU) != "needs a CUDA device"]
EVERY = pytest.mark.parametrize(
    ("name", "device"), [(n, "cpu") for n in ON_CPU] + [(n, "cuda") for n in BACKENDS]
)


@EVERY
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("band", BANDS)
def test_bands(name, device, dtype, band):
    run_on(name, device, dtype)
    for tq, tk in SIZES:
        q, k, v = data(tq, tk, dtype, device)
        agree(attend(q, k, v, BANDS[band], backend=name), q, k, v, BANDS[band])


@EVERY
@pytest.mark.parametrize("rows", [255, 257, 600, 1100])
def test_long_causal_squares(name, device, rows):
    """Across the sizes at which the CPU path starts to split squares."""
    run_on(name, device)
    if name == "triton" and device == "cpu" and rows > 600:
        pytest.skip("Triton's interpreter is slow, and 600 rows are several blocks of each kind")
    q, k, v = data(rows, rows, device=device, heads=(2, 1), batch=1)
    band = Band(0, 1, 0, 1)
    agree(attend(q, k, v, band, backend=name), q, k, v, band)


@EVERY
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (9, 3)])
@pytest.mark.parametrize("tq", [1, 5, 300])
def test_grouped_heads(name, device, heads, tq):
    run_on(name, device, torch.bfloat16)
    q, k, v = data(tq, 77, torch.bfloat16, device, heads)
    agree(attend(q, k, v, backend=name), q, k, v, None)


@EVERY
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("band", [None, Band(0, 1, 0, 1), Band(0, 1, 0, 2, 3)])
def test_nothing_to_attend(name, device, sizes, band):
    run_on(name, device)
    q, k, v = data(*sizes, device=device)
    out, lse = attend(q, k, v, band, backend=name)
    assert out.shape == q.shape and lse.shape == (B, H, sizes[0])
    assert (out == 0).all() and (lse == -torch.inf).all()


@EVERY
@pytest.mark.parametrize("layout", ["heads first", "every other token", "last dim apart", "fused"])
def test_strides(name, device, layout):
    run_on(name, device)
    dense = data(30, 30, device=device)
    q, k, v = (as_layout(x, layout) for x in dense)
    assert not k.is_contiguous() and torch.equal(k, dense[1])
    band = Band(0, 1, 0, 1)
    agree(attend(q, k, v, band, backend=name), q, k, v, band)


def as_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every other token":
        return x.repeat_interleave(2, 1)[:, ::2]
    if layout == "last dim apart":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return torch.cat([x, x, x], 2)[:, :, : x.shape[2]]  # a slice of fused projections


@EVERY
def test_softcap_and_scale(name, device):
    run_on(name, device, softcap=3.0)
    q, k, v = data(20, 20, device=device)
    options = {"softcap": 3.0, "scale": 0.7}
    band = Band(0, 1, 0, 1)
    agree(attend(q, k, v, band, backend=name, **options), q, k, v, band, **options)


@EVERY
def test_scale_alone(name, device):
    run_on(name, device)
    q, k, v = data(20, 20, device=device)
    agree(attend(q, k, v, scale=0.01, backend=name), q, k, v, None, scale=0.01)


@EVERY
@pytest.mark.parametrize("band", ["all", "offset", "window", "unequal"])
def test_into_adds_to_what_is_there(name, device, band):
    run_on(name, device)
    q, k, v = data(33, 60, device=device)
    head, tail = slice(0, 25), slice(25, 60)
    into = attend(q, k[:, head], v[:, head], backend=name)
    kept = [x.clone() for x in into]
    got = attend(q, k[:, tail], v[:, tail], BANDS[band], into=into, backend=name)
    assert got[0] is into[0] and got[1] is into[1]
    other = attend_reference(*(x.double() for x in (q, k[:, tail], v[:, tail])), BANDS[band])
    want = merge(*(x.double() for x in kept), *other)
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got[1].double(), want[1], rtol=2e-5, atol=2e-5)


@EVERY
def test_into_may_be_a_view(name, device):
    run_on(name, device)
    q, k, v = data(8, 9, device=device)
    out, lse = torch.zeros(B, 20, H, D, device=device), torch.full((B, H, 20), -torch.inf)
    lse = lse.to(device)
    attend(q, k, v, into=(out[:, 4:20:2], lse[:, :, 4:20:2]), backend=name)
    agree((out[:, 4:20:2], lse[:, :, 4:20:2]), q, k, v, None)
    assert (out[:, 5::2] == 0).all() and (lse[:, :, :4] == -torch.inf).all()


@EVERY
def test_inputs_are_left_alone(name, device):
    run_on(name, device, torch.bfloat16)
    tensors = data(40, 40, torch.bfloat16, device)
    before = [x.clone() for x in tensors]
    attend(*tensors, Band(0, 1, 0, 1, 7), backend=name)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q is \(2, 3, 4\): must be \(B, Tq, H, D\)"),
        ({"q": torch.zeros(B, 3, H, D, dtype=torch.int64)}, "q has dtype torch.int64"),
        ({"k": torch.zeros(B, 5, HKV, 8)}, r"k is \(2, 5, 2, 8\): must be \(2, Tk, Hkv, 16\)"),
        ({"k": torch.zeros(B, 5, 4, D), "v": torch.zeros(B, 5, 4, D)}, "k has 4 heads"),
        ({"v": torch.zeros(B, 4, HKV, D)}, r"v is \(2, 4, 2, 16\): must be \(2, 5, 2, 16\)"),
        ({"v": torch.zeros(B, 5, HKV, D).half()}, "v is torch.float16"),
        ({"softcap": -1.0}, "softcap=-1.0: must be positive"),
        ({"scale": float("nan")}, "scale=nan: must be finite"),
        ({"band": (0, 1)}, "band holds a tuple: must be a Band"),
        ({"into": (torch.zeros(1), torch.zeros(1))}, "into's out is"),
        ({"backend": "tiron"}, "kernel=tiron: there is no such back end; available: auto, torch"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    q, k, v = data(3, 5)
    with pytest.raises(ValueError, match=message):
        attend(**({"q_BTHD": q, "k_BTHD": k, "v_BTHD": v} | renamed(change)))


def renamed(change):
    return {f"{n}_BTHD" if n in ("q", "k", "v") else n: x for n, x in change.items()}
