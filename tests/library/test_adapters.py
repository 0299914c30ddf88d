import copy
import json

import numpy as np
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer

import tritern
from tritern import TernaryLinear, TriternError
from tritern.adapters import lora

TARGETS = {"target_modules": ["query", "value"], "r": 4}


@pytest.fixture
def ternary(tiny, tmp_path):
    """A saved ternary model, loaded."""
    tritern.patch(tiny).save_pretrained(str(tmp_path / "ternary"))
    return SentenceTransformer(str(tmp_path / "ternary"), device="cpu")


def train(model, texts):
    """A few steps towards other vectors; the first and the last loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    losses = []
    for _ in range(5):
        vectors = model(model.preprocess(texts))["sentence_embedding"]
        losses.append((vectors - torch.linspace(-2, 2, 32)).pow(2).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return losses[0].item(), losses[-1].item()


def test_an_adapter_is_trained_saved_and_loaded(ternary, texts, tmp_path):
    before = ternary.encode(texts)
    codes = [m.weight.clone() for m in ternary.modules() if isinstance(m, TernaryLinear)]
    ternary.add_adapter(lora(LoraConfig(**TARGETS)))
    assert np.array_equal(ternary.encode(texts), before)  # it starts as zero
    trainable = [n for n, p in ternary.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 2 and all("lora_" in n for n in trainable)
    first, last = train(ternary, texts)
    assert last < first
    after = ternary.encode(texts)
    assert not np.array_equal(after, before)
    assert all(
        torch.equal(m.weight, c)
        for m, c in zip((m for m in ternary.modules() if isinstance(m, TernaryLinear)), codes)
    )
    path = str(tmp_path / "adapter")
    ternary.save_pretrained(path)

    again = SentenceTransformer(str(tmp_path / "ternary"), device="cpu")
    assert np.array_equal(again.encode(texts), before)
    again.load_adapter(path, peft_config=lora(LoraConfig.from_pretrained(path)))
    assert np.array_equal(again.encode(texts), after)

    again = SentenceTransformer(str(tmp_path / "ternary"), device="cpu")
    config = lora(LoraConfig.from_pretrained(path))
    again[0].model = PeftModel.from_pretrained(again[0].model, path, config=config)
    assert np.array_equal(again.encode(texts), after)
    with pytest.raises(TriternError, match="cannot be merged into ternary weights"):
        again[0].model.merge_and_unload()
    plain = tritern.dequantize(again)
    adapted = plain.encode(texts)
    plain[0].model = plain[0].model.merge_and_unload()
    assert np.allclose(plain.encode(texts), adapted, atol=1e-5) and not np.allclose(
        adapted, before, atol=1e-2
    )


def test_summary_calls_adapters_by_their_name(ternary):
    get_peft_model(ternary[0].model, lora(LoraConfig(**TARGETS)))
    summary = tritern.summary(ternary)
    assert len(summary.layers) == 12
    assert [s.reason for s in summary.skipped] == ["adapter"] * 8 + ["pooler"]


@pytest.mark.filterwarnings("error:Unsupported layer type")
def test_configurations_that_need_the_weights_are_refused(ternary):
    model = ternary[0].model
    with pytest.raises(TriternError, match="init_lora_weights must be True, .*; received 'pissa'"):
        get_peft_model(model, lora(LoraConfig(**TARGETS, init_lora_weights="pissa")))
    with pytest.raises(TriternError, match="use_dora must be False"):
        get_peft_model(model, lora(LoraConfig(**TARGETS, use_dora=True)))
    with pytest.raises(TriternError, match="only plain LoRA works on ternary layers; .*ALora"):
        get_peft_model(model, lora(LoraConfig(**TARGETS, alora_invocation_tokens=[1])))
    with pytest.raises(TriternError, match="config must be a peft.LoraConfig; received dict"):
        lora({})


def test_a_model_that_carries_adapters_is_refused(tiny):
    tiny.add_adapter(LoraConfig(**TARGETS))
    before = {n: id(m) for n, m in tiny.named_modules()}
    with pytest.raises(
        TriternError, match=r"carries PEFT adapters \(4 modules, such as 0\.model\..*value\)\. Merge"
    ):
        tritern.patch(tiny)
    assert {n: id(m) for n, m in tiny.named_modules()} == before


def test_a_merged_model_is_patched(tiny, texts):
    model = get_peft_model(tiny[0].model, LoraConfig(**TARGETS, init_lora_weights=False))
    tiny[0].model = model.merge_and_unload()
    assert len(tritern.summary(tritern.patch(tiny)).layers) == 12
    assert np.isfinite(tiny.encode(texts)).all()


def test_adapters_of_a_model_that_no_folder_holds_are_not_saved(tiny, tiny_path, tmp_path):
    """Their base would be taken for the full-precision model that was patched."""
    refused = pytest.raises(
        TriternError, match="made ternary in memory.*Save the ternary model first, load it"
    )
    tritern.patch(tiny).add_adapter(lora(LoraConfig(**TARGETS)))
    loading = {"quantization_config": tritern.TernaryConfig()}
    loaded = SentenceTransformer(tiny_path, device="cpu", model_kwargs=loading)
    peft_model = get_peft_model(loaded[0].model, lora(LoraConfig(**TARGETS)))
    for model in (tiny, tiny[0].model, peft_model):
        with refused:
            model.save_pretrained(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter").exists()


def test_adapters_of_a_loaded_model_are_saved_by_peft_too(ternary, tmp_path):
    model = get_peft_model(ternary[0].model, lora(LoraConfig(**TARGETS)))
    model.save_pretrained(str(tmp_path / "adapter"))
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "ternary")


def added(model, config):
    model.add_adapter(config)


def wrapped(model, config):
    get_peft_model(model[0].auto_model, config)


@pytest.mark.parametrize("way", [added, wrapped])
@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LoraConfig(target_modules=["query"]), r"model.add_adapter\(tritern.adapters.lora\(peft.LoraConfig"),
        (LoHaConfig(target_modules=["query"]), "take LoRA adapters only"),
        (IA3Config(target_modules=["query"], feedforward_modules=[]), "take LoRA adapters only"),
        (LoraConfig(target_modules=["word_embeddings"]), "rounded tables take no adapters"),
        (lora(LoraConfig(target_modules=["word_embeddings"])), "rounded tables take no adapters"),
        (LoraConfig(target_modules="all-linear"), "'all-linear' finds each nn.Linear and no ternary layer"),
        (
            lora(LoraConfig(target_modules="all-linear")),
            "name the layers, such as target_modules=\\[",
        ),
    ],
)
def test_what_peft_refuses_names_the_way(tiny, texts, way, config, match):
    model = tritern.patch(tiny, embedding_bits=8)
    before = model.encode(texts)
    with pytest.raises(TriternError, match=match):
        way(model, config)
    assert np.array_equal(model.encode(texts), before)
    model.add_adapter(lora(LoraConfig(**TARGETS)))  # as if nothing had been tried


def test_other_models_take_every_adapter_and_error_of_peft(tiny):
    tritern.patch(copy.deepcopy(tiny))
    with pytest.raises(ValueError, match="(?i)target modules") as refused:
        get_peft_model(copy.deepcopy(tiny)[0].auto_model, LoraConfig(target_modules=["nowhere"]))
    assert not isinstance(refused.value, TriternError)
    get_peft_model(tiny[0].auto_model, LoraConfig(target_modules="all-linear"))
    assert sum("lora_A" in name for name, _ in tiny.named_parameters()) == 13
