import copy
import pickle

import pytest
import torch
from torch import nn

from tritern import TernaryLinear, TriternError
from tritern.nn.linear import RMSNorm
from tritern_kernels import MAX_K, reference


@pytest.fixture
def pair():
    linear = nn.Linear(130, 50)
    return linear, TernaryLinear.from_linear(linear)


def same(a, b):
    return torch.equal(a.weight, b.weight) and torch.equal(a.weight_scale, b.weight_scale)


def test_from_linear_computes_the_ternarized_layer(pair):
    linear, layer = pair
    codes, scale = reference.ternarize(linear.weight.detach())
    x = torch.randn(4, 130)
    exact = reference.linear(x, codes, scale, linear.bias.detach())
    assert torch.allclose(layer(x).double(), exact, atol=1e-5)
    assert layer.bias is linear.bias
    assert layer.packed().shape == (50, 130)


@pytest.mark.parametrize("shape", [(130,), (3, 130), (2, 3, 130), (2, 2, 3, 130), (0, 130)])
def test_any_rank(pair, shape):
    assert pair[1](torch.randn(shape)).shape == pair[0](torch.randn(shape)).shape


@torch.no_grad()
def test_sparse_activations_are_refused(pair):
    with pytest.raises(ValueError, match=r"must be dense.*\.to_dense\(\)"):
        pair[1](torch.randn(4, 130).to_sparse())


def test_round_trip_to_linear(pair):
    layer = pair[1].eval()
    dense = layer.to_linear()
    assert type(dense) is nn.Linear and dense.weight.requires_grad and not dense.training
    assert torch.equal(dense.weight, layer.packed().codes() * layer.weight_scale[:, None])
    assert same(TernaryLinear.from_linear(dense), layer)  # to the bit: sums of equal numbers are exact
    assert dense.bias is not layer.bias and torch.equal(dense.bias, layer.bias)
    half = layer.to_linear(torch.float16)
    assert half.weight.dtype == half.bias.dtype == torch.float16


def test_without_bias_and_16_bit_activations():
    linear = nn.Linear(64, 32, bias=False)
    layer = TernaryLinear.from_linear(linear, rule="twn", activation_bits=16)
    x = torch.randn(5, 64)
    assert layer.bias is None and layer.to_linear().bias is None
    assert torch.allclose(layer(x), x @ layer.packed().dequantize().T, atol=1e-5)
    assert not torch.equal(layer(x), TernaryLinear.from_linear(linear, rule="twn")(x))


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.type(torch.half)],
)
def test_casting_keeps_codes_and_scales(pair, cast):
    layer = pair[1]
    before = copy.deepcopy(layer)
    layer = cast(layer)
    assert same(layer, before) and layer.weight_scale.dtype == torch.float32
    assert layer.bias.dtype in (torch.float16, torch.bfloat16)
    x = torch.randn(3, 130, dtype=layer.bias.dtype)
    assert layer(x).dtype == x.dtype


def test_moving_to_meta_and_back(pair):
    layer = copy.deepcopy(pair[1]).to("meta")
    assert layer.weight.is_meta and layer.weight_scale.is_meta
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(pair[1].state_dict())
    assert same(layer, pair[1])


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_shapes_on_the_meta_device(activation_bits):
    layer = TernaryLinear(130, 50, activation_bits=activation_bits, norm_eps=1e-3, device="meta")
    x = torch.empty(2, 3, 130, dtype=torch.bfloat16, device="meta")
    y = layer(x)
    assert y.is_meta and (y.shape, y.dtype) == ((2, 3, 50), torch.bfloat16)
    assert layer.packed().dequantize().shape == (50, 130)
    x = torch.empty(3, 130, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.is_meta and layer.bias.grad.shape == (50,)
    with pytest.raises(ValueError, match=r"x must have shape \[..., 130\]"):
        TernaryLinear(130, 50, device="meta")(torch.empty(3, 129, device="meta"))
    with pytest.raises(ValueError, match="x is on cpu and the weight on meta"):
        TernaryLinear(130, 50, device="meta")(torch.empty(3, 130))
    with pytest.raises(ValueError, match="x is on meta and the weight on cpu"):
        TernaryLinear(130, 50)(x)


def test_copies_give_the_same_bits(pair):
    x = torch.randn(3, 130)
    y = pair[1](x)
    for twin in (copy.deepcopy(pair[1]), pickle.loads(pickle.dumps(pair[1]))):
        assert torch.equal(twin(x), y)
    fresh = TernaryLinear(130, 50)
    fresh.load_state_dict(pair[1].state_dict())
    assert torch.equal(fresh(x), y)


def test_state_dict_names(pair):
    state = pair[1].state_dict()
    assert list(state) == ["bias", "weight", "weight_scale"] and state["weight"].dtype == torch.uint8


def test_full_precision_weights_are_not_loaded_by_mistake():
    dense = nn.Linear(32, 8)  # padded to 128, its packed weight has the shape [8, 32] too
    layer = TernaryLinear.from_linear(dense)
    with pytest.raises(
        RuntimeError, match="weight must be torch.uint8.*Load full-precision weights before patching"
    ):
        layer.load_state_dict(dense.state_dict())
    with pytest.raises(RuntimeError, match="weight_scale must be torch.float32"):
        layer.load_state_dict({**layer.state_dict(), "weight_scale": layer.weight_scale.half()})
    with pytest.raises(RuntimeError, match="Missing key.*weight_scale"):
        layer.load_state_dict({"weight": layer.weight, "bias": layer.bias})


def test_autocast(pair):
    x = torch.randn(3, 130)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pair[1](x).dtype == pair[0](x).dtype == torch.bfloat16
    assert pair[1](x).dtype == torch.float32


def test_gradients_reach_inputs_and_bias(pair):
    layer = pair[1]
    x = torch.randn(3, 130, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.packed().dequantize().sum(0).expand(3, -1)
    assert torch.allclose(x.grad, expected, atol=1e-4)
    assert torch.equal(layer.bias.grad, torch.full((50,), 3.0))


def test_training_the_codes_is_refused(pair):
    with pytest.raises(TriternError, match=r"cannot be trained. Train `layer.to_linear\(\)`"):
        pair[1].requires_grad_()
    assert not pair[1].requires_grad_(False).bias.requires_grad
    assert [n for n, _ in pair[1].named_parameters()] == ["bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_that_of_qwen3_to_the_bit(dtype):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    source = Qwen3RMSNorm(130, eps=1e-3).to(dtype)
    torch.nn.init.normal_(source.weight)
    norm = RMSNorm(130, 1e-3, dtype=dtype)
    norm.load_state_dict(source.state_dict())
    x = torch.randn(40, 130).to(dtype)
    assert torch.equal(norm(x), source(x))


@pytest.fixture
def normed(pair):
    norm = RMSNorm(130, 1e-3)
    torch.nn.init.normal_(norm.weight)
    return TernaryLinear.from_packed(pair[1].packed(), pair[1].bias, norm=norm)


def test_a_norm_comes_before_the_quantization(pair, normed):
    x = torch.randn(3, 130)
    assert torch.equal(normed(x), pair[1](normed.norm(x)))
    assert not torch.equal(normed(x), pair[1](x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert normed(x).dtype == torch.bfloat16
    assert normed.half()(x.half()).dtype == normed.norm.weight.dtype == torch.float16


def test_a_norm_is_compiled_with_the_layer(normed):
    x = torch.randn(3, 130)
    compiled = torch.compile(normed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), normed(x))


def test_a_norm_is_kept_in_copies_and_state_dicts(normed):
    x = torch.randn(3, 130)
    assert torch.equal(copy.deepcopy(normed)(x), normed(x))
    fresh = TernaryLinear(130, 50, norm_eps=1e-3)
    assert list(fresh.state_dict()) == ["bias", "weight", "weight_scale", "norm.weight"]
    fresh.load_state_dict(normed.state_dict())
    assert torch.equal(fresh(x), normed(x))
    assert "RMSNorm(130, eps=0.001)" in repr(fresh)
    with pytest.raises(RuntimeError, match="Missing key.*norm.weight"):
        fresh.load_state_dict({k: v for k, v in normed.state_dict().items() if k != "norm.weight"})


def test_a_layer_with_a_norm_is_no_linear(normed):
    with pytest.raises(TriternError, match="RMSNorm cannot be written as an nn.Linear; use `layer.norm`"):
        normed.to_linear()


def test_repr(pair):
    assert repr(pair[1]) == "TernaryLinear(in_features=130, out_features=50, bias=True, activation_bits=8)"


def test_refusals():
    with pytest.raises(TriternError, match="activation_bits must be 8 or 16; received 4"):
        TernaryLinear(8, 8, activation_bits=4)
    with pytest.raises(TriternError, match="must be at least 1; received"):
        TernaryLinear(0, 8)
    for size in (8.0, "8", True):
        with pytest.raises(TriternError, match="in_features must be a whole number, at least 1; received"):
            TernaryLinear(size, 8)
        with pytest.raises(TriternError, match="out_features must be a whole number, at least 1; received"):
            TernaryLinear(8, size)
    with pytest.raises(TriternError, match="at most 264,192"):
        TernaryLinear(MAX_K + 1, 1, device="meta")
    with pytest.raises(TriternError, match="meta device"):
        TernaryLinear.from_linear(nn.Linear(4, 4, device="meta"))
    for given in (torch.ones(4, 4), "query", None, nn.Conv1d(4, 4, 1)):
        with pytest.raises(TriternError, match="linear must be an nn.Linear; received"):
            TernaryLinear.from_linear(given)
    broken = nn.Linear(4, 4)
    broken.weight.data[2, 1] = float("nan")
    with pytest.raises(TriternError, match="NaN or infinity"):
        TernaryLinear.from_linear(broken)
    with pytest.raises(TriternError, match="received 'sign'"):
        TernaryLinear.from_linear(nn.Linear(4, 4), rule="sign")
