"""What users do with a ternary model, in memory and on disk: the vectors stay the same. For compiled and
exported ones see test_compiled_model.py.
"""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

import tritern
from tritern import CheckpointError, TernaryLinear, TriternError
from tritern.checkpoint.digest import EDITABLE, MANIFEST, sealed
from tritern.nn.embedding import QuantizedEmbedding


@pytest.fixture(scope="module", params=[8, 4])
def embedding_bits(request):
    return request.param


@pytest.fixture(scope="module")
def ternary(tiny_path, embedding_bits):
    """Ternary layers, a rounded table and a prompt. Not to be changed."""
    model = SentenceTransformer(tiny_path, device="cpu", prompts={"query": "bab dad "})
    return tritern.patch(model, embedding_bits=embedding_bits)


@pytest.fixture(scope="module")
def saved(ternary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("round_trips") / "model"
    ternary.save_pretrained(str(folder))
    return folder


@pytest.fixture
def same(ternary, sentences):
    """Whether another model, or a folder, gives the vectors of ``ternary``."""
    expected = ternary.encode(sentences[:20])

    def compare(other, **options):
        if not isinstance(other, SentenceTransformer):
            other = SentenceTransformer(str(other), **{"device": "cpu", **options})
        return np.array_equal(other.encode(sentences[:20]), expected)

    return compare


def inner(model):
    return model[0].auto_model


def requirements(folder):
    return json.loads((Path(folder) / "config_sentence_transformers.json").read_text()).get("requirements")


def test_saved_again_it_still_asks_for_tritern(saved, same, tmp_path):
    again = SentenceTransformer(str(saved), device="cpu")
    again.save_pretrained(str(tmp_path / "again"))
    assert requirements(tmp_path / "again") == requirements(saved) == {"tritern": ">=0.1"}
    assert same(tmp_path / "again")
    assert (tmp_path / "again" / MANIFEST).read_text() == (saved / MANIFEST).read_text()


def test_the_card_of_a_model_patched_while_loading_is_its_own(tiny_path, tmp_path):
    options = {"quantization_config": tritern.TernaryConfig("twn", 16)}
    SentenceTransformer(tiny_path, device="cpu", model_kwargs=options).save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert (
        "Scores published for the original do not hold" in card and "`twn`);\nactivations are 16-bit" in card
    )


def test_other_models_are_saved_as_ever(ternary, tiny_path, tmp_path):
    SentenceTransformer(tiny_path, device="cpu").save_pretrained(str(tmp_path / "st"))
    AutoModel.from_pretrained(tiny_path).save_pretrained(tmp_path / "auto")
    assert not list(tmp_path.rglob(MANIFEST)) and requirements(tmp_path / "st") is None


def test_shards(ternary, saved, same, tmp_path):
    model = SentenceTransformer(str(saved), device="cpu")
    model.save_pretrained(str(tmp_path))
    inner(model).save_pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / "model.safetensors").unlink()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2 and same(tmp_path)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_map(saved, tiny_path, same, device_map, embedding_bits):
    assert same(saved, device=None, model_kwargs={"device_map": device_map})
    patched = AutoModel.from_pretrained(
        tiny_path,
        quantization_config=tritern.TernaryConfig(embedding_bits=embedding_bits),
        device_map=device_map,
    )
    loaded = AutoModel.from_pretrained(saved)
    assert all(torch.equal(t, loaded.state_dict()[k]) for k, t in patched.state_dict().items())


def test_offloaded_weights(saved, tiny_path, tmp_path, sentences):
    """Layers on disk are read when they run; they can neither be patched nor saved from there."""
    modules = ["embeddings", "encoder.layer.1", "pooler"]
    options = {
        "device_map": {**dict.fromkeys(modules, "cpu"), "encoder.layer.0": "disk"},
        "offload_folder": str(tmp_path),
    }
    ids = torch.arange(5, 25)[None]
    model = AutoModel.from_pretrained(saved, **options)
    assert model.encoder.layer[0].output.dense.bias.is_meta
    with torch.inference_mode():
        assert torch.equal(model(ids)[0], AutoModel.from_pretrained(saved)(ids)[0])
    with pytest.raises(TriternError, match="on the meta device: load the model without offloading"):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(TriternError, match="on the meta device: load the weights before patching"):
        AutoModel.from_pretrained(tiny_path, quantization_config=tritern.TernaryConfig(), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "auto"])
def test_dtypes(saved, sentences, dtype):
    loaded = SentenceTransformer(str(saved), device="cpu", model_kwargs={"dtype": dtype})
    other = SentenceTransformer(str(saved), device="cpu")
    if dtype != "auto":
        other.to(dtype)
    kinds = {type(m): m for m in loaded.modules()}
    assert kinds[TernaryLinear].weight.dtype == torch.uint8
    assert kinds[TernaryLinear].weight_scale.dtype == torch.float32
    (table,) = (m for kind, m in kinds.items() if issubclass(kind, QuantizedEmbedding))
    assert table.weight_scale.dtype == other.dtype
    assert np.array_equal(loaded.encode(sentences[:8]), other.encode(sentences[:8]))
    assert np.array_equal(loaded.half().encode(sentences[:8]), other.half().encode(sentences[:8]))


def test_float64_is_refused(ternary, sentences):
    model = copy.deepcopy(ternary).double()
    with pytest.raises((TypeError, ValueError), match="float64"):
        model.encode(sentences[:2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(saved):
    with pytest.raises((AssertionError, RuntimeError), match="(?i)cuda|nvidia"):
        SentenceTransformer(str(saved), device="cuda")


def test_inputs_on_another_device(ternary):
    layer = copy.deepcopy(next(m for m in ternary.modules() if isinstance(m, TernaryLinear))).to("meta")
    with pytest.raises(ValueError, match="x is on cpu and the weight on meta; move one with"):
        layer(torch.zeros(2, layer.in_features))


def test_deepcopy_and_pickle(ternary, same, tmp_path):
    loaded = pickle.loads(pickle.dumps(ternary))
    for twin in (copy.deepcopy(ternary), loaded):
        assert same(twin)
        twin.save_pretrained(str(tmp_path))
        assert same(tmp_path) and requirements(tmp_path)
    torch.save(ternary, tmp_path / "whole.pt")
    assert same(torch.load(tmp_path / "whole.pt", weights_only=False))


def test_state_dicts(ternary, tiny_path, same, tmp_path, embedding_bits):
    torch.save(ternary.state_dict(), tmp_path / "state.pt")
    other = tritern.patch(SentenceTransformer(tiny_path, device="cpu"), embedding_bits=embedding_bits)
    for layer in other.modules():
        if isinstance(layer, (TernaryLinear, QuantizedEmbedding)):
            layer.weight.zero_()
    assert not same(other)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(other)


def test_encode_options(ternary, saved, sentences):
    loaded, texts = SentenceTransformer(str(saved), device="cpu"), sentences[:30]
    vectors = ternary.encode(texts, prompt_name="query")
    assert np.array_equal(loaded.encode(texts, prompt_name="query"), vectors)
    assert np.array_equal(loaded.encode(texts, prompt="bab dad "), vectors)
    assert not np.array_equal(loaded.encode(texts), vectors)
    for options in (
        {"truncate_dim": 16},
        {"normalize_embeddings": True},
        {"output_value": "token_embeddings"},
    ):
        for a, b in zip(loaded.encode(texts, **options), ternary.encode(texts, **options)):
            assert np.array_equal(a, b)
    cut = loaded.encode(texts, truncate_dim=16)
    assert np.array_equal(cut, loaded.encode(texts)[:, :16])
    for precision, width in (("int8", 32), ("uint8", 32), ("binary", 4), ("ubinary", 4)):
        found = loaded.encode(texts, precision=precision)
        assert found.shape == (30, width) and found.dtype.itemsize == 1
        assert np.array_equal(found, ternary.encode(texts, precision=precision))


@pytest.mark.parametrize("embedding_bits", [4], indirect=True)
def test_several_processes(saved, ternary, sentences):
    model = SentenceTransformer(str(saved), device="cpu")
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = model.encode(sentences[:40], pool=pool, chunk_size=10)
    finally:
        model.stop_multi_process_pool(pool)
    # a pool is left to sentence-transformers
    parts = [sentences[i : i + 10] for i in range(0, 40, 10)]
    chunks = [SentenceTransformer.encode(ternary, part) for part in parts]
    assert np.array_equal(found, np.concatenate(chunks))


def test_data_parallel_without_a_gpu(ternary):
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        expected = inner(ternary)(ids)[0]
        assert torch.equal(torch.nn.DataParallel(inner(ternary))(ids)[0], expected)


def test_a_module_with_two_names_is_dequantized_under_both(tmp_path):
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99
    )
    model = BertModel(config)
    model.encoder.layer[1] = model.encoder.layer[0]
    tritern.patch(model)
    model.config.dtype = "float16"  # as it is after save_pretrained of another model with this configuration
    model.dequantize()
    assert not tritern.summary(model).layers and model.encoder.layer[1] is model.encoder.layer[0]
    assert model.encoder.layer[0].output.dense.weight.dtype == torch.float16


def test_dequantized_by_transformers(saved, tmp_path):
    model = AutoModel.from_pretrained(saved)
    layer = model.encoder.layer[0].output.dense
    assert model.hf_quantizer.is_serializable()
    weight = layer.packed().dequantize()
    model.dequantize()
    assert torch.equal(model.encoder.layer[0].output.dense.weight, weight)
    model.save_pretrained(tmp_path)
    plain = AutoModel.from_pretrained(tmp_path)
    assert not tritern.summary(plain).layers and "quantization_config" not in plain.config.to_dict()
    assert not (tmp_path / MANIFEST).exists()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose uploads end in a local folder."""
    import shutil
    from types import SimpleNamespace

    import huggingface_hub

    folder = tmp_path / "hub"

    def upload_folder(self, *, folder_path, **_):
        shutil.copytree(folder_path, folder, dirs_exist_ok=True)
        return SimpleNamespace(commit_url="commit")

    def create_commit(self, *args, operations=(), **_):
        for operation in operations:
            (folder / operation.path_in_repo).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(operation.path_or_fileobj, folder / operation.path_in_repo)
        return SimpleNamespace(commit_url="commit")

    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(api, "upload_folder", upload_folder)
    monkeypatch.setattr(api, "create_commit", create_commit)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def test_push_to_hub(ternary, hub, same, monkeypatch):
    from sentence_transformers.base import model as base

    monkeypatch.setattr(base, "load_file_path", lambda *_, **__: None)  # looks for a model card
    copy.deepcopy(ternary).push_to_hub("me/ternary")
    assert (hub / MANIFEST).exists() and requirements(hub) and same(hub)


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_push_a_transformers_model_to_the_hub(saved, hub, tmp_path, monkeypatch, how):
    import transformers.utils.hub

    card = lambda *_, **__: transformers.utils.hub.ModelCard("---\n---\n")  # noqa: E731
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", card)
    model = AutoModel.from_pretrained(saved)
    if how == "push_to_hub":
        model.push_to_hub("me/ternary")
    else:
        model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="me/ternary")
    assert "config.json" in json.loads((hub / MANIFEST).read_text())["sha256"]
    loaded = AutoModel.from_pretrained(hub).state_dict()
    assert all(torch.equal(t, loaded[k]) for k, t in model.state_dict().items())


def test_a_manifest_lists_what_the_save_wrote(saved, tmp_path):
    sums = json.loads((saved / MANIFEST).read_text())["sha256"]
    files = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    assert files - sums.keys() == {"README.md", "model.safetensors", EDITABLE, MANIFEST}
    for name in ("notes.json", "run.log", "1_Pooling/old.json"):  # there before, or no part of a model
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "checkpoint-1").mkdir()
    with sealed(tmp_path):
        for name in ("config.json", "run.log", "notes.txt", "vocab.txt", "checkpoint-1/config.json"):
            (tmp_path / name).write_text("written")
    assert set(json.loads((tmp_path / MANIFEST).read_text())["sha256"]) == {"config.json", "vocab.txt"}


def test_files_that_are_not_there_yet(saved, same, tmp_path):
    """A hub's cache: links to blobs, with only the files that were asked for."""
    (tmp_path / "snapshot" / "1_Pooling").mkdir(parents=True)
    for file in saved.rglob("*"):
        if file.is_file() and file.name != "sentence_bert_config.json":
            (tmp_path / "snapshot" / file.relative_to(saved)).symlink_to(file)
    assert same(tmp_path / "snapshot")


def test_a_model_below_another_ones_folder(saved, same, tmp_path):
    """The manifest above is not that of the model below."""
    import shutil

    shutil.copytree(saved, tmp_path / "outer")
    shutil.copytree(saved, tmp_path / "outer" / "inner")
    (tmp_path / "outer" / "config.json").write_text("{}")
    assert same(tmp_path / "outer" / "inner")
    with pytest.raises(CheckpointError, match="outer/config.json is not the file that was saved"):
        AutoModel.from_pretrained(tmp_path / "outer", config=AutoConfig.from_pretrained(saved))
