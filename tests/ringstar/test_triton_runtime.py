"""TRITON_INTERPRET=1 python -m pytest tests/ringstar/test_triton_runtime.py

Whole models on our own kernels, in Triton's interpreter: one rank, and two processes in a ring.
On a GPU, tests/gpu runs them with every other back end.
"""

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this system")

from localflash import triton_tools
from ringstar import LongContext, UserError
from ringstar.config import Config, EncodeConfig, KernelConfig, ModelConfig, RingConfig, StarConfig
from ringstar.unified import UnifiedMax
from seqpar.process import ProcessWorld
from tests.support.models import expected, random_ids, relative_error, tiny_folder
from tests.support.ranks import in_processes

pytestmark = pytest.mark.skipif(not triton_tools.interpreting(), reason="needs TRITON_INTERPRET=1")
BOUND, GREEDY = 1e-5, 6
IDS, ASKED = random_ids(61, seed=1), random_ids(9, seed=2)


def settings(folder, strategy=None, unified_max=False):
    return Config(
        model=ModelConfig(path=folder, dtype="float32"),
        strategy=strategy or RingConfig(),
        encode=EncodeConfig(13),
        kernel=KernelConfig("triton", unified_max),
    )


def answer(config, ranks=None):
    runtime = LongContext.from_config(config, ranks)
    assert runtime.kernel == "triton"
    given = runtime.ask(runtime.encode(IDS), ASKED, max_new_tokens=GREEDY)
    return given.first_logits.tolist(), given.ids


def check(folder, given):
    want = expected(folder, IDS + ASKED, GREEDY)
    assert relative_error(torch.tensor(given[0]), want.logits64_V) <= BOUND
    assert given[1] == want.ids


@pytest.mark.parametrize("unified_max", [False, True])
@pytest.mark.parametrize(
    "folder", [("llama", {}), ("mistral", {"sliding_window": 7})], ids=lambda f: f[0]
)
def test_one_rank(folder, unified_max):
    path = tiny_folder(folder[0], **folder[1])
    check(path, answer(settings(path, unified_max=unified_max)))


def test_star_in_one_block():
    path = tiny_folder("llama")
    check(path, answer(settings(path, StarConfig(block_size=len(IDS)))))


def rank_answer(transport, folder):
    return answer(settings(folder, unified_max=True), ProcessWorld(transport))


def test_two_processes_in_a_ring():
    path = tiny_folder("llama")
    for given in in_processes(2, rank_answer, path):
        check(path, given)


def test_the_shift_comes_from_the_last_step(monkeypatch):
    """The second step and those after it use a shift, and it is near what rows have."""
    seen, of = [], UnifiedMax.of

    def spy(self, layer, *args):
        seen.append(self._phi_of_layer.get(layer))
        return of(self, layer, *args)

    monkeypatch.setattr(UnifiedMax, "of", spy)
    answer(settings(tiny_folder("llama"), unified_max=True))
    assert [phi is None for phi in seen] == [True] * 2 + [False] * (len(seen) - 2)
    assert len(seen) == 2 * GREEDY and all(phi.isfinite().all() for phi in seen[2:])


def test_a_kernel_without_unified_max_is_refused():
    config = settings(tiny_folder("llama"), unified_max=True)
    config.kernel.name = "torch"
    with pytest.raises(UserError, match=r"kernel\.unified_max=true: kernel torch has none.*triton"):
        LongContext.from_config(config)
