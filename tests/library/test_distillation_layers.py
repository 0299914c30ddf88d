import copy

import numpy as np
import pytest
import torch
from torch import nn

from tritern import Int4Embedding, Int8Embedding, TernaryConfig, TernaryLinear, TriternError
from tritern.distillation.layers import TrainableQuantizedEmbedding, TrainableTernaryLinear
from tritern.distillation.student import make_trainable, pack_trained, packed_form
from tritern.engine.encoder import encode
from tritern_kernels import ternarize_weight


def layer(**options):
    return TrainableTernaryLinear(nn.Linear(40, 24), **options)


def step(module, x, lr=0.01):
    """One optimizer step with the fused AdamW the trainer uses."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr, fused=True)
    module(x).square().mean().backward()
    optimizer.step()
    module.zero_grad()


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize(
    "rule, learn_scale", [("mse", True), ("twn", True), ("twn", False), ("absmean", False)]
)
def test_the_packed_layer_gives_the_same_bits_before_and_after_training(rule, learn_scale, activation_bits):
    module, x = (
        layer(rule=rule, learn_scale=learn_scale, activation_bits=activation_bits),
        torch.randn(50, 40),
    )
    before = module.packed_layer()
    for _ in range(3):
        assert torch.equal(module(x), module.packed_layer()(x))
        step(module.train(), x)
        assert torch.equal(module.eval()(x), module.packed_layer()(x))  # not the codes of before the step
    assert not torch.equal(module.packed, before.weight)


def test_it_starts_as_the_patched_layer():
    linear, x = nn.Linear(40, 24), torch.randn(50, 40)
    patched = TernaryLinear.from_linear(copy.deepcopy(linear))
    assert torch.equal(TrainableTernaryLinear(linear)(x), patched(x))


def test_blend_goes_from_full_precision_to_ternary_in_training_only():
    linear, x = nn.Linear(40, 24), torch.randn(50, 40)
    module = TrainableTernaryLinear(copy.deepcopy(linear)).train()
    packed = module.packed_layer()
    module.blend = 0.0
    assert torch.allclose(module(x), linear(x), atol=1e-6)
    module.blend = 0.25
    weight = 0.75 * linear.weight + 0.25 * ternarize_weight(linear.weight).dequantize()
    assert torch.allclose(module(x), nn.functional.linear(x, weight, linear.bias), atol=1e-6)
    assert torch.equal(module.eval()(x), packed(x))


def test_codes_made_by_encode_serve_a_later_backward():
    module, x = layer().eval(), torch.randn(5, 40)
    with torch.inference_mode():
        module(x)
    module.train()
    module(x).sum().backward()
    assert module.weight.grad is not None
    module.eval()
    module(x).sum().backward()  # the codes kept from training


def test_scales_stay_positive_float32_and_codes_uint8():
    module = layer().train()
    with torch.no_grad():
        module.weight_scale[0] = -1.0
    module.refresh()
    assert (module.weight_scale > 0).all()
    module = module.bfloat16()
    assert (module.weight.dtype, module.weight_scale.dtype, module.packed.dtype) == (
        torch.bfloat16, torch.float32, torch.uint8,
    )  # fmt: skip
    x = torch.randn(5, 40, dtype=torch.bfloat16)
    module(x).sum().backward()
    assert torch.equal(module.eval()(x), module.packed_layer()(x))


def test_autocast_runs_in_its_dtype():
    module, x = layer(), torch.randn(5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), module.packed_layer()(x))
        assert module(x).dtype == torch.bfloat16


def test_latent_weights_that_are_not_finite_are_refused():
    module = layer()
    with torch.no_grad():
        module.weight[3, 5] = torch.nan
    with pytest.raises(TriternError, match="latent weights hold NaN or infinity"):
        module.packed_layer()


@pytest.mark.parametrize("kind", [Int8Embedding, Int4Embedding])
def test_a_table_in_training_gives_the_bits_of_the_rounded_one(kind):
    table = nn.Embedding(50, 16, padding_idx=0)
    module = TrainableQuantizedEmbedding.around(table, kind.bits)
    ids = torch.tensor([[1, 2, 3], [0, 49, 7]])
    assert torch.equal(module(ids), kind.from_embedding(table)(ids))
    assert type(module.packed_table()) is kind
    assert not torch.equal(module(ids), table(ids))
    module(ids).sum().backward()
    expected = torch.zeros(50, 16)
    expected[[1, 2, 3, 49, 7]] = 1.0  # none for padding
    assert torch.equal(table.weight.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_that_multiplies(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    table = Gemma3TextScaledWordEmbedding(50, 16, 0, embed_scale=24**0.5).to(dtype)
    module = TrainableQuantizedEmbedding.around(table, 8)
    ids = torch.tensor([[1, 2, 3], [0, 49, 7]])
    packed = module.packed_table()
    assert torch.equal(module(ids), Int8Embedding.from_embedding(table)(ids))
    assert torch.equal(module(ids), packed(ids)) and type(packed.to_embedding()) is type(table)
    module(ids).sum().backward()
    assert table.weight.grad[1, 0] == torch.tensor(24**0.5).to(dtype) and table.weight.grad[4, 0] == 0


@pytest.mark.parametrize("kind", [Int8Embedding, Int4Embedding])
def test_a_model_there_and_back(tiny, sentences, kind):
    config = TernaryConfig(embedding_bits=kind.bits, skip=("*.layer.0.output.dense",))
    names = make_trainable(tiny, config)
    assert sum(isinstance(m, TrainableTernaryLinear) for m in tiny.modules()) == 11
    tiny.eval()
    vectors = encode(tiny, sentences[:20])
    with packed_form(tiny, config, names):
        assert sum(isinstance(m, TernaryLinear) for m in tiny.modules()) == 11
        assert sum(isinstance(m, kind) for m in tiny.modules()) == 1
        assert np.array_equal(tiny.encode(sentences[:20]), vectors)
    assert not hasattr(tiny[0].auto_model.config, "quantization_config")
    assert sum(isinstance(m, TrainableTernaryLinear) for m in tiny.modules()) == 11
    pack_trained(tiny, config, names)
    assert not any(isinstance(m, TrainableTernaryLinear) for m in tiny.modules())
    assert not any(isinstance(m, nn.Embedding) and m.weight.shape[0] > 1000 for m in tiny.modules())
    assert np.array_equal(tiny.encode(sentences[:20]), vectors)


def test_shared_weights_stay_shared():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    names = make_trainable(model, TernaryConfig())
    assert model[0].weight is model[2].weight and model[0].weight_scale is model[2].weight_scale
    step(model.train(), torch.randn(5, 16))
    model.append(model[0])  # and a layer may run twice
    step(model, torch.randn(5, 16))
    pack_trained(model, TernaryConfig(), [*names, "3"])
    assert torch.equal(model[0].weight, model[2].weight) and model[3] is model[0]
