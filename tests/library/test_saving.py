"""What is saved is what is there, wherever it is saved; what could not be loaded again is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertModel

import tritern
from tritern import CheckpointError, TernaryLinear, TriternError
from tritern.checkpoint.digest import EDITABLE, MANIFEST, resealed

from .cli import run


@pytest.fixture
def saved(tiny, tmp_path):
    tritern.patch(tiny).save_pretrained(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_layers_changed_after_patching_are_saved_as_they_are(tiny, sentences, tmp_path):
    layer = "0.model.encoder.layer.1.output.dense"
    tritern.patch(tiny)
    tiny.set_submodule(layer, tiny.get_submodule(layer).to_linear())
    ternary_layers = [m for m in tiny.modules() if isinstance(m, TernaryLinear)]
    for module in ternary_layers:
        module.activation_bits = 16
    tiny.save_pretrained(str(tmp_path / "changed"))
    loaded = SentenceTransformer(str(tmp_path / "changed"), device="cpu")
    assert np.array_equal(loaded.encode(sentences[:20]), tiny.encode(sentences[:20]))
    assert type(loaded.get_submodule(layer)) is torch.nn.Linear
    ternary_layers[3].activation_bits = 8
    mixed = "activation_bits must be the same .*; they are 16 in .* and 8 in encoder"
    with pytest.raises(TriternError, match=mixed):
        tiny.save_pretrained(str(tmp_path / "mixed"))


def small_bert():
    return BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99
    )


def test_parts_of_a_patched_model(tmp_path):
    """What was patched need not be what is saved: its part, or the model around it."""
    ids = torch.arange(5, 25)[None]
    outer = tritern.patch(BertForMaskedLM(small_bert()).eval())
    around = BertModel(small_bert()).eval()
    tritern.patch(around.encoder)
    for name, model in {"part": outer.bert, "outer": outer, "around": around}.items():
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name)
        assert len(tritern.summary(loaded).layers) == 12
        assert torch.equal(loaded(ids)[0], model(ids)[0])
    tritern.dequantize(outer).bert.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / MANIFEST).exists()
    assert not tritern.summary(BertModel.from_pretrained(tmp_path / "plain")).layers


def test_what_cannot_be_saved(tiny, tmp_path):
    tiny.append(Dense(32, 16))
    tritern.patch(tiny)
    with pytest.raises(TriternError, match="safe_serialization must be True for ternary models"):
        tiny.save_pretrained(str(tmp_path / "pickled"), safe_serialization=False)
    with pytest.raises(TriternError, match="save_original_format must be True for ternary models"):
        tiny[0].auto_model.save_pretrained(tmp_path / "pickled", save_original_format=False)
    assert not (tmp_path / "pickled").exists()


def test_the_users_own_card_stays(saved, tmp_path):
    (saved / "README.md").write_text("---\ntags: [mine]\n---\n# My model\n")
    SentenceTransformer(str(saved), device="cpu").save_pretrained(str(tmp_path / "again"))
    assert "# My model" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_as_readable_as_any_others(tiny, tiny_path, tmp_path, umask, mode):
    tiny.append(Dense(32, 16))
    before = os.umask(umask)
    try:
        tritern.patch(tiny).save_pretrained(str(tmp_path / "st"))
        tiny[0].auto_model.save_pretrained(tmp_path / "auto", max_shard_size="10KB")
        run("convert", tiny_path, tmp_path / "dense", "--format", "dense")
    finally:
        os.umask(before)
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert {f.stat().st_mode & 0o777 for f in files} == {mode}
    assert len([f for f in files if f.suffix == ".safetensors"]) > 5


def test_prompts_and_the_card_may_be_edited(saved, texts):
    before = SentenceTransformer(str(saved), device="cpu").encode(["ba da " + text for text in texts])
    (saved / "README.md").write_text("# Mine\n")
    file = saved / EDITABLE
    sums = json.loads((saved / MANIFEST).read_text())["sha256"]
    for known in (sums, {**sums, EDITABLE: "0" * 64}):  # as folders were sealed once
        (saved / MANIFEST).write_text(json.dumps({"sha256": known}))
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "prompts": {"query": "ba da "}, "similarity_fn_name": "dot"}))
        model = SentenceTransformer(str(saved), device="cpu")
        assert model.similarity_fn_name == "dot"
        assert np.array_equal(model.encode_query(texts), before)
    model.save_pretrained(str(saved))
    assert SentenceTransformer(str(saved), device="cpu").prompts["query"] == "ba da "


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"],
)
def test_what_changes_vectors_is_sealed(saved, name):
    file = saved / name
    file.write_text(file.read_text() + "\n")
    match = f"{file} is not the file that was saved.*`tritern info {saved} --seal`"
    with pytest.raises(CheckpointError, match=match):
        SentenceTransformer(str(saved), device="cpu")
    manifest = (saved / MANIFEST).read_text()
    with pytest.raises(RuntimeError, match="no good"):
        with resealed(saved):
            raise RuntimeError("no good")
    assert (saved / MANIFEST).read_text() == manifest
    with resealed(saved) as changed:
        SentenceTransformer(str(saved), device="cpu")
    assert changed == [name] and not list(saved.glob(f"{MANIFEST}.*"))
    with resealed(saved) as changed:
        assert changed == []
    (saved / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=f"{saved} holds no {MANIFEST}.*save it again"):
        with resealed(saved):
            pass


def test_folders_that_hold_something_already(tiny, sentences, tmp_path, monkeypatch):
    """A link to nothing, another model, the same one; by a relative name and through a link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "gone.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    tiny.save_pretrained(Path("link"))
    vectors = tritern.patch(tiny, embedding_bits=8).encode(sentences[:20])
    for _ in range(2):
        tiny.save_pretrained(Path("link"))
        assert (tmp_path / "real" / MANIFEST).exists()
        for folder in ("link", str(tmp_path / "real")):
            assert np.array_equal(SentenceTransformer(folder, device="cpu").encode(sentences[:20]), vectors)


def test_other_processes_than_the_main_one_write_nothing(saved, tmp_path):
    model = AutoModel.from_pretrained(saved)
    folder = tmp_path / "again"
    model.save_pretrained(folder, False)  # is_main_process, by its place
    assert not list(folder.iterdir())
    model.save_pretrained(folder, True, None, False, "10KB")
    assert (folder / MANIFEST).exists() and len(list(folder.glob("model-*.safetensors"))) > 2
