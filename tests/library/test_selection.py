import warnings

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module
from torch import nn
from transformers import DebertaConfig, DebertaModel, WavLMConfig, WavLMModel

import tritern
from tritern import TriternError
from tritern.selection import common_name, select_linears, starred


def reasons(model):
    return {starred(c.name): c.reason for c in select_linears(model)}


class Experts(nn.Module):
    """A mixture of experts as custom code writes it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.shared_expert_gate = nn.Linear(32, 1)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(32, 64), nn.Linear(32, 64)


def test_routers_stay_and_gates_of_an_mlp_do_not():
    assert reasons(nn.Sequential(Experts(), Gated())) == {
        "*.gate": "",  # the MLP's, which comes last
        "*.shared_expert_gate": "router of experts",
        "*.experts.*": "",
        "*.up": "",
    }
    assert reasons(Experts())["gate"] == "router of experts"


def test_weights_that_are_computed_stay():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = torch.nn.utils.weight_norm(nn.Linear(8, 8))
    new = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(old, new, nn.Linear(8, 8))
    assert list(reasons(nn.ModuleList([old])).values()) == [
        "its weight is computed anew at each call (weight_norm, spectral_norm or the like)"
    ]
    assert list(reasons(nn.ModuleList([new])).values()) == ["subclass of nn.Linear: ParametrizedLinear"]
    x = torch.randn(2, 8)
    expected = model[:2](x)
    assert torch.equal(tritern.patch(model)[:2](x), expected)


class ReadsInside(nn.Module):
    """Whatever a method does with a weight, unless it makes the weights ready."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.nested = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        nn.init.ones_(self.called.weight)

    def reset_parameters(self):
        self.called.weight.data.zero_()

    def _products(self, x):
        return [w @ x for w in (lambda: [self.nested.weight])()]

    def forward(self, x):
        return self.called(x).to(self.read.weight.dtype) + self._products(x)[0]


class InheritsForward(ReadsInside):
    pass


@pytest.mark.parametrize("kind", [ReadsInside, InheritsForward])
def test_layers_whose_weight_another_module_reads_stay(kind):
    why = f"{kind.__name__} reads its weight itself"
    assert reasons(kind()) == {"called": "", "read": why, "nested": why}


def test_torchs_own_transformer_reads_all_weights():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 1).eval()
    with pytest.raises(TriternError, match="linear1: TransformerEncoderLayer reads its weight itself"):
        tritern.patch(model)


def test_attention_of_transformers_that_reads_weights_stays():
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    wavlm = WavLMModel(WavLMConfig(**sizes, conv_dim=(16,), conv_stride=(2,), conv_kernel=(3,)))
    deberta = DebertaModel(DebertaConfig(**sizes, vocab_size=50))
    left = {n.rpartition(".")[2]: r for n, r in {**reasons(wavlm), **reasons(deberta)}.items() if r}
    attention = dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "out_proj"), "WavLMAttention reads its weight itself"
    )
    assert left == {**attention, "in_proj": "DisentangledSelfAttention reads its weight itself"}
    inputs = torch.randn(1, 400)
    assert torch.isfinite(tritern.patch(wavlm.eval())(inputs).last_hidden_state).all()
    assert torch.isfinite(tritern.patch(deberta.eval())(torch.arange(9)[None]).last_hidden_state).all()


class Projection(Module):
    """A module of the user's own in a SentenceTransformer."""

    config_keys = []

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 16)

    def forward(self, features):
        features["sentence_embedding"] = self.linear(features["sentence_embedding"])
        return features

    def save(self, output_path, *args, **kwargs):
        self.save_torch_weights(output_path)

    @classmethod
    def load(cls, model_name_or_path, **kwargs):
        module = cls()
        return cls.load_torch_weights(model_name_or_path, model=module, subfolder=kwargs.get("subfolder", ""))


def test_modules_beside_the_transformer_stay_and_load(tiny, texts, tmp_path):
    model = SentenceTransformer(modules=[*tiny, Projection()], device="cpu")
    tritern.patch(model)
    assert reasons(model)["*.linear"] == "Projection is not part of a transformers model"
    model.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    assert np.array_equal(loaded.encode(texts), model.encode(texts))


def test_plans_need_no_weights():
    with torch.device("meta"):
        model = nn.Sequential(Gated(), nn.Conv2d(3, 8, 4))
    assert set(reasons(model).values()) == {""}


def test_a_single_layer_is_called_by_its_own_name():
    assert common_name(["0.pooler.dense"]) == "0.pooler.dense"
    assert common_name(["0.layer.1.up", "0.layer.2.up"]) == "*.layer.*.up"
    model = nn.Sequential(nn.ModuleDict({"pooler": nn.Linear(8, 8), "up": nn.Linear(8, 8)}))
    text = str(tritern.summary(tritern.patch(model)))
    assert "\n0.up " in text and "not ternary: 0.pooler (0.00 MB): pooler" in text
    with pytest.raises(tritern.TriternError, match=r"\(0.pooler: pooler\)"):
        tritern.patch(nn.Sequential(nn.ModuleDict({"pooler": nn.Linear(8, 8)})))
