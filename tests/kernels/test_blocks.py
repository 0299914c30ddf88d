"""Whole blocks but for attention, in every way that their products can be computed."""

from dataclasses import replace

import pytest
import torch

from tritern_kernels import blocks, cuda, pack, reference
from tritern_kernels.blocks import BertWeights, DecoderWeights, Product
from tritern_kernels.config import KernelConfig

pytestmark = pytest.mark.usefixtures("poisoned")
TILE = KernelConfig(16, 32, 128, num_stages=2)
WAYS = {
    "tiles": {},
    "split": {"split_k": 2},
    "share_k": {"share_k": True},
    "quantizing": {"share_k": True, "quantizing": True},
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Configures products: a way that K or the activations do not allow is left for plain tiles."""

    def configuration(activation_bits, M, N, K, device, bits=2):
        config = replace(TILE, **WAYS[request.param])
        return TILE if config.invalid("int8", K, 90) else config

    monkeypatch.setattr(cuda, "configuration", configuration)


def products(made, device):
    packed = ((pack(codes), scale, bias) for codes, scale, bias in made)
    return tuple(Product(*(t.to(device) for t in tensors)) for tensors in packed)


def block_reference(x, context, made, norms):
    """The block in float64, but for what is rounded to float32 before it is quantized."""

    def product(i, x):
        codes, scale, bias = made[i]
        return reference.linear(x, codes, scale, bias)

    def norm(i, x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], *(t.double() for t in norms[i]), eps=1e-5)

    y = norm(0, product(1, context) + x.double()).float()
    inner = torch.nn.functional.gelu(product(2, y).float().double()).float()
    return product(0, x), norm(1, product(3, inner) + y.double())


@pytest.mark.usefixtures("way")
def test_a_bert_block(device):
    hidden, inner = 40, 300
    shapes = (3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)
    made = [
        (torch.randint(-1, 2, s, dtype=torch.int8), torch.rand(s[0]) / 10, torch.randn(s[0])) for s in shapes
    ]
    norms = [(torch.rand(hidden), torch.randn(hidden)) for _ in range(2)]
    on_device = tuple((weight.to(device), bias.to(device)) for weight, bias in norms)
    weights = BertWeights(*products(made, device), norms=on_device, epsilons=(1e-5, 1e-5))
    for M in (17, 1):
        x, context = torch.randn(M, hidden), torch.randn(M, hidden)
        expected_qkv, expected = block_reference(x, context, made, norms)
        x, context = x.to(device), context.to(device)
        qkv = blocks.bert_qkv(x, None, weights).cpu()
        assert (qkv.double() - expected_qkv).abs().max() <= 1e-6 * expected_qkv.abs().max()
        z, int8 = blocks.bert_output(context, x, weights)
        # a last bit of LayerNorm may be a step of an activation in 127
        wrong = z.cpu().double() - expected
        assert wrong.abs().mean() <= 1e-3 and wrong.abs().max() <= 0.1
        assert torch.equal(blocks.bert_qkv(z, int8, weights), blocks.bert_qkv(z, None, weights))


def decoder_reference(x, context, made, norms, heads, turn):
    """The block in float64, but for what is rounded to float32 before it is quantized."""

    def product(i, x):
        codes, scale, bias = made[i]
        return reference.linear(x.float(), codes, scale, bias)

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight.double()

    query_heads, key_heads, head_dim = heads
    qkv = product(0, norm(x.double(), norms[0][0])).view(len(x), -1, head_dim)
    parts = qkv.split((query_heads, key_heads, key_heads), 1)
    for part, weight in zip(parts, norms[2] or (None, None)):
        low, high = (part if weight is None else norm(part, weight)).chunk(2, -1)
        cos, sin = (t.double()[torch.arange(len(x)) % len(t), None].chunk(2, -1)[0] for t in turn)
        part.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), -1))
    y = product(1, context) + x.double()
    gate, up = product(2, norm(y, norms[1][0])).chunk(2, 1)
    return qkv.flatten(1), product(3, torch.nn.functional.silu(gate) * up) + y


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("normalized", [True, False])
def test_a_decoders_block(normalized, device):
    hidden, inner, heads = 40, 300, (3, 1, 16)
    context = 48
    shapes = (80, hidden), (hidden, context), (2 * inner, hidden), (hidden, inner)
    made = [
        (torch.randint(-1, 2, s, dtype=torch.int8), torch.rand(s[0]) / 10, torch.randn(s[0])) for s in shapes
    ]
    of_heads = (torch.rand(16), torch.rand(16)) if normalized else ()
    norms = ((torch.rand(hidden) + 0.5,), (torch.rand(hidden) + 0.5,), of_heads)
    weights = DecoderWeights(
        *products(made, device),
        norms=(norms[0][0].to(device), norms[1][0].to(device)),
        head_norms=tuple(weight.to(device) for weight in of_heads),
        epsilons=(1e-5,) * 3,
        heads=heads[:2],
    )
    following = (torch.rand(hidden)).to(device)
    for M, period in ((17, 17), (6, 3)):
        x, context_of = torch.randn(M, hidden), torch.randn(M, context)
        angles = torch.rand(period, 8).repeat(1, 2)
        turn = angles.cos(), angles.sin()
        expected_qkv, expected = decoder_reference(x, context_of, made, norms, heads, turn)
        x, context_of, turn = x.to(device), context_of.to(device), tuple(t.to(device) for t in turn)
        qkv = blocks.decoder_qkv(x, None, *turn, weights).cpu()
        # a last bit of a norm may be a step of an activation in 127
        assert (qkv - expected_qkv).abs().mean() <= 1e-3 and (qkv - expected_qkv).abs().max() <= 0.1
        z, int8 = blocks.decoder_output(context_of, x, weights, following)
        assert (z.cpu() - expected).abs().mean() <= 1e-3 and (z.cpu() - expected).abs().max() <= 0.1
        after = weights._replace(norms=(following, weights.norms[1]))  # the next block
        again = blocks.decoder_qkv(z, int8, *turn, after)
        assert torch.equal(again, blocks.decoder_qkv(z, None, *turn, after))
        last, int8 = blocks.decoder_output(context_of, x, weights, None)
        assert torch.equal(last, z) and int8 is None


@pytest.mark.parametrize("config", [TILE, replace(TILE, split_k=3), replace(TILE, share_k=True)])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_product_behind_an_activation(config, activation, device, monkeypatch):
    monkeypatch.setattr(cuda, "configuration", lambda *_: config)
    codes, scale = torch.randint(-1, 2, (70, 384), dtype=torch.int8), torch.rand(70)
    x = torch.randn(17, 384 * (2 if activation == "swiglu" else 1)).to(device)
    q, scale_x = cuda.quantize(x, activation=activation)
    expected = cuda.linear_int8(q, scale_x, pack(codes).to(device), scale.to(device), None, 384, x.dtype)
    got = cuda.linear(x, pack(codes).to(device), scale.to(device), None, activation=activation)
    assert torch.equal(got, expected)
