"""The planned calls, their second kind included: with pointers as integers, in the interpreter."""

import ctypes
from dataclasses import replace

import pytest
import torch

from tritern_kernels import block, launch, pack, plan, reference
from tritern_kernels.config import KernelConfig
from tritern_kernels.launch import INTERPRETED
from tritern_kernels.ops import BertSizes, DecoderSizes

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        not INTERPRETED, reason="imitates launches in the interpreter; GPU tests run the real ones"
    ),
]


def at(pointer, dtype):
    """A tensor of one element at an address: all that the interpreter needs of a pointer."""
    memory = (ctypes.c_char * dtype.itemsize).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype)


@pytest.fixture
def imitated(monkeypatch):
    launched = []

    def compile_and_run(kernel, grid, arguments, constants, num_warps, num_stages=3):
        kernel[grid](*arguments, *constants, False)
        return kernel, [a.dtype for a in arguments if isinstance(a, torch.Tensor)]

    def run(compiled, grid, stream, arguments):
        kernel, dtypes = compiled
        assert len(arguments) == len(kernel.arg_names)
        pointers = [p if isinstance(p, torch.Tensor) else at(p, dtype) for p, dtype in zip(arguments, dtypes)]
        kernel[grid](*pointers, *arguments[len(dtypes) :])
        launched.append(kernel)

    monkeypatch.setattr(launch, "compile_and_run", compile_and_run)
    monkeypatch.setattr(launch, "run", run)
    return launched


TILE = KernelConfig(16, 32, 128, num_stages=2)


@pytest.mark.parametrize(
    ("config", "bits", "launches"),
    [
        (TILE, 8, 2),
        (replace(TILE, split_k=3), 8, 2),
        (replace(TILE, share_k=True), 8, 2),
        (replace(TILE, share_k=True, quantizing=True), 8, 1),
        (TILE, 16, 1),
        (replace(TILE, share_k=True), 16, 1),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
def test_first_and_later_calls_give_the_product(config, bits, launches, bias, gelu, imitated):
    N, K = 70, 384
    codes, scale = torch.randint(-1, 2, (N, K), dtype=torch.int8), torch.rand(N)
    packed, bias = pack(codes), torch.randn(N).half() if bias else None
    half, cpu = torch.float16, torch.device("cpu")
    call = plan.Plan(config, bits, 32, N, K, K, half, bias is not None, gelu, cpu)
    for M in (17, 5, 32, 1):
        x = torch.randn(M, K).half()
        exact = reference.linear(x, codes, scale, bias, bits, gelu)
        y = call(x, packed, scale, bias)
        assert (y.double() - exact).abs().max() <= 4 * torch.finfo(torch.float16).eps * exact.abs().max()
    assert len(imitated) == 3 * launches  # the first call goes through Triton


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


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("share_k", [False, True])
def test_a_blocks_first_and_later_calls(split, share_k, imitated):
    hidden, inner, most = 40, 300, 32
    shapes = (3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)
    made = [
        (torch.randint(-1, 2, s, dtype=torch.int8), torch.rand(s[0]) / 10, torch.randn(s[0])) for s in shapes
    ]
    norms = [(torch.rand(hidden), torch.randn(hidden)) for _ in range(2)]
    weights = (*((pack(codes), scale, bias) for codes, scale, bias in made), *norms)

    def configure(M, N, K):
        return replace(TILE, share_k=share_k, split_k=split if K == inner and not share_k else 1)

    sizes = BertSizes(hidden, inner, (True,) * 4, (1e-5, 1e-5))
    call = block.BertPlan(sizes, most, torch.float32, torch.device("cpu"), configure)
    known = None
    for M in (17, 5, 32, 1):
        x, context = torch.randn(M, hidden), torch.randn(M, hidden)
        expected_qkv, expected = block_reference(x, context, made, norms)
        qkv, buffer = call.before(x, None, weights)
        assert (qkv.double() - expected_qkv).abs().max() <= 1e-6 * expected_qkv.abs().max()
        z, known = call.after(context, x, buffer, weights)
        # a last bit of LayerNorm may be a step of an activation in 127
        assert (z.double() - expected).abs().mean() <= 1e-3 and (z.double() - expected).abs().max() <= 0.1
        again, _ = call.before(z, known, weights)
        assert torch.equal(again, call.before(z, None, weights)[0])
    assert imitated


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
    for part, weight in zip(parts, norms[2]):
        low, high = (norm(part, weight) if len(norms[2]) else part).chunk(2, -1)
        cos, sin = (t.double()[torch.arange(len(x)) % len(t), None].chunk(2, -1)[0] for t in turn)
        part.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), -1))
    y = product(1, context) + x.double()
    gate, up = product(2, norm(y, norms[1][0])).chunk(2, 1)
    return qkv.flatten(1), product(3, torch.nn.functional.silu(gate) * up) + y


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("share_k", [False, True])
def test_a_decoder_blocks_first_and_later_calls(split, share_k, imitated):
    hidden, inner, heads, most = 40, 300, (3, 1, 16), 32
    context = 48
    shapes = (80, hidden), (hidden, context), (2 * inner, hidden), (hidden, inner)
    made = [
        (torch.randint(-1, 2, s, dtype=torch.int8), torch.rand(s[0]) / 10, torch.randn(s[0])) for s in shapes
    ]
    norms = ((torch.rand(hidden) + 0.5,), (torch.rand(hidden) + 0.5,), (torch.rand(16), torch.rand(16)))
    weights = (*((pack(codes), scale, bias) for codes, scale, bias in made), *norms)

    def configure(M, N, K):
        return replace(TILE, share_k=share_k, split_k=split if K == inner and not share_k else 1)

    sizes = DecoderSizes(hidden, inner, *heads, True, (True,) * 4, (1e-5,) * 3)
    call = block.DecoderPlan(sizes, most, torch.float32, torch.device("cpu"), configure)
    following = torch.rand(hidden)
    for M, period in ((17, 17), (6, 3), (32, 16), (1, 1)):
        x, context_of = torch.randn(M, hidden), torch.randn(M, context)
        angles = torch.rand(period, 8).repeat(1, 2)
        turn = angles.cos(), angles.sin()
        expected_qkv, expected = decoder_reference(x, context_of, made, norms, heads, turn)
        qkv, buffer = call.before(x, None, *turn, weights)
        # a last bit of a norm may be a step of an activation in 127
        assert (qkv - expected_qkv).abs().mean() <= 1e-3 and (qkv - expected_qkv).abs().max() <= 0.1
        z, known = call.after(context_of, x, buffer, weights, following)
        assert (z - expected).abs().mean() <= 1e-3 and (z - expected).abs().max() <= 0.1
        other = (*weights[:4], (following,), *weights[5:])  # of the next block
        again, _ = call.before(z, known, *turn, other)
        assert torch.equal(again, call.before(z, None, *turn, other)[0])
        _, buffer = call.before(x, None, *turn, weights)
        last, known = call.after(context_of, x, buffer, weights, None)
        assert torch.equal(last, z) and known is None
    assert imitated and call._compiled


@pytest.mark.parametrize("config", [TILE, replace(TILE, share_k=True, quantizing=True)])
def test_without_tritons_launcher_every_call_goes_through_triton(config, imitated, monkeypatch):
    monkeypatch.setattr(launch, "compile_and_run", lambda kernel, grid, a, c, *_: kernel[grid](*a, *c, False))
    codes, scale = torch.randint(-1, 2, (70, 384), dtype=torch.int8), torch.rand(70)
    call = plan.Plan(config, 8, 32, 70, 384, 384, torch.float32, False, False, torch.device("cpu"))
    for M in (17, 5):
        x = torch.randn(M, 384)
        exact = reference.linear(x, codes, scale, None)
        y = call(x, pack(codes), scale, None)
        assert (y.double() - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert not imitated


def test_what_it_does_not_take(imitated):
    call = plan.Plan(
        TILE,
        8,
        16,
        70,
        128,
        128,
        torch.float16,
        False,
        False,
        torch.device("cpu"),
    )
    packed, scale = torch.zeros(70, 32, dtype=torch.uint8), torch.rand(70)
    assert call(torch.zeros(2, 129, dtype=torch.float16)[:, 1:], packed, scale, None) is None  # not aligned
    strided = torch.zeros(70, 64, dtype=torch.uint8)[:, :32]
    assert call(torch.zeros(2, 128, dtype=torch.float16), strided, scale, None) is None
    assert call(torch.zeros(2, 128, dtype=torch.float16), packed, scale, None) is not None
