# python -m pytest tests/localflash/test_triton_compiled.py -q
"""Our kernels compiled for cards that are not here: what the machine code uses, and how much."""

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this system")

from localflash import Band, DenseKV, PagedKV, triton_backend, triton_decode, triton_encode
from localflash.triton_merge import merge_partials
from localflash.triton_tools import interpreting
from tests.support.compiled import compiled, recorded_launches

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreting(), reason="the interpreter compiles nothing"),
]
CAPABILITIES = [80, 90, 100]
# bytes of shared memory that a block may have; 8.6 and 8.9 run what is compiled for 8.0
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# what the assembler may put aside outside of a loop, at its own choice of registers
FEW_BYTES = 16
H, HKV = 32, 8
BANDS = {"full": None, "causal": Band(0, 1, 0, 1), "window": Band(0, 1, 0, 1, 1000)}


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def made(monkeypatch, capability, work):
    """What `work` launches on such a device, compiled; it fits, and spills nothing."""
    modules = (triton_backend, triton_decode, triton_encode)
    with recorded_launches(monkeypatch, *modules, capability=divmod(capability, 10)) as launches:
        work()
    assert launches
    results = [compiled(launch, capability) for launch in launches]
    for result in results:
        assert result.shared <= SHARED[capability], result.name
        assert result.spilled <= FEW_BYTES, (result.name, result.registers)
    return results


def encode(dim, dtype, band, into=True, rows=4096, keys=4224, softcap=None):
    q, k, v = empty(1, rows, H, dim, dtype=dtype), *(empty(1, keys, HKV, dim, dtype=dtype),) * 2
    out = empty(1, rows, H, dim, dtype=torch.float32), empty(1, H, rows, dtype=torch.float32)
    triton_backend.attend(q, k, v, band, 0.1, softcap, out if into else None)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_encode(monkeypatch, capability, band, dim):
    dtype = torch.bfloat16
    (result,) = made(monkeypatch, capability, lambda: encode(dim, dtype, BANDS[band]))
    assert result.bulk_copies == (capability >= 90)
    assert result.warp_group_products == (capability == 90)
    assert result.tensor_memory_products == (capability == 100)
    # the pass that makes warps specialised takes the loop of full blocks only
    alone = capability == 90 and band == "full" and dim <= 128
    assert result.name == ("_full" if alone else "_banded")
    assert result.specialised == alone


def test_keys_after_the_last_whole_block_are_a_second_launch(monkeypatch):
    first, rest = made(monkeypatch, 90, lambda: encode(128, torch.bfloat16, None, keys=4100))
    assert (first.name, rest.name) == ("_full", "_banded")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("dim", "dtype", "options"),
    [
        (80, torch.float16, {"into": False}),
        (96, torch.bfloat16, {"softcap": 30.0}),
        (64, torch.float32, {}),
        (128, torch.float32, {"softcap": 30.0}),
        (256, torch.float32, {"into": False}),
        (128, torch.bfloat16, {"rows": 40}),
    ],
)
def test_encode_of_other_kinds(monkeypatch, capability, dim, dtype, options):
    made(monkeypatch, capability, lambda: encode(dim, dtype, BANDS["causal"], **options))


def paged(page, dtype=torch.bfloat16, dim=128):
    pools = (empty(1000, page, HKV, dim, dtype=dtype),) * 2
    table = empty(2, 500, dtype=torch.int32)
    scale = empty(HKV, dtype=torch.float32) if dtype.itemsize == 1 else None
    return PagedKV(*pools, table, empty(2, dtype=torch.int32), scale, scale)


def dense(dtype=torch.bfloat16, dim=128):
    return DenseKV(*(empty(2, 1 << 17, HKV, dim, dtype=dtype),) * 2)


VIEWS = {
    "dense": dense,
    "dense 256": lambda: dense(dim=256),
    "dense float32": lambda: dense(torch.float32),
    "pages of 64": lambda: paged(64),
    "pages of 24": lambda: paged(24),
    "int8": lambda: paged(64, torch.int8),
    "fp8": lambda: paged(64, torch.float8_e4m3fn),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("view", VIEWS)
def test_decode(monkeypatch, capability, view):
    if view == "fp8" and capability == 80:
        pytest.skip("there is no such fp8 before 8.9")
    kv = VIEWS[view]()
    dim = (kv.k_BTHD if isinstance(kv, DenseKV) else kv.k_pool).shape[3]
    dtype = torch.float32 if view == "dense float32" else torch.bfloat16
    q = empty(2, 4, H, dim, dtype=dtype)

    def work():
        triton_backend.attend_cached(q, kv, Band(0, 1, 0, 1, 99), 0.1, None, None)
        triton_backend.attend_cached(q, kv, None, 0.1, None, None)

    names = [result.name for result in made(monkeypatch, capability, work)]
    assert names == ["_decode", "_merge"] * 2  # the keys are split


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_unified_max(monkeypatch, capability):
    q, phi_H = empty(2, 1, H, 128), empty(H, dtype=torch.float32)

    def work():
        triton_decode.decode(q, paged(64), None, 0.1, None, None, phi_H=phi_H)

    names = [result.name for result in made(monkeypatch, capability, work)]
    assert names == ["_decode", "_add", "_decode"]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("into", [False, True])
def test_merge(monkeypatch, capability, into):
    parts = empty(8, 1, 4096, H, 128), empty(8, 1, H, 4096, dtype=torch.float32)
    out = empty(1, 4096, H, 128, dtype=torch.float32), empty(1, H, 4096, dtype=torch.float32)
    made(monkeypatch, capability, lambda: merge_partials(*parts, *out, into=into))
