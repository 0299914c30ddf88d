"""Layers of four bits beside ternary ones, and the choice of layers within a budget."""

import copy
import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import BertConfig

import tritern
from tests.library.test_fused import SIZES, batch, bert, decoder, model_of
from tests.library.test_save_load import change_settings
from tritern import Int4Linear, TernaryConfig, TernaryLinear, TriternError
from tritern.calibration import fitting, sensitivity
from tritern.checkpoint.digest import MANIFEST
from tritern.engine import fused
from tritern_kernels import reference

ATTENTION = {"*.attention.*": 4}


def bits_of(model):
    return {n: m.weight_bits for n, m in model.named_modules() if isinstance(m, TernaryLinear)}


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_a_layer_of_four_bits(activation_bits):
    linear = nn.Linear(130, 50)
    layer = Int4Linear.from_linear(linear, activation_bits=activation_bits)
    codes, scale = reference.round_int4(linear.weight.detach())
    assert layer.weight.shape == (50, 128) and torch.equal(layer.packed().codes(), codes)
    x = torch.randn(4, 130)
    exact = reference.linear(x, codes, scale, linear.bias.detach(), activation_bits)
    assert torch.allclose(layer(x).double(), exact, atol=1e-5)
    assert type(TernaryLinear.from_packed(layer.packed(), layer.bias)) is Int4Linear
    again = Int4Linear.from_linear(layer.to_linear())
    assert torch.equal(again.weight, layer.weight) and torch.allclose(again.weight_scale, layer.weight_scale)
    x.requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.packed().dequantize().sum(0).expand(4, -1), rtol=1e-4, atol=1e-5)
    with pytest.raises(TriternError, match=r"codes of a Int4Linear are constants.*Int4Linear.from_linear"):
        layer.requires_grad_()


def test_rounding_to_four_bits_finds_near_the_best_scale():
    weight = torch.randn(20, 300)
    weight[0], weight[1, 3] = 0, 40.0  # nothing at all; an outlier
    codes, scale = reference.round_int4(weight)
    assert codes.abs().max() == 7 and not codes[0].any() and scale[0] == 0

    def error(factor):
        s = (weight.abs().amax(1) * factor / 7)[1:, None]
        return (((weight[1:] / s).round().clamp(-7, 7) * s - weight[1:]) ** 2).sum(1)

    best = torch.stack([error(f) for f in torch.linspace(0.1, 1.2, 300).tolist()]).amin(0)
    found = ((codes * scale[:, None] - weight) ** 2).sum(1)[1:]
    assert (found[1:] <= 1.02 * best[1:]).all() and found[0] <= 1.2 * best[0]


def test_patterns_choose_layers_and_summary_shows_them(tiny, sentences):
    texts = sentences[:50]
    original = tiny.encode(texts)
    two, four, some = (copy.deepcopy(tiny) for _ in range(3))
    tritern.patch(two)
    tritern.patch(four, weight_bits=4)
    tritern.patch(some, weight_bits=ATTENTION | {"*.layer.1.attention.self.key": 2})
    assert set(bits_of(two).values()) == {2} and set(bits_of(four).values()) == {4}
    expected = {n: 4 if ".attention." in n and "1.attention.self.key" not in n else 2 for n in bits_of(some)}
    assert bits_of(some) == expected

    def cosine(model):
        return tritern.evaluate(model, original, texts).cosine

    assert cosine(four) > max(cosine(some), 0.97) and cosine(some) > cosine(two)
    shown = str(tritern.summary(some))
    assert "(4 bits)" in shown and "all packed layers" in shown and "bits per packed weight" in shown
    assert "all ternary layers" in str(tritern.summary(two))
    sizes = [tritern.summary(m).linear_bytes_after for m in (two, some, four)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_saved_and_loaded_with_their_bits(tiny, sentences, tmp_path):
    texts = sentences[:50]
    tritern.patch(tiny, weight_bits=ATTENTION)
    tiny.save_pretrained(str(tmp_path / "copy"))
    config = json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]
    assert len(config["int4_modules"]) == 8 and all(".attention." in n for n in config["int4_modules"])
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "4 linear layers hold weights in {-1, 0, +1}" in card and "8 hold weights from -7 to 7" in card
    loaded = SentenceTransformer(str(tmp_path / "copy"), device="cpu")
    assert bits_of(loaded) == bits_of(tiny) and (loaded.encode(texts) == tiny.encode(texts)).all()
    dense = tritern.dequantize(loaded)
    assert not bits_of(dense) and tritern.evaluate(dense, tiny, texts).cosine > 0.999
    (tmp_path / "copy" / MANIFEST).unlink()
    change_settings(tmp_path / "copy", int4_modules=[])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # packed bytes of another width
        SentenceTransformer(str(tmp_path / "copy"), device="cpu")


@pytest.mark.parametrize("all_layers", [False, True])
@pytest.mark.parametrize(("make", "some"), [(bert, "*.attention.*"), (decoder, "*.self_attn.*")])
def test_blocks_of_such_layers_are_fused(make, some, all_layers, device, on_gpu):
    plain = tritern.dequantize(make(device))
    model = tritern.patch(plain, weight_bits=4 if all_layers else {some: 4})
    with torch.inference_mode():
        expected = model(**batch(device)).last_hidden_state
        assert len(fused.fused_blocks(tritern.fuse(model))) == 2
        got = model(**batch(device)).last_hidden_state
    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.9995
    assert len(on_gpu) == 2


def test_products_with_one_input_and_different_bits_run_unfused(device, on_gpu):
    model = model_of(BertConfig(**SIZES), device, weight_bits={"*.query": 4})
    with pytest.raises(TriternError, match="no block|cannot"), torch.inference_mode():
        tritern.fuse(model)
    assert model(**batch(device)).last_hidden_state.isfinite().all()


def test_a_budget_widens_what_loses_most(tiny, sentences, monkeypatch):
    original = copy.deepcopy(tiny)
    layer = tiny[0].auto_model.encoder.layer[1].output.dense
    with torch.no_grad():
        layer.weight[:, 0] += 3.0  # an outlier: ternary rows can hold little else
    damaged = copy.deepcopy(tiny)
    tritern.patch(tiny, bits=2.5, calibration_texts=sentences[:64])
    found = bits_of(tiny)
    sizes = {n: original.get_submodule(n).weight.numel() for n in found}
    average = sum(b * sizes[n] for n, b in found.items()) / sum(sizes.values())
    assert 2.3 < average <= 2.5
    assert found["0.model.encoder.layer.1.output.dense"] == 4
    for i in range(2):  # layers with one input have the same bits, so that they stay one product
        own = [b for n, b in found.items() if f"layer.{i}.attention.self" in n]
        assert len(set(own)) == 1
    two = tritern.patch(copy.deepcopy(damaged), calibration_texts=sentences[:64])
    assert (
        tritern.evaluate(tiny, damaged, sentences[200:]).cosine
        > tritern.evaluate(two, damaged, sentences[200:]).cosine
    )
    for bits, expected in ((2, {2}), (4, {4}), (2.0001, {2})):
        other = tritern.patch(copy.deepcopy(original), bits=bits, calibration_texts=sentences[:32])
        assert set(bits_of(other).values()) == expected


def test_what_is_refused(tiny, sentences):
    before = {n: id(m) for n, m in tiny.named_modules()}
    for settings, match in (
        ({"bits": 1.5}, r"from 2 \(all ternary\) to 4 .*received 1.5"),
        ({"bits": 4.5}, "received 4.5"),
        ({"bits": "2"}, "bits must be a number; received '2'"),
        ({"bits": float("nan")}, "bits must be finite"),
        ({"bits": 2.5, "calibration_texts": None}, "bits goes with calibration_texts"),
        ({"bits": 2.5, "weight_bits": 4}, "leave one of the two out"),
        ({"weight_bits": 3}, "weight_bits must be 2 or 4; received 3"),
        ({"weight_bits": {"*.query": 8}}, r"weight_bits\['\*.query'\] must be 2 or 4; received 8"),
        ({"weight_bits": {5: 4}}, "must map names or patterns to bits; received 5"),
        ({"weight_bits": {"*.nothing": 4}}, "matches no ternary layer. Names look like .0.model"),
        ({"calibration_folder": "x", "calibration_texts": None}, "calibration_folder goes with"),
    ):
        with pytest.raises(TriternError, match=match):
            tritern.patch(tiny, **({"calibration_texts": sentences[:20]} | settings))
    assert {n: id(m) for n, m in tiny.named_modules()} == before
    assert TernaryConfig(weight_bits={"a": 4}).to_dict()["weight_bits"] == {"a": 4}


def test_an_interrupted_calibration_goes_on(tiny, tiny_path, sentences, tmp_path, monkeypatch):
    def patched(folder=None, texts=sentences[:40], **settings):
        model = SentenceTransformer(tiny_path, device="cpu")
        return tritern.patch(
            model, bits=3, calibration_texts=texts, calibration_folder=folder, **settings
        ).state_dict()

    expected, fitted = patched(), []

    def fit(*arguments, fit=fitting._fit_alike):
        fitted.append(arguments)
        return fit(*arguments) if len(fitted) != 13 else 1 / 0

    monkeypatch.setattr(fitting, "_fit_alike", fit)
    with pytest.raises(ZeroDivisionError):
        patched(tmp_path / "kept")
    with monkeypatch.context() as once:
        once.setattr(sensitivity, "_changes", None)  # the choice is kept
        found = patched(tmp_path / "kept")
    assert len(fitted) == 8 + 8 + 1  # the groups' sensitivity, every group, the one that failed
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    patched(tmp_path / "kept")
    assert len(fitted) == 17
    for change in ({"texts": sentences[:41]}, {"rule": "twn"}):
        with pytest.raises(TriternError, match="holds something else: the calibration of another model"):
            patched(tmp_path / "kept", **change)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(TriternError, match="Name an empty folder"):
        patched(tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(TriternError, match="calibration_folder must be"):
        patched(tmp_path / "file")


def test_training_refuses_four_bits(tiny, sentences):
    from tritern.distillation.student import reopen

    with pytest.raises(TriternError, match="only two-bit weights can be trained on"):
        reopen(tritern.patch(tiny, weight_bits=4), 0.9)


def test_texts_and_layers_that_do_not_fit_are_named(tiny, sentences, caplog):
    tritern.patch(copy.deepcopy(tiny), calibration_texts=sentences[:32])
    assert not caplog.records
    strange = [f"{text} zzz qqq xxx" for text in sentences[:32]]
    tritern.patch(copy.deepcopy(tiny), calibration_texts=strange)
    assert "are unknown to the model's tokenizer: the texts may be in a language" in caplog.text
    caplog.clear()
    damaged = copy.deepcopy(tiny)
    damaged[0].auto_model.encoder.layer[0].attention.output.LayerNorm.bias.data[0] = float("nan")
    tritern.patch(damaged, calibration_texts=sentences[:32])
    assert "8 of 12 layers could not be fitted" in caplog.text and "NaN" in caplog.text
    assert "intermediate.dense" in caplog.text
