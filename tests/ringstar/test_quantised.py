"""python -m pytest tests/ringstar/test_quantised.py

Weights that transformers' own quantisers keep small: the quantised layers stay what they are, and
the ring's answers are those of the same quantised model on one device, with eager attention.
"""

import functools
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
)
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForCausalLM, GgufConfig, TorchAoConfig

import ringstar
import ringstar.models.load
import ringstar.models.quantised as quantised_models
from ringstar import UserError
from ringstar.config import ModelConfig
from ringstar.models import find_model
from ringstar.models.geometry import run_once
from tests.support.models import random_ids, relative_error, tiny_folder
from tests.support.runtime import simulated

CPU = torch.device("cpu")
GREEDY, CHUNK, DOCUMENT, QUERY = 32, 11, 101, 7
KINDS = {
    "int8": Int8WeightOnlyConfig(version=2),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4),
    "float8": Float8WeightOnlyConfig(version=2),
    "int8 activations too": Int8DynamicActivationInt8WeightConfig(version=2),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder of a tiny model of a family, saved in quantised form."""

    @functools.cache
    def save(family, kind="int8", dtype=torch.float32):
        model = AutoModelForCausalLM.from_pretrained(
            tiny_folder(family), quantization_config=TorchAoConfig(KINDS[kind]), dtype=dtype
        )
        folder = tmp_path_factory.mktemp("quantised")
        model.save_pretrained(folder)
        return str(folder)

    return save


def changed(folder, to, **config):
    """A copy of a model folder with other entries in its config."""
    shutil.copytree(folder, to)
    path = Path(to, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(to)


def load(folder, dtype=torch.float32, **settings):
    return find_model(ModelConfig(path=folder)).load(
        ModelConfig(path=folder, **settings), dtype, CPU
    )


def runtime(folder, world, **settings):
    return simulated(folder, world, chunk_tokens=CHUNK, **settings)


@functools.cache
def plain(folder, attention="eager"):
    """Hugging Face on one device."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


@functools.cache
@torch.inference_mode()
def one_device(folder, attention="eager"):
    """Its first logits (vocab,) after document and question, and its greedy tokens."""
    prompt = torch.tensor([random_ids(DOCUMENT, seed=1) + random_ids(QUERY, seed=2)])
    out = plain(folder, attention).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=GREEDY,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.logits[0][0].float(), out.sequences[0, prompt.shape[1] :].tolist()


def error_of(ring, folder):
    """The ring's relative error, and whether its tokens are the same."""
    document = ring.encode(random_ids(DOCUMENT, seed=1))
    answer = ring.ask(document, random_ids(QUERY, seed=2), max_new_tokens=GREEDY)
    logits, ids = one_device(folder)
    return relative_error(answer.first_logits, logits), answer.ids == ids


def linears(model):
    """The linear layers inside the decoder's layers, by name."""
    layers = model.get_decoder().layers
    return {name: each for name, each in layers.named_modules() if isinstance(each, nn.Linear)}


def weights(model):
    """Of what kind each linear layer's weight is, by name."""
    return {name: type(each.weight) for name, each in linears(model).items()}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    ("family", "kind"),
    [(each, "int8") for each in ("llama", "qwen2", "mixtral")]
    + [(each, "int4") for each in ("llama", "gemma2")]
    + [("llama", "float8")],
)
def test_equal_to_the_quantised_model_on_one_device(stored, family, kind, world):
    folder = stored(family, kind)
    error, same = error_of(runtime(folder, world), folder)
    assert error <= 1e-5 and same
    # and the weights are not simply the ones that were quantised
    ids = torch.tensor([random_ids(DOCUMENT, seed=1) + random_ids(QUERY, seed=2)])
    with torch.inference_mode():
        before = plain(tiny_folder(family))(ids, logits_to_keep=1).logits[0, -1]
    assert relative_error(one_device(folder)[0], before) > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral"])
def test_the_quantised_layers_stay_what_they_are(stored, family):
    bound = load(stored(family))
    theirs = linears(plain(stored(family)))
    ours = linears(bound.model)
    assert ours.keys() == theirs.keys() and ours
    for name, layer in ours.items():
        assert isinstance(layer.weight, TorchAOBaseTensor), name
        assert layer.weight.qdata.dtype == torch.int8
        assert torch.equal(layer.weight.qdata, theirs[name].weight.qdata)
        assert type(layer) is type(theirs[name]) and "forward" not in vars(layer)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_users_own_quantised_model_is_attached_as_it_is(stored, kind, caplog):
    model = AutoModelForCausalLM.from_pretrained(stored("llama", kind))
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": None}
    prompt = torch.tensor([random_ids(DOCUMENT)])
    want, kinds = model.generate(prompt, **options), weights(model)
    with caplog.at_level(logging.INFO, "ringstar"):
        ringstar.attach(model, transport="threads", world_size=3, threads_per_rank=1)
    assert any("weights quantised by torchao" in line for line in caplog.messages)
    assert torch.equal(model.generate(prompt, **options), want)
    assert weights(model) == kinds
    ringstar.detach(model)
    assert torch.equal(model.generate(prompt, **options), want)


def test_one_that_rounds_activations_is_not(stored):
    model = AutoModelForCausalLM.from_pretrained(stored("llama", "int8 activations too"))
    with pytest.raises(UserError, match=r"model=LlamaForCausalLM: .*rounds activations too"):
        ringstar.attach(model, transport="threads", world_size=2)


def test_feed_forward_slices_change_nothing(stored):
    whole, sliced = (load(stored("llama"), ff_slice_tokens=each) for each in (4096, 3))
    hidden = torch.randn(1, 10, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        of_each = [each.model.get_decoder().layers[0].mlp(hidden) for each in (whole, sliced)]
    torch.testing.assert_close(*of_each)


def test_a_layer_has_as_many_flops_as_before(stored):
    assert load(stored("llama")).flops_per_token() == load(tiny_folder("llama")).flops_per_token()


def test_rank_0_says_how_they_are_quantised(stored, caplog):
    with caplog.at_level(logging.INFO, logger="ringstar"):
        runtime(stored("llama"), 2)
    line = "dtype float32 (as stored; weights quantised by torchao Int8WeightOnlyConfig)"
    assert caplog.messages.count(line) == 1


def test_float16_is_not_widened_where_scales_would_keep_it(stored):
    ring = runtime(stored("llama", "int4", torch.float16), 2)
    assert ring.dtype == torch.float16
    assert len(ring.ask(ring.encode(random_ids(30)), random_ids(3), max_new_tokens=2).ids) == 2


def test_a_dtype_that_they_cannot_run_in_is_refused_while_they_load(stored):
    folder = stored("llama", "int4")
    said = (
        r"^model\.dtype=bfloat16: weights quantised by torchao .* do not run in bfloat16 on cpu: "
    )
    with pytest.raises(UserError, match=said + r".*; allowed: auto$"):
        runtime(folder, 1, dtype="bfloat16")


def test_layers_that_do_not_run_here_are_named_while_they_load(stored, monkeypatch):
    def fails(bound):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(ringstar.models.load, "run_once", fails)
    with pytest.raises(UserError, match=r"^model\.path=.* on cpu: RuntimeError: no kernel$"):
        runtime(stored("llama"), 1)


def test_layers_are_called_once_before_ranks_share_them(stored, monkeypatch):
    """Some repack their weights at their first call."""
    called = []
    forward = nn.Linear.forward
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, x: (called.append(self), forward(self, x))[1]
    )
    bound = load(stored("llama"))
    assert {id(each) for each in linears(bound.model).values()} <= {id(each) for each in called}
    called.clear()
    load(tiny_folder("llama"))
    assert not called


def test_one_token_sees_itself(stored):
    bound, seen = load(stored("llama")), []
    bound.model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out[0, -1]))
    run_once(bound)
    with torch.inference_mode():
        want = plain(stored("llama"))(torch.tensor([[0]])).logits[0, -1]
    assert relative_error(seen[0], want) < 1e-5


def test_activations_that_are_rounded_are_refused(stored):
    """There is nothing to be equal to: on one device two ways to compute attention differ so."""
    folder = stored("llama", "int8 activations too")
    said = r"^model\.path=.*Int8DynamicActivationInt8WeightConfig, which rounds activations too"
    with pytest.raises(UserError, match=said):
        find_model(ModelConfig(path=folder))
    differs = {}
    for kind in ("int8", "int8 activations too"):
        eager, sdpa = (one_device(stored("llama", kind), each)[0] for each in ("eager", "sdpa"))
        differs[kind] = relative_error(sdpa, eager)
    assert differs["int8"] < 1e-5 and differs["int8 activations too"] > 1e-3


def test_weights_that_transformers_widens_are_said_to_be(tmp_path, monkeypatch, caplog):
    """fp8 rounds activations too, but not where there is no GPU: there it is widened."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = fp8(tmp_path / "m")
    with caplog.at_level(logging.INFO, logger="ringstar"):
        ring = runtime(folder, 2)
    assert any("weights quantised by fp8, which transformers widens" in m for m in caplog.messages)
    error, same = error_of(ring, folder)
    assert error <= 1e-5 and same


def fp8(to):
    """A tiny llama with float8 weights and one scale for each."""
    method = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    folder = changed(tiny_folder("llama"), to, quantization_config=method)
    path = Path(folder, "model.safetensors")
    tensors, metadata = load_file(path), header(path)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = tensors[name].abs().max() / torch.finfo(torch.float8_e4m3fn).max
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(tensors, path, metadata)
    return folder


@pytest.mark.parametrize("name", ["bitnet", "gemma"])
def test_other_methods_that_round_activations(tmp_path, name):
    method = {"quant_method": name}
    folder = changed(tiny_folder("llama"), tmp_path / "m", quantization_config=method)
    with pytest.raises(UserError, match=f"quantised by {name}, which rounds activations too"):
        find_model(ModelConfig(path=folder))


def test_what_stands_behind_another_config_is_seen(tmp_path):
    """SmoothQuant's name says nothing of what layers become."""
    hidden = SimpleNamespace(base_config=KINDS["int8 activations too"])
    settings = SimpleNamespace(quant_method="torchao", quant_type=hidden)
    assert quantised_models._torchao_rounds(settings)
    assert not quantised_models._torchao_rounds(
        SimpleNamespace(quant_type=SimpleNamespace(base_config=KINDS["int8"]))
    )


def test_weights_that_transformers_made_of_a_gguf_file_are_ordinary_ones():
    """It leaves word of the file in their config."""
    config = SimpleNamespace(quantization_config=GgufConfig(gguf_file="model.gguf"))
    quantised_models.check_quantised("model", config)


def test_a_method_that_nobody_looked_at_is_refused(stored, monkeypatch):
    monkeypatch.delitem(quantised_models._ROUNDS_ACTIVATIONS, "torchao")
    with pytest.raises(UserError, match="torchao, which was not shown to round weights alone"):
        find_model(ModelConfig(path=stored("llama")))


def test_a_missing_package_is_named_before_weights_load(stored, tmp_path, monkeypatch):
    method = {"quant_method": "vptq"}
    folder = changed(tiny_folder("llama"), tmp_path / "m", quantization_config=method)
    with pytest.raises(UserError, match=r"quantised by vptq cannot run here: .*`pip install -U v"):
        find_model(ModelConfig(path=folder))
    monkeypatch.setitem(sys.modules, "torchao.core.config", None)
    said = r"^model\.path=.*: weights quantised by torchao need torchao: pip install torchao$"
    with pytest.raises(UserError, match=said):
        find_model(ModelConfig(path=stored("llama")))


@pytest.mark.parametrize("name", ["fbgemm_fp8", "spqr"])
def test_a_missing_gpu_is_named_before_weights_load(tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    method = {"quant_method": name}
    folder = changed(tiny_folder("llama"), tmp_path / "m", quantization_config=method)
    with pytest.raises(UserError, match=rf"^model\.path=.*by {name} cannot run here: .*GPU"):
        find_model(ModelConfig(path=folder))


@pytest.mark.parametrize("method", [{"quant_method": "zzz"}, {"bits": 4}])
def test_an_unknown_method_is_refused(tmp_path, method):
    folder = changed(tiny_folder("llama"), tmp_path / "m", quantization_config=method)
    with pytest.raises(UserError, match=r"^model\.path=.*: weights quantised by "):
        find_model(ModelConfig(path=folder))


@pytest.mark.parametrize("spoil", ["missing", "spare"])
def test_tensors_are_still_counted(stored, tmp_path, spoil):
    folder = changed(stored("llama"), tmp_path / "m")
    path = Path(folder, "model.safetensors")
    tensors, metadata = load_file(path), header(path)
    if spoil == "missing":
        del tensors["model.norm.weight"]
    else:
        tensors["model.other.weight"] = torch.zeros(2)
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=r"weights (lack|do not fit the config).* 1 tensors, model"):
        load(folder)


def header(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size])["__metadata__"]


def test_importing_says_nothing():
    """torchao is imported wherever it is installed, and warns of what a CPU lacks."""
    code = "from ringstar.models.modeling import auto_model; auto_model()"
    code += "; import sys; assert 'torchao' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
