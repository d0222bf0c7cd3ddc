"""python -m pytest tests/ringstar/test_attach.py

A user's own model and `generate`, over ranks: equal to one device, or refused by name.
"""

import copy
import functools
import logging
import threading

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import ringstar
from ringstar import CacheConfig, LongContext, ShardedPast, UserError
from ringstar.config import RingConfig, StarConfig
from ringstar.models import generating
from seqpar import token_count
from seqpar.process import ProcessWorld
from tests.support.chat import chat_folder, tiny_tokenizer
from tests.support.commands import TORCHRUN, python
from tests.support.models import DYNAMIC, LONGROPE, over_bound, random_ids, tiny_folder
from tests.support.models import expected as one_device
from tests.support.ranks import in_processes

FAMILIES = ("llama", "gemma2", "gpt_oss", "phi3")
LENGTHS = (1, 3, 101)  # one token, fewer than ranks, across windows of 21
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": None}


@functools.cache
def loaded(folder):
    """As users load it; tests attach and detach it."""
    return AutoModelForCausalLM.from_pretrained(folder)


@functools.cache
def plain(folder, ids, seed=None, **options):
    """What one device's `generate()` gives, sampled if there is a seed."""
    torch.manual_seed(seed or 0)
    prompt = torch.tensor([ids])
    return loaded(folder).generate(prompt, **{**GREEDY, "do_sample": seed is not None, **options})


@pytest.fixture
def attached():
    """`attach` to simulated ranks; what is still attached is detached."""
    models = []

    def attach(folder, world=2, **options):
        model = loaded(folder)
        models.append(model)
        options.setdefault("threads_per_rank", 1)
        ringstar.attach(model, transport="threads", world_size=world, **options)
        return model

    yield attach
    for model in models:
        if hasattr(model, "ringstar"):
            ringstar.detach(model)


def prompt(tokens, seed=0):
    return torch.tensor([random_ids(tokens, seed)])


# --- the same as one device


def test_what_found_no_room_leaves_a_past_that_can_go_on(attached):
    folder = tiny_folder("llama")
    token = 2 * 2 * 2 * 16 * 4
    model = attached(folder, 2, cache=CacheConfig(max_bytes=600 * token, page_tokens=4))
    past = ShardedPast()
    for tokens in (0, 60):
        for _ in range(2):
            with pytest.raises(UserError, match=r"cache\.max_bytes"):
                model(prompt(3000), past_key_values=past, use_cache=True, logits_to_keep=1)
            assert past.get_seq_length() == tokens
        if not tokens:
            model(prompt(60), past_key_values=past, use_cache=True, logits_to_keep=1)
    more = prompt(7, seed=1)
    got = model(more, past_key_values=past, use_cache=True, logits_to_keep=1).logits
    ringstar.detach(model)
    want = loaded(folder)(torch.cat([prompt(60), more], dim=1), logits_to_keep=1).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_returns_what_one_device_returns(family, world, attached):
    folder = tiny_folder(family)
    wanted = [plain(folder, tuple(random_ids(n)), max_new_tokens=64) for n in LENGTHS]
    model = attached(folder, world)
    for tokens, want in zip(LENGTHS, wanted, strict=True):
        got = model.generate(prompt(tokens), max_new_tokens=64, **GREEDY)
        assert torch.equal(got, want), tokens


@pytest.mark.parametrize("options", [{"layout": "striped"}, {"chunk_tokens": 11}])
@pytest.mark.parametrize("family", FAMILIES)
def test_so_it_does_in_layouts_and_chunks(family, options, attached):
    folder = tiny_folder(family)
    want = plain(folder, tuple(random_ids(101)), max_new_tokens=64)
    assert torch.equal(
        attached(folder, 3, **options).generate(prompt(101), max_new_tokens=64, **GREEDY), want
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_are_exact(family, attached):
    folder, ids = tiny_folder(family), random_ids(101)
    got = attached(folder, 3).generate(
        torch.tensor([ids]),
        max_new_tokens=3,
        output_logits=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    assert over_bound(got.logits[0][0], one_device(folder, ids, 3)) <= 1
    assert got.logits[0].dtype == torch.float32 and got.logits[0].shape == (1, 97)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_the_same_with_a_seed(family, attached):
    folder, ids = tiny_folder(family), tuple(random_ids(40))
    options = {"max_new_tokens": 32, "temperature": 1.3, "top_k": 0, "top_p": 0.95}
    wanted = [plain(folder, ids, seed, **options) for seed in (1, 2)]
    assert not torch.equal(*wanted)
    model = attached(folder, 3)
    for seed, want in zip((1, 2), wanted, strict=True):
        torch.manual_seed(seed)
        got = model.generate(torch.tensor([ids]), **{**GREEDY, **options, "do_sample": True})
        assert torch.equal(got, want)


def test_a_generation_config_and_several_samples_of_one_prompt(attached):
    folder, ids = tiny_folder("llama"), prompt(30)
    settings = GenerationConfig(do_sample=True, num_return_sequences=3, max_new_tokens=8)
    torch.manual_seed(3)
    want = loaded(folder).generate(ids, generation_config=settings)
    model = attached(folder)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, generation_config=settings), want)


@pytest.mark.parametrize("changes", [DYNAMIC, {"rope_parameters": DYNAMIC["rope_parameters"]}])
def test_rope_that_grows_with_the_text(changes, attached):
    """Past 64 positions; also where the model has seen a longer text before."""
    folder = tiny_folder("llama", **changes)
    for tokens in (30, 61, 90):
        fresh = AutoModelForCausalLM.from_pretrained(folder)
        want = fresh.generate(prompt(tokens), max_new_tokens=12, **GREEDY)
        model = attached(folder, 3)
        assert torch.equal(model.generate(prompt(tokens), max_new_tokens=12, **GREEDY), want)
        ringstar.detach(model)
        model.generate(prompt(200), max_new_tokens=1, **GREEDY)


def test_rope_that_jumps_is_crossed_as_on_one_device(attached):
    """phi3 past 80 positions: Hugging Face drops the KV, and all is encoded again."""
    folder = tiny_folder("phi3", **LONGROPE)
    want = plain(folder, tuple(random_ids(70)), max_new_tokens=20)
    assert torch.equal(attached(folder, 2).generate(prompt(70), max_new_tokens=20, **GREEDY), want)


def test_without_a_cache_everything_is_read_again(attached):
    folder = tiny_folder("gemma2")
    want = plain(folder, tuple(random_ids(40)), max_new_tokens=6)
    model = attached(folder, 2)
    assert torch.equal(
        model.generate(prompt(40), max_new_tokens=6, use_cache=False, **GREEDY), want
    )


def test_star_answers_as_the_runtime_does(attached):
    """The last `query_tokens` are the question."""
    folder, ids, strategy = tiny_folder("llama"), random_ids(120), StarConfig(block_size=30)
    runtime = LongContext.from_pretrained(
        folder, strategy=strategy, transport="threads", world_size=2, threads_per_rank=1
    )
    answer = runtime.ask(runtime.encode(ids[:-20]), ids[-20:], max_new_tokens=16)
    model = attached(folder, 2, strategy=strategy, query_tokens=20)
    options = {"max_new_tokens": 16, "return_dict_in_generate": True, "output_logits": True}
    got = model.generate(torch.tensor([ids]), **GREEDY, **options)
    assert got.sequences[0, 120:].tolist() == answer.ids
    assert torch.allclose(got.logits[0][0], answer.first_logits)
    assert over_bound(got.logits[0][0], one_device(folder, ids, 1)) > 10
    # a text that is all question is exact
    short = plain(folder, tuple(ids[:20]), max_new_tokens=16)
    assert torch.equal(model.generate(torch.tensor([ids[:20]]), max_new_tokens=16, **GREEDY), short)


# --- batches


def padded(lengths, seed=0):
    """Texts of such lengths, padded on the left."""
    rows = [random_ids(length, seed) for length in lengths]
    longest = max(lengths)
    ids = torch.tensor([[5] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    return rows, ids, mask


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_gives_each_what_it_gets_alone(family, world, attached):
    folder, lengths = tiny_folder(family), (1, 7, 64, 101)
    rows, ids, mask = padded(lengths)
    wanted = [plain(folder, tuple(row), max_new_tokens=24) for row in rows]
    got = attached(folder, world).generate(ids, attention_mask=mask, max_new_tokens=24, **GREEDY)
    for row, length, want in zip(got, lengths, wanted, strict=True):
        assert torch.equal(row[-length - 24 :], want[0])


def test_padding_is_neither_computed_nor_kept(attached):
    lengths = (1, 7, 64, 101)
    _, ids, mask = padded(lengths)
    model, seen = attached(tiny_folder("llama"), 2), []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=2, return_dict_in_generate=True, **GREEDY
    )
    hook.remove()
    # the shares of all but the last tokens, then on each rank the last ones, then the new ones
    assert sum(seen[:2]) == sum(lengths) - len(lengths)
    assert seen[2:] == [len(lengths)] * 4
    held = [
        sum(shard.cache.of(None).tokens for shard in shards)
        for shards in made.past_key_values.shards.values()
    ]
    assert sum(held) == sum(lengths) + len(lengths)
    assert max(held) - min(held) <= 2 * len(lengths)


def test_batches_with_rope_by_length_are_as_one_device_has_them(attached):
    """There the longest text of a batch counts."""
    folder = tiny_folder("llama", **DYNAMIC)
    _, ids, mask = padded((30, 90))
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    want = fresh.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    got = attached(folder, 2).generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    assert torch.equal(got, want)


def test_padding_inside_a_text_is_left_out_as_on_one_device(attached):
    folder = tiny_folder("llama")
    ids, mask = prompt(30), torch.ones(1, 30, dtype=torch.int64)
    mask[0, [3, 10, 11]] = 0
    want = loaded(folder).generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    got = attached(folder).generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    assert torch.equal(got, want)


def test_texts_that_end_early_do_not_disturb_others(attached):
    folder = tiny_folder("llama")
    rows, ids, mask = padded((20, 33))
    first = plain(folder, tuple(rows[0]), max_new_tokens=24)[0, 20:].tolist()
    end = {**GREEDY, "eos_token_id": first[3], "pad_token_id": 5, "max_new_tokens": 24}
    want = loaded(folder).generate(ids, attention_mask=mask, **end)
    assert torch.equal(attached(folder).generate(ids, attention_mask=mask, **end), want)


# --- turns


def turns(model, texts, **options):
    """Each text is appended to all before it, with the KV of the turn before."""
    past, ids, made = None, torch.empty(1, 0, dtype=torch.int64), []
    for text in texts:
        ids = torch.cat([ids, text], dim=1)
        keep = {"past_key_values": past} if past is not None else {}
        out = model.generate(
            ids, max_new_tokens=10, return_dict_in_generate=True, **keep, **GREEDY, **options
        )
        past, ids = out.past_key_values, out.sequences
        made.append(ids)
    return made


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_oss"])
def test_turns_go_on_where_the_last_one_ended(family, attached):
    folder = tiny_folder(family)
    texts = [prompt(50, seed=1), prompt(1, seed=2), prompt(30, seed=3)]
    wanted, ids = [], torch.empty(1, 0, dtype=torch.int64)
    for text in texts:
        ids = plain(folder, tuple(torch.cat([ids, text], dim=1)[0].tolist()), max_new_tokens=10)
        wanted.append(ids)
    model, seen = attached(folder, 3, chunk_tokens=9), []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    made = turns(model, texts)
    hook.remove()
    assert all(torch.equal(*pair) for pair in zip(made, wanted, strict=True))
    # 3 ranks read each last and each new token; of others only what is new is computed, once
    assert sum(seen) <= 3 * 30 + (49 + 1 + 30) + 10


def test_a_past_can_be_given_and_copied(attached):
    """A prefix that is encoded once, for several prompts."""
    folder, head = tiny_folder("llama"), prompt(60, seed=5)
    wanted = [
        plain(folder, tuple(torch.cat([head, prompt(9, seed)], 1)[0].tolist()), max_new_tokens=8)
        for seed in (1, 2)
    ]
    model, prefix = attached(folder, 2), ShardedPast()
    model(head, past_key_values=prefix, logits_to_keep=1)
    assert prefix.get_seq_length() == 60 and prefix.nbytes == 60 * 2 * 2 * 2 * 16 * 4
    assert "60 tokens" in repr(prefix)
    for seed, want in zip((1, 2), wanted, strict=True):
        ids = torch.cat([head, prompt(9, seed)], dim=1)
        past = copy.deepcopy(prefix)
        got = model.generate(ids, past_key_values=past, max_new_tokens=8, **GREEDY)
        assert torch.equal(got, want)
        assert past.get_seq_length() == 60 + 9 + 7
    assert prefix.get_seq_length() == 60
    prefix.reset()
    assert prefix.get_seq_length() == prefix.nbytes == 0


def test_prompts_read_in_chunks_by_generate_itself_are_refused_but_ours_are_not(attached):
    model = attached(tiny_folder("llama"), chunk_tokens=7)
    with pytest.raises(UserError, match=r"prefill_chunk_size=8: .*chunk_tokens of attach"):
        model.generate(prompt(40), max_new_tokens=2, prefill_chunk_size=8, **GREEDY)


def test_long_answers_of_layers_with_windows_stay_small(attached):
    """mixtral: both layers see 21 tokens."""
    folder, new = tiny_folder("mixtral"), 400
    want = plain(folder, tuple(random_ids(30)), max_new_tokens=new)
    model = attached(folder, 2, cache=CacheConfig(page_tokens=4))
    for engine in model.ringstar._engines.values():
        engine._answer_tokens, engine._room = 16, 8  # the room ahead
    made = model.generate(prompt(30), max_new_tokens=new, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(made.sequences, want)
    for (shard,) in made.past_key_values.shards.values():
        kept = shard.cache.of(21)
        assert kept.tokens <= 11 + 9
        assert shard.cache.allocated_nbytes <= (11 + 9 + 2 * 4) * 2 * 2 * 2 * 16 * 4
        assert shard.cache.pool.allocated_nbytes <= 2 * (11 + 9 + 2 * 4) * 2 * 2 * 2 * 16 * 4


# --- what scripts do with it


class Recorder(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.ended = True


class After(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **_):
        return torch.tensor([ids.shape[0] >= self.length for ids in input_ids])


def test_streamers_and_stopping_criteria(attached):
    folder = tiny_folder("llama")
    want = plain(folder, tuple(random_ids(40)), max_new_tokens=5)
    model, recorder = attached(folder), Recorder()
    got = model.generate(
        prompt(40),
        max_new_tokens=50,
        streamer=recorder,
        stopping_criteria=StoppingCriteriaList([After(45)]),
        **GREEDY,
    )
    assert torch.equal(got, want)
    assert recorder.seen == want[0].tolist() and recorder.ended


def test_text_streams(attached, capsys):
    folder, tokenizer = chat_folder(), tiny_tokenizer()
    ids = tokenizer("The ship left", return_tensors="pt")
    want = loaded(folder).generate(**ids, max_new_tokens=12, do_sample=False)
    model = attached(folder)
    model.generate(
        **ids,
        max_new_tokens=12,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )
    said = tokenizer.decode(want[0, ids["input_ids"].shape[1] :])
    assert capsys.readouterr().out.strip() == said.strip()


def test_a_loop_of_ones_own(attached):
    folder = tiny_folder("gemma2")
    want = plain(folder, tuple(random_ids(40)), max_new_tokens=8)
    model, ids, past, new = attached(folder), prompt(40), None, prompt(40)
    with torch.no_grad():
        for _ in range(8):
            out = model(new, past_key_values=past, use_cache=True, logits_to_keep=1)
            out.logits[:, -1] /= 0.7  # ordinary tensors
            past, new = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, new], dim=1)
        assert torch.equal(ids, want)
        several = model(prompt(40), logits_to_keep=5).logits
        again = model(prompt(40)[:, :38], logits_to_keep=1, return_dict=False)[0]
    assert several.shape == (1, 5, 97) and torch.allclose(several[:, 2], again[:, 0], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_detached_it_is_what_it_was(family, attached):
    folder = tiny_folder(family)
    model = loaded(folder)
    before = model(prompt(30)).logits
    kept, names = model.config._attn_implementation, list(model.state_dict())
    attached(folder)
    assert model.config._attn_implementation == "ringstar" and list(model.state_dict()) == names
    model.generate(prompt(30), max_new_tokens=2, **GREEDY)
    ringstar.detach(model)
    assert model.config._attn_implementation == kept
    assert not {"generate", "forward", "ringstar"} & vars(model).keys()
    assert all("forward" not in vars(layer.mlp) for layer in model.model.layers)
    assert torch.equal(model(prompt(30)).logits, before)
    with pytest.raises(UserError, match="is not attached to ranks"):
        ringstar.detach(model)


def test_choices_are_said(attached, caplog):
    with caplog.at_level(logging.INFO, "ringstar"):
        model = attached(tiny_folder("llama"), 2, strategy=StarConfig())
        model.generate(prompt(300), max_new_tokens=1, **GREEDY)
    said = "\n".join(caplog.messages)
    assert "2 ranks over threads (simulated ranks, as asked)" in said
    assert "rope in float32 (as the model's own, for up to 8,192 positions)" in said
    assert "the last 256 tokens of a prompt see all of it (query_tokens by default)" in said
    assert "strategy star, 2 blocks of 22 tokens" in said


def test_progress_is_reported(attached):
    shares = []
    model = attached(tiny_folder("llama"), chunk_tokens=10, on_progress=shares.append)
    model.generate(prompt(100), max_new_tokens=1, **GREEDY)
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)


# --- refused by name

REFUSED = {
    "beam search": ({"num_beams": 3}, r"generate=beam_search: greedy search and sampling"),
    "beam sampling": ({"num_beams": 2, "do_sample": True}, r"generate=beam_sample"),
    "assisted": ({"assistant_model": object()}, r"assistant_model=object: assisted decoding"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, r"generate=assisted_generation"),
    "contrastive": ({"penalty_alpha": 0.5, "top_k": 4}, r"generate=contrastive_search"),
    "custom": ({"custom_generate": lambda *_: None}, r"custom_generate=function"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 3, 64)}, r"inputs_embeds=Tensor: .*input_ids"),
    "guidance": ({"guidance_scale": 2.0}, r"guidance_scale=2\.0: guidance reads every text twice"),
    "static cache": ({"cache_implementation": "static"}, r"cache_implementation=static: KV is sha"),
    "attentions": ({"output_attentions": True}, r"output_attentions=True: weights of attention"),
    "hidden states": ({"output_hidden_states": True}, r"output_hidden_states=True: each rank has"),
    "past": ({"past_key_values": DynamicCache()}, r"past_key_values=DynamicCache: does not hold"),
    "right padding": (
        {"attention_mask": torch.tensor([[1] * 39 + [0]])},
        r"attention_mask=hides last tokens: allowed: padding on the left",
    ),
    "mask": (
        {"attention_mask": torch.ones(1, 7)},
        r"position_ids=\(1, 7\): allowed: \(1, 40\)",
    ),
    "positions of three": (
        {"position_ids": torch.arange(40).expand(3, 1, 40)},
        r"position_ids=\(3, 1, 40\): allowed",
    ),
    "positions": ({"position_ids": torch.arange(3, 43)[None]}, r"position_ids=\[3, 4, .*from 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_by_name(what, attached):
    options, message = REFUSED[what]
    model = attached(tiny_folder("llama"))
    with pytest.raises(UserError, match=message):
        model.generate(prompt(40), **{**GREEDY, "max_new_tokens": 2, **options})
    want = plain(tiny_folder("llama"), tuple(random_ids(40)), max_new_tokens=2)
    assert torch.equal(model.generate(prompt(40), max_new_tokens=2, **GREEDY), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"logits_to_keep=0: allowed: 1 to 40; all tokens'"),
        ({"logits_to_keep": 41}, r"logits_to_keep=41: allowed: 1 to 40"),
        ({"logits_to_keep": torch.tensor([1])}, r"logits_to_keep=tensor"),
        ({"logits_to_keep": 1, "labels": prompt(40)}, r"labels=Tensor"),
        ({"logits_to_keep": 1, "is_causal": False}, r"is_causal=bool"),
        ({"logits_to_keep": 1, "input_ids": torch.tensor([[97]])}, r"input_ids=97: token ids must"),
        ({"logits_to_keep": 1, "input_ids": torch.tensor([3])}, r"input_ids: allowed: token ids"),
    ],
)
def test_so_are_calls_of_forward(options, message, attached):
    model = attached(tiny_folder("llama"))
    with pytest.raises(UserError, match=message):
        model(**{"input_ids": prompt(40), **options})


def test_masks_that_a_window_would_count_are_refused(attached):
    mask = torch.ones(1, 40, dtype=torch.int64)
    mask[0, 7] = 0
    model = attached(tiny_folder("mixtral"))
    with pytest.raises(UserError, match="attention_mask=padding between tokens: a sliding window"):
        model.generate(prompt(40), attention_mask=mask, max_new_tokens=1, **GREEDY)
    model = attached(tiny_folder("llama"))
    with pytest.raises(UserError, match="position_ids: needed where padding stands between"):
        model(prompt(40), attention_mask=mask, logits_to_keep=1)


def test_a_past_is_of_one_batch(attached):
    model = attached(tiny_folder("llama"))
    past = model(prompt(9), logits_to_keep=1).past_key_values
    with pytest.raises(UserError, match="input_ids=2 texts: past_key_values hold 1"):
        model(torch.tensor([[1], [2]]), past_key_values=past, logits_to_keep=1)
    with pytest.raises(NotImplementedError, match="cannot be cut"):
        past.crop(3)
    mask = torch.ones(1, 10, dtype=torch.int64)
    mask[0, 0] = 0
    with pytest.raises(UserError, match="hides past tokens"):
        model(prompt(1), past_key_values=past, attention_mask=mask, logits_to_keep=1)


def unsupported():
    config = AutoConfig.for_model(
        "falcon", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=97
    )
    return AutoModelForCausalLM.from_config(config).eval()


class Changed(LlamaForCausalLM):
    pass


def tiny(kind=AutoModelForCausalLM, training=False):
    return kind.from_pretrained(tiny_folder("llama")).train(training)


def cast_longrope():
    """Frequencies that the user's own model has rounded."""
    folder = tiny_folder("phi3", **LONGROPE)
    return AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (unsupported, {}, r"model=FalconForCausalLM: model type 'falcon' is not supported"),
        (lambda: tiny(Changed), {}, r"model=Changed: wraps or changes LlamaForCausalLM"),
        (lambda: tiny(training=True), {}, r"model=LlamaForCausalLM: is in training mode"),
        (lambda: torch.nn.Linear(2, 2), {}, r"model=Linear: needed is a Hugging Face causal"),
        (lambda: tiny().to("meta"), {}, r"model=on meta: all weights must be on this rank's"),
        (lambda: cast_longrope(), {}, r"model=rope in bfloat16: .* cast with the weights"),
        (lambda: tiny().double(), {}, r"model\.dtype=float64: allowed: auto, float32"),
        (tiny, {"strategy": "dense"}, r"strategy=dense: runs on one rank, not 2"),
        (tiny, {"strategy": "moon"}, r"strategy=moon: allowed: dense, ring, star"),
        (tiny, {"layout": "spiral"}, r"strategy\.layout=spiral: allowed"),
        (tiny, {"kernel": "fa3"}, r"kernel=fa3: "),
        (tiny, {"query_tokens": 0}, r"query_tokens=0: allowed: 1 or more"),
        (tiny, {"query_tokens": "3"}, r"query_tokens=3: allowed: 1 or more"),
        (tiny, {"strategy": None}, r"strategy: allowed: ring, star, dense, or a config of one"),
        (tiny, {"strategy": "star", "layout": "striped"}, r"layout=striped: is of strategy"),
        (tiny, {"rope_precision": "half"}, r"rope\.precision=half: allowed: auto, float32"),
        (tiny, {"transport": "gloo"}, r"transport=gloo: needs ranks"),
    ],
)
def test_what_cannot_be_attached_is_refused_by_name(make, options, message):
    model = make()
    kept = getattr(model, "forward", None)
    with pytest.raises(UserError, match=message):
        ringstar.attach(model, **{"transport": "threads", "world_size": 2, **options})
    assert model.forward == kept and not hasattr(model, "ringstar")


def test_a_model_is_attached_once(attached):
    model = attached(tiny_folder("llama"))
    with pytest.raises(UserError, match=r"is attached already; ringstar\.detach\(model\) first"):
        ringstar.attach(model)


def test_star_is_refused_where_a_window_hides_the_text(attached):
    model = attached(tiny_folder("mixtral"), strategy=StarConfig(), query_tokens=2)
    with pytest.raises(UserError, match="sliding window of 21 tokens hides part of 30 positions"):
        model.generate(prompt(30), max_new_tokens=1, **GREEDY)


def test_star_is_refused_before_an_answer_would_leave_a_window(attached):
    model = attached(tiny_folder("mixtral"), strategy="star", query_tokens=2)
    window, streamer = model.config.sliding_window, Recorder()
    ids = prompt(window - 3)
    for length in ({"max_new_tokens": 5}, {"max_length": window + 2}):
        with pytest.raises(UserError, match=f"sliding window of {window} tokens hides part"):
            model.generate(ids, streamer=streamer, **length, **GREEDY)
    assert not streamer.seen
    assert model.generate(ids, max_new_tokens=4, **GREEDY).shape[1] == window + 1


def test_star_sizes_that_do_not_fit_are_refused(attached):
    model = attached(tiny_folder("llama"), strategy=StarConfig(anchor_size=40), query_tokens=2)
    with pytest.raises(UserError, match=r"strategy\.anchor_size=40"):
        model.generate(prompt(30), max_new_tokens=1, **GREEDY)


def test_star_is_exact_where_a_prompt_is_shorter_than_a_block_and_its_anchor(attached):
    folder, ids = tiny_folder("llama"), random_ids(30)
    want = plain(folder, tuple(ids), max_new_tokens=5).tolist()
    strategy = StarConfig(block_size=40, anchor_size=40)
    model = attached(folder, strategy=strategy, query_tokens=2)
    assert model.generate(prompt(30), max_new_tokens=5, **GREEDY).tolist() == want


# --- what a fresh reader of it broke


def test_settings_of_the_folder_count_as_they_do_on_one_device(attached):
    """A config that is given goes before the model's, keywords before both."""
    folder = tiny_folder("llama", rms_norm_eps=2e-6)  # a model of its own: it is changed
    ids, given = prompt(30), GenerationConfig(max_new_tokens=5, pad_token_id=0)
    model = loaded(folder)
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.cache_implementation = "hybrid"  # as some folders have it
    want = model.generate(ids, generation_config=given)
    attached(folder)
    assert torch.equal(model.generate(ids, generation_config=given), want)
    options = {"max_new_tokens": 5, "pad_token_id": 0, "cache_implementation": "dynamic"}
    assert torch.equal(model.generate(ids, **options), want)
    model.generation_config.num_beams = 3
    with pytest.raises(UserError, match="generate=beam_search"):
        model.generate(ids, generation_config=given)
    assert torch.equal(model.generate(ids, generation_config=given, num_beams=1), want)
    model.generation_config.num_beams = None
    model.generation_config.use_cache = False
    assert torch.equal(model.generate(ids, generation_config=given), want)
    with pytest.raises(UserError, match="use_cache=False: past_key_values were given"):
        model.generate(ids, generation_config=given, past_key_values=ShardedPast())


def test_stop_strings(attached):
    folder, tokenizer = chat_folder(), tiny_tokenizer()
    ids = tokenizer("The ship left", return_tensors="pt")
    free = loaded(folder).generate(**ids, max_new_tokens=12, do_sample=False)
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "stop_strings": [tokenizer.decode(free[0, -6])],
        "tokenizer": tokenizer,
    }
    want = loaded(folder).generate(**ids, **options)
    assert torch.equal(attached(folder).generate(**ids, **options), want)


def test_a_past_that_was_interrupted_is_not_used_again(attached):
    model, ticks = attached(tiny_folder("llama"), chunk_tokens=10), []

    def interrupt(*_):
        ticks.append(1)
        if len(ticks) == 3:
            raise KeyboardInterrupt

    past = model(prompt(30), logits_to_keep=1).past_key_values
    hook = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(prompt(60), past_key_values=past, logits_to_keep=1)
    hook.remove()
    with pytest.raises(UserError, match=r"past_key_values=unfinished: .*reset\(\) empties it"):
        model(prompt(60), past_key_values=past, logits_to_keep=1)
    past.reset()
    again = model(prompt(30), past_key_values=past, logits_to_keep=1).logits
    assert torch.equal(again, model(prompt(30), logits_to_keep=1).logits)


def test_a_past_of_other_ranks_is_refused(attached):
    folder = tiny_folder("llama")
    for before, after in ((1, 2), (2, 1), (3, 2)):
        model = attached(folder, before)
        past = model(prompt(30), logits_to_keep=1).past_key_values
        ringstar.detach(model)
        attached(folder, after)
        why = rf"another attached model, of {before} ranks \(this one has {after}\)"
        with pytest.raises(UserError, match=why):
            model(prompt(1), past_key_values=past, logits_to_keep=1)
        ringstar.detach(model)


def test_a_past_of_another_model_is_refused(attached):
    """Of the same shapes, as a fine-tuned one has."""
    one, other = tiny_folder("llama"), chat_folder()
    past = attached(one)(prompt(30), logits_to_keep=1).past_key_values
    with pytest.raises(UserError, match="was made by another attached model"):
        attached(other)(prompt(1), past_key_values=copy.deepcopy(past), logits_to_keep=1)
    past.reset()
    attached_to = loaded(other)(prompt(3), past_key_values=past, logits_to_keep=1)
    assert attached_to.past_key_values is past


def test_a_refused_first_call_says_nothing_of_the_next_batch(attached):
    token = 2 * 2 * 2 * 16 * 4
    model = attached(tiny_folder("llama"), cache=CacheConfig(max_bytes=1500 * token, page_tokens=4))
    past = ShardedPast()
    with pytest.raises(UserError, match=r"cache\.max_bytes"):
        model(prompt(700).repeat(8, 1), past_key_values=past, logits_to_keep=1)
    made = model(prompt(30).repeat(2, 1), past_key_values=past, logits_to_keep=1)
    assert made.logits.shape[0] == 2


def test_memory_goes_with_what_the_script_has_no_more(attached):
    model = attached(tiny_folder("llama"))
    budgets = [engine.pool._budget for engine in model.ringstar._engines.values()]
    model.generate(prompt(60), max_new_tokens=3, **GREEDY)
    assert [budget.used for budget in budgets] == [0, 0]
    past = model(prompt(60), logits_to_keep=1).past_key_values
    assert all(budget.used for budget in budgets)
    del past
    ringstar.detach(model)
    assert [budget.used for budget in budgets] == [0, 0]


def test_a_default_device_or_dtype_is_no_matter(attached):
    model = attached(tiny_folder("llama"))
    want = model(prompt(30), logits_to_keep=1).logits
    torch.set_default_device("meta")  # as scripts set cuda
    try:
        mask = torch.ones(1, 30, dtype=torch.bool, device="cpu")
        reals = generating._real(None, 1, 30, 0, [0]), generating._real(mask, 1, 30, 0, [0])
        assert [real.device.type for real in reals] == ["cpu", "cpu"]
    finally:
        torch.set_default_device(None)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(model(prompt(30), logits_to_keep=1).logits, want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_is_refused(attached):
    model = attached(tiny_folder("llama"))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(UserError, match=r"torch\.autocast=torch\.bfloat16: ranks compute in"),
    ):
        model.generate(prompt(30), max_new_tokens=1, **GREEDY)


def test_padding_needs_positions_where_rope_depends_on_length(attached):
    model = attached(tiny_folder("llama", **DYNAMIC))
    _, ids, mask = padded((30, 90))
    with pytest.raises(UserError, match="position_ids: needed with padding"):
        model(ids, attention_mask=mask, logits_to_keep=1)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"is_causal": False}),
        ("qwen3", {"is_causal": False}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
    ],
)
def test_models_whose_tokens_see_later_ones_are_refused(family, changes):
    folder = tiny_folder(family, **changes)
    with pytest.raises(UserError, match="its tokens see later ones"):
        LongContext.from_pretrained(folder)
    with pytest.raises(UserError, match="its tokens see later ones"):
        ringstar.attach(AutoModelForCausalLM.from_pretrained(folder))


def test_a_failed_attach_leaves_the_model_as_it_was(monkeypatch):
    model = tiny()

    def fails(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr("ringstar.attached.RankEngine", fails)
    with pytest.raises(RuntimeError, match="no"):
        ringstar.attach(model, transport="threads", world_size=2)
    monkeypatch.undo()
    assert model.config._attn_implementation == "sdpa" and "forward" not in vars(model)
    ringstar.attach(model, transport="threads", world_size=2)
    ringstar.detach(model)


def test_threads_that_a_script_starts_later_keep_their_thread_count(attached):
    def count():
        found = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        attached(tiny_folder("llama")).generate(prompt(30), max_new_tokens=1, **GREEDY)
        assert count() == 2
    finally:
        torch.set_num_threads(before)


# --- in processes


def generate_rank(transport, folder, ids, seed_of_rank):
    torch.manual_seed(seed_of_rank * transport.rank)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ringstar.attach(model, RingConfig(), ProcessWorld(transport))
    sampled = {**GREEDY, "do_sample": bool(seed_of_rank), "top_k": 0}
    made = model.generate(torch.tensor([ids]), max_new_tokens=64, **sampled)
    shards = model(torch.tensor([ids]), logits_to_keep=1).past_key_values.shards
    ringstar.detach(model)
    again = model.generate(torch.tensor([ids]), max_new_tokens=2, **GREEDY)
    return (
        made.tolist(),
        sum(token_count(shard.owned[transport.rank]) for shard in shards[transport.rank]),
        again,
    )


def every_family(transport, folders, ids):
    return [generate_rank(transport, folder, ids, 0) for folder in folders]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_process_gets_what_one_device_gets(world):
    folders, ids = [tiny_folder(family) for family in FAMILIES], random_ids(101)
    ranks = in_processes(world, every_family, folders, ids)
    for folder, results in zip(folders, zip(*ranks, strict=True), strict=True):
        want = plain(folder, tuple(ids), max_new_tokens=64)
        assert all(made == want.tolist() for made, _, _ in results), folder
        kept = [tokens for _, tokens, _ in results]
        assert sum(kept) == 101 and max(kept) - min(kept) <= 3, folder


def test_ranks_that_sample_apart_are_found_out():
    with pytest.raises(RuntimeError, match="was given another input_ids"):
        in_processes(2, generate_rank, tiny_folder("llama"), random_ids(20), 1)


def stop_apart(transport, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ringstar.attach(model, transport=ProcessWorld(transport))
    with pytest.raises(UserError, match=r"max_time=5\.0: the clocks of ranks differ"):
        model.generate(prompt(9), max_time=5.0, **GREEDY)
    model.generate(prompt(9), max_new_tokens=3 + transport.rank, **GREEDY)


def test_ranks_that_stop_apart_are_found_out():
    with pytest.raises(RuntimeError, match=r"was given another (answer|input_ids)"):
        in_processes(2, stop_apart, tiny_folder("llama"))


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
import ringstar

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])


def attach_again():
    for layout in ("zigzag", "striped", "contiguous"):
        attached = ringstar.attach(model, layout=layout)
        ids = model.generate(torch.arange(40)[None], max_new_tokens=8, do_sample=False)
        if attached.rank == 0:
            print(attached.world_size, ids[0, 40:].tolist())
        ringstar.detach(model)


attach_again()
assert not dist.is_initialized()
dist.init_process_group("gloo")
attach_again()
assert dist.is_initialized()
dist.barrier()
dist.destroy_process_group()

other = AutoModelForCausalLM.from_pretrained(sys.argv[1])
for each in (model, other):
    ringstar.attach(each)
ringstar.detach(model)  # whose connection came first
for each in (other, model):
    ids = each.generate(torch.arange(40)[None], max_new_tokens=8, do_sample=False)
    if dist.get_rank() == 0:
        print("two", ids[0, 40:].tolist())
ringstar.detach(other)
"""


@pytest.mark.slow
def test_scripts_under_torchrun_attach_again_and_keep_their_group(tmp_path):
    """Without a group of their own, and with one."""
    (tmp_path / "script.py").write_text(SCRIPT)
    folder = tiny_folder("llama")
    want = plain(folder, tuple(range(40)), max_new_tokens=8)[0, 40:].tolist()
    run = python(*TORCHRUN, "3", "script.py", folder, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"3 {want}"] * 6 + [f"two {want}"] * 2
    assert "destroy_process_group" not in run.stderr
