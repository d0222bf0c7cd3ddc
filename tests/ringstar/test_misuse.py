"""python -m pytest tests/ringstar/test_misuse.py

What would be silently wrong is refused by name, also after a fault.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ringstar import CacheConfig, LongContext, UserError
from ringstar.config import (
    Config,
    GenerationConfig,
    ModelConfig,
    RingConfig,
    StarConfig,
    StrategyConfig,
)
from ringstar.models import ModelFacts, ModelFiles, find_model
from ringstar.prompt import prompt_format
from ringstar.sampling import NO_TOKEN, Sampler
from seqpar import TransportError
from seqpar.process import ProcessWorld
from seqpar.threads import ThreadTransport
from tests.support.chat import TEMPLATE, chat_folder
from tests.support.models import expected, random_ids, tiny_folder
from tests.support.ranks import in_processes
from tests.support.runtime import simulated


def runtime(world=2, **options):
    return simulated(tiny_folder("llama"), world, **options)


def test_a_document_of_another_runtime_is_refused():
    document = runtime().encode(random_ids(9))
    with pytest.raises(UserError, match="encoded by another LongContext"):
        runtime().ask(document, random_ids(2))


def test_a_question_inside_an_answer_is_refused():
    ring = runtime()
    document = ring.encode(random_ids(9))

    def again(share):
        ring.ask(document, random_ids(2))

    with pytest.raises(RuntimeError, match="running already"):
        ring.encode(random_ids(9), on_progress=again)
    assert len(ring.ask(document, random_ids(2), max_new_tokens=3).ids) == 3


def test_text_and_ids_are_checked():
    ring = runtime(1)
    with pytest.raises(UserError, match="document: is empty"):
        ring.encode("  \n")
    with pytest.raises(UserError, match="document: token ids must be integers"):
        ring.encode([1.5])
    with pytest.raises(UserError, match="has no tokenizer"):
        ring.encode("text")
    with pytest.raises(UserError, match="document: bytes are no text: decode them first"):
        ring.encode(b"text")
    for call in (ring.encode_batch, ring.score_texts):
        with pytest.raises(UserError, match="is one text, and a list of them is needed"):
            call("text")
    document = ring.encode(random_ids(9))
    with pytest.raises(UserError, match="ids: token ids must be integers"):
        ring.logits(document, [1.7])
    assert ring.logits(document, torch.tensor([5, 6])).shape[0] == 1
    talk = ring.converse(document)
    for wrong, why in (
        ("The captain.", "token ids are needed"),
        ([10**6], "token ids must be from 0 to"),
        ([1.5], "must be integers"),
    ):
        with pytest.raises(UserError, match=f"answer_ids.*{why}"):
            talk.add([1, 2], wrong)
    with pytest.raises(UserError, match="question: token ids must be integers"):
        talk.ask([1.7, 2.9])
    assert talk.ids == []
    talk.add([1, 2], [])  # an answer that ended with its first token
    assert talk.ids == [1, 2] and talk.ask([1, 2], max_new_tokens=2).ids


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1.5),
        ("seed", None),
        ("stop", [13]),
        ("stop", "no"),
        ("max_new_tokens", None),
        ("temperature", None),
        ("top_p", None),
        ("temperature", "hot"),
    ],
)
def test_settings_of_an_answer_are_checked_before_ranks_run(name, value):
    ring = runtime()
    document = ring.encode(random_ids(9))
    with pytest.raises(UserError, match=rf"generation\.{name}"):
        ring.ask(document, random_ids(2), **{name: value})
    assert ring.ask(document, random_ids(2), max_new_tokens=2, seed=np.int64(3)).ids


def test_a_strategy_is_a_name_or_a_config():
    ring = runtime()
    for wrong in (StarConfig, StrategyConfig("star")):
        with pytest.raises(UserError, match=r"strategy=star: allowed: RingConfig"):
            ring.encode(random_ids(90), strategy=wrong)
        with pytest.raises(UserError, match=r"strategy=star: allowed: RingConfig"):
            runtime(strategy=wrong)
    assert isinstance(ring.encode(random_ids(90), strategy="star").strategy, StarConfig)
    with pytest.raises(UserError, match="strategy=stars: allowed: dense, ring, star"):
        ring.encode(random_ids(90), strategy="stars")


def test_what_is_returned_can_be_changed():
    ring = runtime()
    document = ring.encode(random_ids(30))
    score = ring.score_texts([random_ids(30)])[0]
    logits = ring.ask(document, [3], max_new_tokens=1).first_logits
    for made in (logits, ring.logits(document, [3]), score.logprobs, score.greedy):
        assert not made.is_inference()
        made[:1] = 0


def test_scores_come_whatever_the_default_dtype_is():
    ring, text = runtime(), random_ids(30)
    (want,) = ring.score_texts([text])
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(ring.score_texts([text])[0].logprobs, want.logprobs)
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_answer_that_was_stopped_is_in_nobodys_way():
    """Ranks may have come to different tokens, and the document is to make room."""
    token = 2 * 2 * 2 * 16 * 4
    ring = runtime(cache=CacheConfig(max_bytes=100 * token, page_tokens=4))
    document = ring.encode(random_ids(90))

    def stop(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ring.ask(document, [3], max_new_tokens=9, until=stop)
    assert {shard.tokens for shard in document.shards} == {90}
    assert ring.ask(document, [3], max_new_tokens=2).ids


def test_dense_refuses_ranks_that_are_given():
    with pytest.raises(UserError, match="runs on one rank, not 3"):
        LongContext.from_pretrained(
            tiny_folder("llama"), strategy="dense", transport=runtime(3).ranks
        )


def ask_twice_with_a_fault(transport, folder):
    ring = LongContext.from_config(Config(model=ModelConfig(path=folder)), ProcessWorld(transport))
    document = ring.encode(random_ids(12))
    shown = []

    def on_text_fails(engine=ring.group.engines[transport.rank]):
        agree = engine._agree

        def failing(logits, sampler):
            if transport.rank == 0 and shown:
                raise KeyError("once")
            shown.append(1)
            return agree(logits, sampler)

        engine._agree = failing

    on_text_fails()
    errors = []
    for _ in range(2):
        try:
            ring.ask(document, random_ids(3), max_new_tokens=4)
        except (KeyError, TransportError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    raise AssertionError("; ".join(errors))  # reported as it is, without another exchange


def test_after_a_fault_real_ranks_refuse_to_go_on():
    with pytest.raises(RuntimeError) as failed:
        in_processes(2, ask_twice_with_a_fault, tiny_folder("llama"))
    said = str(failed.value)
    assert "an earlier run failed; start the ranks again" in said
    assert "once" in said or "lost contact" in said


def different_documents(transport, folder):
    ring = LongContext.from_config(Config(model=ModelConfig(path=folder)), ProcessWorld(transport))
    ring.encode([10 + transport.rank] * 8)


def test_ranks_that_were_given_different_documents_are_told():
    with pytest.raises(RuntimeError, match="was given another document"):
        in_processes(2, different_documents, tiny_folder("llama"))


def test_logits_that_are_not_finite_are_a_fault_on_every_rank(monkeypatch):
    assert Sampler(GenerationConfig())(torch.tensor([0.0, float("nan")])) == NO_TOKEN
    ring = runtime()
    document = ring.encode(random_ids(5))
    with torch.no_grad():
        ring.group.engines[0].model.model.lm_head.weight[3] = float("inf")
    with pytest.raises(RuntimeError, match="logits that are not finite"):
        ring.ask(document, random_ids(2))


def test_keys_that_are_not_finite_are_a_fault_where_they_are_rounded():
    ring = runtime(cache=CacheConfig(dtype="int8"))
    with torch.no_grad():
        ring.group.engines[0].model.model.model.layers[0].self_attn.k_proj.weight[3] = float("inf")
    with pytest.raises(RuntimeError, match="keys or values that are not finite"):
        ring.encode(random_ids(5))


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama", {"sliding_window": 64}, r"config\.sliding_window=64: layers of llama have none"),
        ("granite", {"attention_chunk_size": 64}, r"config\.attention_chunk_size=64: layers of"),
        (
            "smollm3",
            {
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 9,
                "use_sliding_window": False,
            },
            r"config\.use_sliding_window=false with sliding_attention",
        ),
    ],
)
def test_windows_that_are_no_layers_are_refused(family, changes, says, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder(family), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=says):
        find_model(ModelConfig(path=str(folder)))


def test_what_a_folder_asks_of_generation_and_there_is_not_is_said(tmp_path, caplog):
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder("llama"), folder)
    asked = {
        "no_repeat_ngram_size": 3,
        "repetition_penalty": 1.0,
        "suppress_tokens": [],
        "top_k": 5,
    }
    (folder / "generation_config.json").write_text(json.dumps(asked))
    simulated(str(folder), 2)
    assert caplog.text.count("asks for no_repeat_ngram_size: there is none here") == 1


def test_longrope_of_some_layers_alone():
    """Where it jumps is said with them."""
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 80}
    kinds = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    config = SimpleNamespace(rope_parameters=kinds)
    assert ModelFacts(config).rope_jumps_after == 80


def test_a_layout_is_of_the_ring():
    for strategy in ("star", RingConfig()):
        with pytest.raises(UserError, match=r"^layout=striped: is of strategy"):
            LongContext.from_pretrained(tiny_folder("llama"), strategy=strategy, layout="striped")


def test_a_model_that_does_not_load_leaves_no_ranks(monkeypatch):
    closed = []
    monkeypatch.setattr(ThreadTransport, "close", lambda transport: closed.append(transport.rank))

    def load(*_):
        raise UserError("model.path", "x", "lacks weights")

    monkeypatch.setattr(ModelFiles, "load", load)
    with pytest.raises(UserError, match="lacks weights"):
        runtime()
    assert closed == [0, 1]


def test_the_smallest_temperature_is_greedy():
    sampler = Sampler(GenerationConfig(temperature=5e-324))
    assert sampler(torch.tensor([1.0, 3.0, 2.0])) == 1


class Template:
    chat_template = "yes"

    def __init__(self, render):
        self._render = render

    def apply_chat_template(self, messages, **_):
        return self._render(messages[0]["content"])


@pytest.mark.parametrize(
    "render",
    [
        str.lstrip,
        str.upper,
        lambda text: text + text,
        lambda text: "",
        json.dumps,
        lambda t: f"{t[:10]} {t}",
    ],
)
def test_a_template_that_changes_the_message_is_refused(render):
    with pytest.raises(UserError, match="chat template changes the message"):
        prompt_format(Template(lambda text: f"<user>{render(text)}</user>"))


def test_a_template_that_trims_gets_what_it_would_leave(tmp_path):
    """As one device's chat has it, whatever stands at the ends of document and question."""
    folder = tmp_path / "model"
    shutil.copytree(chat_folder(), folder)
    (folder / "chat_template.jinja").write_text(
        TEMPLATE.replace("message['content']", "message['content'] | trim")
    )
    files = find_model(ModelConfig(path=str(folder)))
    document, question = "\n\n The ship. \n", " Whose ship?\n "
    message = {"role": "user", "content": f"{document}\n\n{question}"}
    whole = files.tokenizer.apply_chat_template(
        [message], tokenize=False, add_generation_prompt=True
    )
    ours = files.context_ids(document) + files.query_ids(question)
    assert files.tokenizer.decode(ours) == whole
    plain = find_model(ModelConfig(path=chat_folder()))
    assert plain.tokenizer.decode(plain.context_ids(document)).endswith(document)


def test_a_template_that_fails_is_refused():
    def fail(text):
        raise RuntimeError("no system message")

    with pytest.raises(UserError, match="its chat template fails: no system message"):
        prompt_format(Template(fail))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "weights lack 1 tensors, model.norm.weight"),
        (
            lambda w: w.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(96, 64)}),
            "do not fit the config: they also hold 1 tensors, model.layers.7",
        ),
        (lambda w: w.pop("lm_head.weight"), "weights lack 1 tensors, lm_head.weight"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path, change, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    files = find_model(ModelConfig(path=str(folder)))
    with pytest.raises(UserError, match=message):
        files.load(ModelConfig(), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_embeddings(tmp_path, rope):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    (folder / "config.json").write_text(json.dumps(config))
    ids, question = random_ids(90), random_ids(5)
    want = expected(str(folder), ids + question, 8)
    ring = LongContext.from_pretrained(
        str(folder), transport="threads", world_size=3, threads_per_rank=1
    )
    answer = ring.ask(ring.encode(ids), question, max_new_tokens=8)
    assert answer.ids == want.ids
    error = (answer.first_logits - want.logits_V).norm() / want.logits_V.norm()
    assert error <= 1e-5
