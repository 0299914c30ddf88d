import json

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import nn

import tritern
from tests.conftest import TEXTS
from tritern import TernaryLinear, TriternError
from tritern.adapters import lora
from tritern.nn.embedding import QuantizedEmbedding
from tritern.nn.linear import RMSNorm

from .forks import run_script

LOAD = """
import sys
from pathlib import Path
import numpy
from sentence_transformers import SentenceTransformer
for folder in map(Path, sys.argv[1:]):
    model = SentenceTransformer(str(folder / "plain"), device="cpu")
    numpy.save(folder / "vectors.npy", model.encode((folder / "texts").read_text().split("|")))
assert not any(name.startswith("tritern") for name in sys.modules)
"""


def test_dequantized_models_load_without_tritern(tiny_path, tmp_path):
    """With tables of 4, 8 and 16 bits; one new process loads the three."""
    expected = {}
    for embedding_bits in (4, 8, 16):
        folder = tmp_path / str(embedding_bits)
        model = SentenceTransformer(tiny_path, device="cpu")
        tritern.patch(model, activation_bits=16, embedding_bits=embedding_bits)
        vectors = model.encode(TEXTS)
        assert tritern.dequantize(model) is model
        assert not any(isinstance(m, (TernaryLinear, QuantizedEmbedding)) for m in model.modules())
        expected[folder] = model.encode(TEXTS)
        np.testing.assert_allclose(expected[folder], vectors, rtol=0, atol=1e-5)
        model.save_pretrained(str(folder / "plain"))
        (folder / "texts").write_text("|".join(TEXTS))
    result = run_script(LOAD, *expected, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    for folder, vectors in expected.items():
        assert np.array_equal(np.load(folder / "vectors.npy"), vectors)


def test_no_trace_of_the_format_is_saved(tiny, tmp_path):
    model = tritern.patch(tiny)
    model.save_pretrained(str(tmp_path / "ternary"))
    tritern.dequantize(model).save_pretrained(str(tmp_path / "plain"))
    files = {f.name for f in (tmp_path / "plain").iterdir()}
    assert not any("tritern" in f for f in files)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    settings = json.loads((tmp_path / "plain" / "config_sentence_transformers.json").read_text())
    assert "requirements" not in settings
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "12 linear layers were ternary" in card and "tritern" not in card
    assert "import tritern" in (tmp_path / "ternary" / "README.md").read_text()


def test_weights_are_scale_times_codes_in_the_models_dtype(tiny):
    model = tritern.patch(tiny.half())
    layer = model[0].model.encoder.layer[0].output.dense
    expected, bias = layer.packed().dequantize(torch.float16), layer.bias
    dense = tritern.dequantize(model)[0].model.encoder.layer[0].output.dense
    assert type(dense) is nn.Linear and torch.equal(dense.weight, expected) and torch.equal(dense.bias, bias)


def test_a_loaded_model_can_be_dequantized(tiny, tmp_path):
    tritern.patch(tiny, activation_bits=16).save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    vectors = loaded.encode(TEXTS)
    np.testing.assert_allclose(tritern.dequantize(loaded).encode(TEXTS), vectors, rtol=0, atol=1e-5)


def test_shared_layers_and_weights_stay_shared():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    model["d"] = model["c"]
    calls = []
    model["c"].register_forward_hook(lambda *_: calls.append(1))
    tritern.dequantize(tritern.patch(model))
    assert model["a"].weight is model["b"].weight and model["a"].bias is not model["b"].bias
    assert model["c"] is model["d"] and model["c"].weight is not model["a"].weight
    model["c"](torch.ones(8))
    assert calls == [1]


def test_the_card_names_the_class_that_loads_the_model(tiny_path):
    model = CrossEncoder(tiny_path, device="cpu", num_labels=1)
    around = nn.ModuleDict({"model": tritern.patch(model)})
    tritern.dequantize(around)
    assert 'model = CrossEncoder("path/to/this/folder")' in model._model_card_text
    assert "Dequantized ternary version" in model._model_card_text


def test_a_model_with_adapters(tiny):
    peft = pytest.importorskip("peft")
    model = tritern.patch(tiny, activation_bits=16)
    model.add_adapter(lora(peft.LoraConfig(target_modules=["query"], init_lora_weights=False, lora_alpha=32)))
    vectors = model.encode(TEXTS)
    tritern.dequantize(model)
    assert type(model[0].model.encoder.layer[0].attention.self.query.base_layer) is nn.Linear
    np.testing.assert_allclose(model.encode(TEXTS), vectors, rtol=0, atol=1e-5)


def test_what_cannot_be_dequantized_is_refused(tiny):
    with pytest.raises(TriternError, match="received the name 'minilm-ternary': load it first"):
        tritern.dequantize("minilm-ternary")
    with pytest.raises(TriternError, match="no ternary layer or rounded table inside SentenceTransformer"):
        tritern.dequantize(tiny)
    with pytest.raises(TriternError, match="to_linear"):
        tritern.dequantize(TernaryLinear(8, 8))
    model = tritern.patch(tiny)[0].model
    layer = model.encoder.layer[0].output.dense
    layer.norm = RMSNorm(64, 1e-6)
    with pytest.raises(TriternError, match="encoder.layer.0.output.dense has an RMSNorm .* plain BertModel"):
        tritern.dequantize(model)
    assert model.encoder.layer[0].output.dense is layer
