import copy
import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tritern
from tritern import TernaryConfig, TernaryLinear, TriternError
from tritern_kernels import cpu


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks.append(self.blocks[0])  # a shared layer
        self.pooler = nn.Linear(32, 32)
        self.classifier = nn.Sequential(nn.Linear(32, 3))
        self.tied = nn.Linear(32, 10, bias=False)
        self.tied.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(32, 2)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.tied(self.pooler(x))


def ternary_names(model):
    return [n for n, m in model.named_modules() if isinstance(m, TernaryLinear)]


def test_what_is_chosen_and_why():
    model = Net()
    assert tritern.patch(model) is model
    assert ternary_names(model) == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert model.blocks[2].up is model.blocks[0].up
    reasons = {s.name: s.reason for s in tritern.summary(model).skipped}
    assert reasons == {
        "pooler": "pooler",
        "classifier.0": "head",
        "tied": "weight shared with Embedding",
        "attention.out_proj": "subclass of nn.Linear: NonDynamicallyQuantizableLinear",
        "attention": "not a linear layer: MultiheadAttention (in_proj_weight 96 x 32)",
    }
    assert model(torch.tensor([1, 2])).shape == (2, 10)


def test_a_module_under_two_names_stays_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = self.a

    model = tritern.patch(Twice())
    assert isinstance(model.a, TernaryLinear) and model.a is model.b


def test_two_layers_with_one_weight_share_the_packed_one():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    tritern.patch(model)
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr() and model[0].bias is not model[1].bias
    assert len(tritern.summary(model).layers) == 1


@pytest.mark.parametrize("skip", ["blocks.0", "blocks.0.*", ["blocks.0.up", "*.0.down"]])
def test_skip(skip):
    model = tritern.patch(Net(), skip=skip)
    assert ternary_names(model) == ["blocks.1.up", "blocks.1.down"]
    assert "named in skip" in str(tritern.summary(model))


def test_keywords_replace_the_configs_fields():
    config = TernaryConfig(rule="twn", activation_bits=8, skip=("blocks.0",))
    model = tritern.patch(Net(), config, activation_bits=16)
    layer = model.blocks[1].up
    expected = TernaryLinear.from_linear(layer.to_linear(), rule="twn")
    assert layer.activation_bits == 16 and type(model.blocks[0].up) is nn.Linear
    assert torch.equal(layer.weight, expected.weight)


def test_mode_hooks_and_devices_survive():
    model = Net().eval()
    calls = []
    model.blocks[1].up.register_forward_hook(lambda *_: calls.append(1))
    tritern.patch(model)
    model(torch.tensor([1]))
    assert calls == [1] and not model.blocks[1].up.training


def test_hooks_with_keyword_arguments_survive(tiny):
    query, calls = tiny[0].model.encoder.layer[0].attention.self.query, []
    query.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    handle = query.register_forward_hook(lambda _, a, kwargs, out: calls.append(kwargs), with_kwargs=True)
    tritern.patch(tiny).encode("ba")
    assert calls == [{}, {}]
    handle.remove()
    tritern.dequantize(tiny).encode("ba")
    assert calls == [{}, {}, {}]


def test_state_dict_of_a_plain_module():
    model, other = tritern.patch(Net()), Net()
    tritern.patch(other)
    other.load_state_dict(model.state_dict())
    ids = torch.arange(5)
    assert torch.equal(other(ids), model(ids))


def unchanged_after(model, match, error=TriternError, **options):
    before = {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(error, match=match):
        tritern.patch(model, **options)
    assert {n: id(m) for n, m in model.named_modules()} == before


def test_refusals_leave_the_model_as_it_was():
    unchanged_after(
        nn.Sequential(nn.ReLU()), "no linear layer to make ternary in Sequential .*no nn.Linear at all"
    )
    only_head = nn.Sequential()
    only_head.add_module("classifier", nn.Linear(4, 2))
    unchanged_after(only_head, "no linear layer to make ternary.*classifier: head")
    unchanged_after(nn.Linear(4, 4), "bare nn.Linear.*from_linear")
    unchanged_after(
        nn.Sequential(nn.Linear(4, 4, device="meta")), "0.weight is on the meta device: load the weights"
    )
    unchanged_after(
        nn.Sequential(nn.Linear(4, 4).double()), "0.weight is torch.float64; float32, float16 or bfloat16"
    )
    unchanged_after(
        Net(),
        r"skip='layers.0' matches no linear layer or table. Names look like 'blocks.0.up'",
        skip="layers.0",
    )
    unchanged_after(tritern.patch(Net()), r"already ternary \(4 TernaryLinear layers\)")
    late = Net()
    late.blocks[1].down.weight.data[3, 3] = float("inf")
    unchanged_after(late, "blocks.1.down.weight holds NaN or infinity")


NO_NAMES = [tritern.dequantize, tritern.warmup, tritern.fuse]
NAMES = [tritern.patch, tritern.summary]


@pytest.mark.parametrize("function", NO_NAMES)
@pytest.mark.parametrize(
    ("model", "match"),
    [
        (
            "some/model",
            r"received the name 'some/model': load it.*SentenceTransformer\('some/model'\), or trit",
        ),
        (
            Path("folder"),
            r"received the name 'folder': load it .*or tritern.load\('folder'\) if it is ternary",
        ),
    ],
)
def test_functions_that_change_a_model_take_no_name(function, model, match):
    with pytest.raises(TriternError, match=f"model must be a torch.nn.Module or a Sentence.*; {match}"):
        function(model)


@pytest.mark.parametrize("function", NAMES + NO_NAMES)
@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nn.Linear, "received the class Linear: make a model of it first"),
        ({"weight": torch.ones(2, 2)}, "received dict"),
        (None, "received NoneType"),
    ],
)
def test_what_is_no_model_is_refused(function, model, match):
    with pytest.raises(TriternError, match=f"model must be a torch.nn.Module or a Sentence.*; {match}"):
        function(model)


def test_a_model_may_be_given_by_name(tiny, tiny_path, caplog):
    planned = tritern.summary(tiny).planned
    assert tritern.summary(tiny_path).planned == tritern.summary(str(tiny_path)).planned == planned
    model = tritern.patch(tiny_path, activation_bits=16)
    assert tritern.summary(model).layers == planned.layers
    assert "a preview of size and speed, not a model to serve" in caplog.text
    for function in NAMES:
        with pytest.raises(TriternError, match="model: cannot load './nowhere'"):
            function("./nowhere")
        with pytest.raises(TriternError, match="did you mean 'minilm-l6-ternary'"):
            function("minilm-l6-ternery")
    with pytest.raises(TriternError, match="already ternary"):
        tritern.patch("minilm-l6-ternary")


def test_config_refusals():
    with pytest.raises(TriternError, match="rule must be one of 'mse', 'absmean', 'twn'; received 'best'"):
        TernaryConfig(rule="best")
    with pytest.raises(TriternError, match="activation_bits must be 8 or 16; received 2"):
        TernaryConfig(activation_bits=2)
    with pytest.raises(TriternError, match="skip must be a sequence"):
        TernaryConfig(skip="pooler")
    for value in (8.0, "8", True):
        with pytest.raises(
            TriternError, match="activation_bits must be 8 or 16; received .*(bool|float|str)"
        ):
            TernaryConfig(activation_bits=value)
        with pytest.raises(
            TriternError, match="activation_bits must be 8 or 16; received .*(bool|float|str)"
        ):
            TernaryLinear(8, 8, activation_bits=value)
        with pytest.raises(
            TriternError, match="embedding_bits must be 4, 8 or 16; received .*(bool|float|str)"
        ):
            TernaryConfig(embedding_bits=value)
    config = TernaryConfig(activation_bits=np.int64(16), embedding_bits=np.int64(8), skip=["pooler"])
    assert type(config.activation_bits) is type(config.embedding_bits) is int and config.skip == ("pooler",)
    for skip in (5, b"pooler", {"pooler": 1}):
        unchanged_after(Net(), "skip must be a list or another iterable; received", skip=skip)
        with pytest.raises(TriternError, match="skip must be a list or another iterable; received"):
            TernaryConfig(skip=skip)
    unchanged_after(Net(), "skip must be a sequence of module names or patterns; received .5", skip=[5])
    unchanged_after(Net(), "config must be a tritern.TernaryConfig; received str", config="mse")


def test_a_model_quantized_by_another_method_is_refused():
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    model.config.quantization_config = {"quant_method": "gptq"}
    unchanged_after(model, r"already quantized \(gptq\)")


def test_t5_and_dense_stay_in_full_precision():
    from sentence_transformers.sentence_transformer.modules import Dense
    from transformers import T5Config, T5EncoderModel

    config = T5Config(d_model=32, d_ff=64, d_kv=16, num_layers=1, num_heads=2, vocab_size=20)
    model = nn.Sequential(T5EncoderModel(config), Dense(32, 16))
    tritern.patch(model)
    reasons = {s.name: s.reason for s in tritern.summary(model).skipped}
    assert reasons["1.linear"] == "sentence-transformers Dense"
    assert [n for n in reasons if n.endswith(".wo")] and len(ternary_names(model)) == 5


@pytest.mark.parametrize("bits, product", [(8, "float32"), (16, "FBGEMM fp16")])
def test_summary_says_what_multiplies(bits, product, monkeypatch):
    monkeypatch.setattr(cpu, "fastest", lambda bits: {8: ("float32",), 16: ("FBGEMM fp16",)}[bits])
    layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 2))
    model = tritern.patch(layers, activation_bits=bits, skip="3")
    kind, kept = ("int8", 32) if bits == 8 else ("16-bit", 16)
    line = f"{product} on the CPU, {kind} activations: unpacked to {kept} bits a weight at the first use"
    found = tritern.summary(model)
    assert found.unpacked_bytes == kept // 8 * 2 * 64 * 64
    assert found.products == (line,) and f"Multiplied by {line}\n" in str(found) == repr(found)
    assert tritern.summary(model.to("meta")).products == (f"nothing on meta, {kind} activations",)


def test_minilm_summary(minilm):
    full = sum(p.numel() * 4 for p in minilm.parameters())
    before = tritern.summary(minilm)
    assert before.layers == () and before.model_bytes_before == before.model_bytes_after
    planned = before.planned
    assert str(before) == f"Not ternary; tritern.patch would make this of it:\n{planned}"
    summary = tritern.summary(tritern.patch(minilm))
    assert planned == summary and summary.planned is None
    assert len(summary.layers) == 36 and [s.reason for s in summary.skipped] == ["pooler"]
    weights = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    scales = 6 * (4 * 384 + 1536 + 384)
    assert summary.linear_bytes_before == 4 * weights
    assert summary.linear_bytes_after == weights // 4 + 4 * scales
    assert 0.3 < summary.zero_fraction < 0.6 and 2.0 < summary.bits_per_weight < 2.1
    assert summary.model_bytes_before == pytest.approx(full, rel=1e-3)
    text = str(summary)
    assert "attention.self.query" in text and "whole model" in text and "pooler" in text
    assert summary.linear_bytes_before / (2 * summary.linear_bytes_after) > 7.7  # against 16-bit weights


def test_summary_on_the_meta_device(tiny, tiny_path):
    from sentence_transformers import SentenceTransformer

    plain = tritern.summary(SentenceTransformer(tiny_path, device="cpu").to("meta"))
    assert "weight is on the meta device: load the weights" in plain.refusal
    for meta, filled in (
        (plain.planned, tritern.summary(tiny).planned),
        (
            tritern.summary(tritern.patch(copy.deepcopy(tiny)).to("meta")),
            tritern.summary(tritern.patch(tiny)),
        ),
    ):
        assert len(meta.layers) == 12 and meta.zero_fraction is None
        assert "-" in str(meta).splitlines()[2].split()
        layers = tuple(replace(layer, zero_fraction=None) for layer in filled.layers)
        assert filled.path.startswith("the engine, ") and "on the meta device" in meta.path
        there = {"products": meta.products, "unpacked_bytes": 0, "path": meta.path}
        assert meta == replace(filled, layers=layers, zero_fraction=None, **there)


def test_summary_says_why_a_model_would_be_refused(tiny):
    nothing = tritern.summary(nn.Sequential(nn.Conv1d(8, 8, 1)))
    assert nothing.planned is None and "Not ternary, and tritern.patch refuses it: no linear layer" in str(
        nothing
    )
    tiny[0].auto_model.encoder.layer[0].output.dense.weight.data[0, 0] = torch.nan
    before = [id(m) for m in tiny.modules()]
    damaged = tritern.summary(tiny)
    assert "once this is fixed (0.model.encoder.layer.0.output.dense.weight holds NaN" in str(damaged)
    assert damaged.planned.zero_fraction is None and [id(m) for m in tiny.modules()] == before
    with pytest.raises(TriternError, match="bare nn.Linear"):
        raise TriternError(tritern.summary(nn.Linear(8, 8)).refusal)


def test_peak_memory_stays_near_the_models_own(minilm):
    """Every full-precision weight is freed as soon as its layer is packed."""
    import weakref

    alive = [
        weakref.ref(m.weight) for n, m in minilm.named_modules() if type(m) is nn.Linear and "pooler" not in n
    ]
    most = 0
    original = TernaryLinear.from_linear.__func__

    def counting(cls, linear, **options):
        nonlocal most
        layer = original(cls, linear, **options)
        packed = sum(isinstance(m, TernaryLinear) for m in minilm.modules())
        most = max(most, packed + sum(r() is not None for r in alive))
        return layer

    TernaryLinear.from_linear = classmethod(counting)
    try:
        tritern.patch(minilm)
    finally:
        TernaryLinear.from_linear = classmethod(original)
    assert len(alive) == 36 and most <= 37
    assert sum(r() is not None for r in alive) == 0


def test_deepcopy_of_a_patched_model_is_independent(minilm, texts):
    twin = copy.deepcopy(tritern.patch(minilm))
    vectors = minilm.encode(texts)
    next(m for m in minilm.modules() if isinstance(m, TernaryLinear)).weight.zero_()
    assert (twin.encode(texts) == vectors).all() and not (minilm.encode(texts) == vectors).all()


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("from_bitnet", "tritern.formats.bitnet"),
        ("export_gguf", "tritern.formats.gguf"),
        ("lora", "tritern.adapters"),
    ],
)
def test_old_names_of_functions_say_where_they_are(name, home):
    with pytest.warns(FutureWarning, match=f"tritern.{name} will be gone.*from {home} import {name}"):
        found = getattr(tritern, name)
    assert found is getattr(importlib.import_module(home), name) and name not in dir(tritern)
