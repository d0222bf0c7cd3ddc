"""python -m pytest tests/ringstar/test_smollm2.py

Real weights: the same answers as plain Hugging Face on one device, in a real chat.
"""

import pytest
import torch

from launch.demo_text import FACTS, demo_document
from ringstar import LongContext
from ringstar.config import ModelConfig, StarConfig
from ringstar.models import find_model, smollm2
from ringstar.models.one_device import OneDevice
from tests.support.models import relative_error
from tests.support.star_oracle import anchored, first_anchor, star

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files():
    return find_model(ModelConfig(name="smollm2"))


def test_equal_to_one_device_on_a_real_document(files):
    template = len(files.context_ids(""))
    document = demo_document(lambda text: len(files.context_ids(text)) - template, 1200)
    context, fact = files.context_ids(document), FACTS[1]
    plain = OneDevice(files, torch.float32, torch.device("cpu"))
    plain.encode(context)
    want = plain.ask(files.query_ids(fact.question), 16)
    ring = LongContext.from_pretrained(
        str(files.folder), transport="threads", world_size=4, chunk_tokens=200, dtype="float32"
    )
    pieces: list[str] = []
    answer = ring.ask(
        ring.encode(document), fact.question, max_new_tokens=16, on_text=pieces.append
    )
    assert answer.ids == want.ids
    assert fact.expected in answer.text
    assert "".join(pieces) == answer.text
    assert relative_error(answer.first_logits, want.first_logits) < 1e-5


def test_star_is_its_oracle_on_a_real_document(files):
    template = len(files.context_ids(""))
    document = demo_document(lambda text: len(files.context_ids(text)) - template, 800)
    context, fact = files.context_ids(document), FACTS[2]
    query, block, anchor = files.query_ids(fact.question), 230, 100
    folder = str(files.folder)
    blocks = anchored(len(context), block, first_anchor(context, anchor))
    want = star(folder, context, query, blocks, 10)
    runtime = LongContext.from_pretrained(
        folder,
        strategy=StarConfig(block_size=block, anchor_size=anchor),
        transport="threads",
        world_size=3,
        dtype="float32",
    )
    answer = runtime.ask(runtime.encode(context), query, max_new_tokens=10)
    assert relative_error(answer.first_logits, want.first_V) < 1e-5
    assert answer.ids == want.ids


def test_the_split_prompt_is_the_chat_template(files):
    document, question = "It rained.\nAll day.", "What's the weather?"
    whole = files.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{document}\n\n{question}"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    split = files.context_ids(document) + files.query_ids(question)
    assert files.tokenizer.decode(split) == whole
    assert split == files.tokenizer.encode(whole, add_special_tokens=False)


def test_a_damaged_conversion_is_made_again(files, tmp_path, monkeypatch):
    made = []

    def convert(gguf, folder):
        made.append(folder)
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(smollm2, "_save", convert)
    folder = smollm2.smollm2_folder(str(tmp_path))
    assert smollm2.smollm2_folder(str(tmp_path)) == folder
    assert len(made) == 1
    (folder / "model.safetensors").write_bytes(b"weighty")
    smollm2.smollm2_folder(str(tmp_path))
    assert len(made) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        folder.name,
        f"{folder.name}.lock",
    ]


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(gguf, folder):
        (folder / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_save", fail)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2_folder(str(tmp_path))
    assert not (tmp_path / smollm2.FOLDER).exists()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
