"""python -m pytest tests/ringstar/test_rope.py

Rotary angles in float64: the model's own frequencies, and what they save far into a text.  Scaled
rope: what Hugging Face computes with the same parameters in its config.
"""

import functools
import json
import logging
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ringstar import Config, LongContext, UserError
from ringstar.config import ModelConfig, RopeConfig, check
from ringstar.models import TINY, find_model
from ringstar.models.frequencies import Rope
from ringstar.models.load import FLOAT32_POSITIONS, choose_rope_precision
from ringstar.models.rotary import Rotary
from tests.support.models import (
    DYNAMIC,
    LONGROPE,
    eager,
    expected,
    random_ids,
    relative_error,
    tiny_folder,
)
from tests.support.runtime import simulated

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LONG = {"head_dim": 128, "max_position_embeddings": 131072}


def llama(**rope):
    return "llama", {"rope_parameters": rope, **LONG}


# what its config has beside the sizes: each family as it is, and each type of rope at real sizes
CASES = {family: (family, {}) for family in TINY} | {
    "llama theta": llama(rope_type="default", rope_theta=1e8),
    "llama head 96": ("llama", {"rope_parameters": {**PLAIN, "rope_theta": 1e6}, "head_dim": 96}),
    "llama llama3": llama(**LLAMA3),
    "llama linear": llama(**LINEAR),
    "llama dynamic": ("llama", DYNAMIC),
    "llama dynamic, real size": llama(rope_type="dynamic", rope_theta=1e4, factor=2.0),
    "llama yarn": llama(**YARN),
    "llama yarn, all set": llama(
        **YARN | {"beta_fast": 20, "beta_slow": 2, "attention_factor": 1.3, "truncate": False}
    ),
    "llama yarn, mscale": llama(**YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7}),
    "phi3 partial": ("phi3", {"partial_rotary_factor": 0.5, "head_dim": 32}),
    "phi3 longrope": ("phi3", LONGROPE),
    "gpt_oss default": ("gpt_oss", {"rope_parameters": PLAIN}),
    "cohere2 linear": ("cohere2", {"rope_parameters": LINEAR}),
    "gemma3_text kinds": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}},
    ),
    "olmo3 kinds": (
        "olmo3",
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}},
    ),
}


@functools.cache
def decoder(name):
    family, changes = CASES[name]
    # weights have no part in this
    config = AutoConfig.for_model(
        family,
        **{
            "hidden_size": 64,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 97,
            "pad_token_id": None,
            "max_position_embeddings": 8192,
            **TINY[family],
            **changes,
        },
    )
    return AutoModelForCausalLM.from_config(config).get_decoder()


def rotary(name, precision):
    model = decoder(name)
    return Rotary(model.rotary_emb, model.config, precision)


def own_frequencies(module, kind, length):
    """What the module holds once it has seen a text of this length, and its factor."""
    prefix = "" if kind is None else f"{kind}_"
    of_kind = {} if kind is None else {"layer_type": kind}
    module(torch.empty(0), torch.tensor([[length - 1]]), **of_kind)
    return getattr(module, f"{prefix}inv_freq"), getattr(module, f"{prefix}attention_scaling")


@pytest.mark.parametrize("name", CASES)
def test_frequencies_in_float64_are_the_modules(name):
    model = decoder(name)
    for kind in rotary(name, "float32").kinds:
        rope = Rope.of(model.config, kind)
        for length in rope.lengths:
            own, scale = own_frequencies(model.rotary_emb, kind, length)
            ours = rope.frequencies(len(own), length)
            assert ours.dtype == torch.float64
            assert float(((ours - own) / ours).abs().max()) <= 1e-6
            assert rope.scale() == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_plans_have_the_form_of_the_module(name, dtype):
    """Shape, dtype, columns: at small positions both precisions are the same."""
    like, positions = torch.empty(0, dtype=dtype), torch.tensor([0, 1, 7, 40])
    for length in (41, 300, 20000):
        theirs = rotary(name, "float32").plan(positions, like, length)
        ours = rotary(name, "float64").plan(positions, like, length)
        assert ours.keys() == theirs.keys()
        for kind, pair in ours.items():
            for mine, own in zip(pair, theirs[kind], strict=True):
                assert mine.shape == own.shape and mine.dtype == own.dtype
                rounding = 1e-4 if own.dtype == torch.float32 else 2**-7
                assert float((mine.double() - own.double()).abs().max()) <= rounding


def test_lengths_differ_as_with_the_modules_own():
    for name, lengths in (("llama dynamic", (60, 90)), ("phi3 longrope", (80, 81))):
        for precision in ("float32", "float64"):
            assert not rotary(name, precision).same(*lengths)
            assert rotary(name, precision).same(30, 40)


def wrong_frequency(module):
    module.inv_freq[3] *= 1 + 1e-5


def wrong_scale(module):
    module.attention_scaling *= 1.001


@pytest.mark.parametrize("change", [wrong_frequency, wrong_scale])
def test_a_module_of_other_frequencies_is_refused(change):
    config = AutoConfig.from_pretrained(tiny_folder("llama"))
    model = AutoModelForCausalLM.from_config(config).get_decoder()
    change(model.rotary_emb)
    with pytest.raises(UserError, match=r"rope\.precision=float64.*rope default.*allowed: float32"):
        Rotary(model.rotary_emb, config, "float64")
    assert Rotary(model.rotary_emb, config, "float32").kinds == (None,)


def test_a_kind_of_layers_with_other_frequencies_is_refused_by_name():
    config = AutoConfig.from_pretrained(tiny_folder("olmo3"))
    model = AutoModelForCausalLM.from_config(config).get_decoder()
    model.rotary_emb.sliding_attention_inv_freq[1] *= 1.01
    with pytest.raises(UserError, match=r"in layers of kind sliding_attention.*differ by 1\.0e-02"):
        Rotary(model.rotary_emb, config, "float64")


# --- far into a text

FAR = 200_000
THETA = 500_000.0


class Angles64(torch.nn.Module):
    """Written by itself: cos and sin of a plain rope in float64, head size 16."""

    def forward(self, _, position_ids):
        rows = [
            [THETA ** (-2 * i / 16) * p for i in range(8)] * 2 for p in position_ids[0].tolist()
        ]
        angles = torch.tensor([rows], dtype=torch.float64)
        return angles.cos(), angles.sin()


class Planned(torch.nn.Module):
    """What `Rotary` plans, where the model expects its own module."""

    def __init__(self, plans):
        super().__init__()
        self.plans = plans

    def forward(self, x, position_ids):
        return self.plans.plan(position_ids[0], x, FAR)[None]


@torch.inference_mode()
def logits(model, module, positions, tokens=None):
    """Of all tokens, with positions that are given and angles from `module`."""
    own, model.model.rotary_emb = model.model.rotary_emb, module
    ids = torch.tensor([tokens or random_ids(len(positions))])
    try:
        return model(
            ids,
            position_ids=torch.tensor([list(positions)]),
            attention_mask=torch.ones_like(ids),  # else a gap of positions begins another text
            use_cache=False,
        ).logits[0]
    finally:
        model.model.rotary_emb = own


def test_float64_saves_what_float32_loses_at_200_000_positions():
    rope = {"rope_type": "default", "rope_theta": THETA}
    folder = tiny_folder("llama", rope_parameters=rope, max_position_embeddings=2 * FAR)
    model = eager(folder)
    positions = [*range(16), *range(FAR // 2, FAR // 2 + 16), *range(FAR - 16, FAR)]
    want = logits(eager(folder, torch.float64), Angles64(), positions)
    errors = {
        precision: relative_error(
            logits(
                model, Planned(Rotary(model.model.rotary_emb, model.config, precision)), positions
            ),
            want,
        )
        for precision in ("float32", "float64")
    }
    assert errors["float64"] <= 1e-5
    assert errors["float32"] >= 100 * errors["float64"] and errors["float32"] >= 5e-4
    own = logits(model, model.model.rotary_emb, positions)  # as Hugging Face has it
    assert relative_error(own, want) == pytest.approx(errors["float32"], rel=1e-3)


@torch.inference_mode()
def test_a_document_of_200_000_tokens_on_three_ranks():
    """Two layers with a window see no farther back than the tokens that the reference is given."""
    window, tokens = 32, random_ids(FAR)
    rope = {"rope_type": "default", "rope_theta": THETA}
    sizes = {"sliding_window": window, "max_position_embeddings": 2 * FAR}
    folder = tiny_folder("mistral", rope_parameters=rope, **sizes)
    last = range(FAR - 2 * window, FAR)
    seen = [tokens[position] for position in last]
    want = logits(eager(folder, torch.float64), Angles64(), last, seen)[-1]
    errors = {}
    for precision in ("float64", "float32"):
        ring = runtime(folder, 3, rope=RopeConfig(precision))
        answer = ring.ask(ring.encode(tokens[:-8]), tokens[-8:], max_new_tokens=1)
        errors[precision] = relative_error(answer.first_logits, want)
    assert errors["float64"] <= 1e-5
    assert errors["float32"] >= 100 * errors["float64"]


# --- which precision


def precision_of(longest, asked="auto", beyond=False):
    folder = tiny_folder("llama", max_position_embeddings=longest)
    files = find_model(ModelConfig(path=folder))
    return choose_rope_precision(RopeConfig(asked), files, beyond_limit=beyond)


def test_precision_is_chosen_by_the_longest_text():
    assert precision_of(FLOAT32_POSITIONS) == (
        "float32",
        "as the model's own, for up to 131,072 positions",
    )
    assert precision_of(FLOAT32_POSITIONS + 1)[0] == "float64"
    assert precision_of(8192, beyond=True)[0] == "float64"
    assert precision_of(10**6, "float32", beyond=True) == ("float32", "as asked")
    assert precision_of(8192, "float64") == ("float64", "as asked")
    scaled = find_model(
        ModelConfig(path=tiny_folder("llama", max_position_embeddings=2**16)),
        RopeConfig(scaling="yarn", factor=3.0),
    )
    assert choose_rope_precision(RopeConfig(), scaled, beyond_limit=False)[0] == "float64"


def runtime(folder, world=2, **options):
    return simulated(folder, world, **options)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("family", ["llama", "cohere2", "gemma3_text", "gpt_oss", "olmo3"])
def test_answers_are_those_of_one_device_in_either_precision(family, precision, caplog):
    folder, ids, question = tiny_folder(family), random_ids(50, seed=1), random_ids(4, seed=2)
    with caplog.at_level(logging.INFO, "ringstar"):
        ring = runtime(folder, 3, rope=RopeConfig(precision))
    assert f"rope in {precision} (as asked)" in caplog.messages
    # one model is behind the engines of all ranks
    assert ring.group.engines[0].model.rotary.precision == precision
    answer = ring.ask(ring.encode(ids), question, max_new_tokens=8)
    want = expected(folder, ids + question, 8)
    assert relative_error(answer.first_logits, want.logits64_V) <= 1e-5
    assert answer.ids == want.ids


# --- longer texts, as another model

SHORT = 64
SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SHORT},
}


def with_rope(folder, tmp_path, full_attention=None, **rope):
    """A copy of the model whose own config says so, here or of one kind of layers."""
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    config = json.loads((copied / "config.json").read_text())
    target = config["rope_parameters"]
    (target[full_attention] if full_attention else target).update(rope)
    (copied / "config.json").write_text(json.dumps(config))
    return str(copied)


@pytest.mark.parametrize("scaling", SCALED)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_scaled_rope_is_hugging_faces(family, scaling, tmp_path, caplog):
    """Past the stored limit of 64 positions, and within it."""
    folder = tiny_folder(family, max_position_embeddings=SHORT)
    kind = "full_attention" if family == "gemma3_text" else None
    copied = with_rope(folder, tmp_path, kind, **SCALED[scaling])
    with caplog.at_level(logging.INFO, "ringstar"):
        ring = runtime(folder, rope=RopeConfig(scaling=scaling, factor=4))
    said = [line for line in caplog.messages if "changes the model" in line]
    assert said == [
        f"rope.scaling={scaling} by 4 changes the model: it no longer computes what its config"
        " says, and takes up to 256 positions"
    ]
    for document in (30, 150):
        ids, question = random_ids(document, seed=1), random_ids(5, seed=2)
        encoded = ring.encode(ids, length=document + 5)
        answer = ring.ask(encoded, question, max_new_tokens=16)
        want = expected(copied, ids + question, 16)
        assert relative_error(answer.first_logits, want.logits64_V) <= 1e-5
        assert answer.ids == want.ids
        if document == 150 or scaling != "dynamic":  # which leaves short texts as they are
            stored = expected(folder, ids + question, 1)
            assert relative_error(want.logits64_V, stored.logits64_V) > 1e-3
    with pytest.raises(UserError, match="the model's limit is 256"):
        ring.encode(random_ids(257))


def test_only_layers_that_see_all_are_scaled():
    found = find_model(
        ModelConfig(path=tiny_folder("gemma3_text")), RopeConfig(scaling="yarn", factor=2.0)
    ).config.rope_parameters
    assert found["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert found["full_attention"] == {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (RopeConfig("single"), r"rope\.precision=single: allowed: auto, float32, float64"),
        (RopeConfig(scaling="ntk"), r"rope\.scaling=ntk: allowed: none, linear, dynamic, yarn"),
        (RopeConfig(scaling="yarn"), r"rope\.factor: rope\.scaling=yarn needs it; allowed: a num"),
        (RopeConfig(factor=2.0), r"rope\.factor=2\.0: allowed: only with rope\.scaling=linear, d"),
        *(
            (RopeConfig(scaling="yarn", factor=factor), r"rope\.factor=\S+: allowed: a number abov")
            for factor in (1.0, 0.5, -2.0, float("inf"), float("nan"))
        ),
    ],
)
def test_wrong_settings_are_refused_by_name(rope, message):
    with pytest.raises(UserError, match=message):
        check(Config(rope=rope))


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("llama", {"rope_parameters": LLAMA3}, r"already scaled \(llama3\); allowed: none"),
        ("llama", DYNAMIC, r"already scaled \(dynamic\)"),
        ("gpt_oss", {}, r"already scaled \(yarn\)"),
        ("olmo3", CASES["olmo3 kinds"][1], r"already scaled \(yarn\)"),
        ("phi3", {}, r"phi3 takes no such rope: .*got linear"),
    ],
)
def test_models_that_cannot_be_scaled_are_refused_before_weights_load(family, changes, why):
    folder = tiny_folder(family, **{"max_position_embeddings": 16384, **changes})
    with pytest.raises(UserError, match=rf"rope\.scaling=linear: .*{why}"):
        find_model(ModelConfig(path=folder), RopeConfig(scaling="linear", factor=2.0))


def test_files_with_another_rope_are_refused():
    config = Config(
        model=ModelConfig(path=tiny_folder("llama")), rope=RopeConfig(scaling="yarn", factor=2.0)
    )
    ranks = runtime(tiny_folder("llama")).ranks
    with pytest.raises(UserError, match=r"rope\.scaling=yarn: these model files have another"):
        LongContext(config, find_model(config.model), ranks, "as given")
