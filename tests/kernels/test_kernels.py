"""Every kernel against its reference: on the GPU when there is one, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from tritern_kernels import (
    cuda,
    linear,
    pack,
    padded_k,
    reference,
    round_to_int4,
    tables,
    ternarize_weight,
)
from tritern_kernels.config import KernelConfig, formula_tiles
from tritern_kernels.formats import LARGEST_CODE, WEIGHT_BITS, from_packed_order, to_packed_order
from tritern_kernels.ternarize import expand, ternarize
from tritern_kernels.tune import describe

pytestmark = [pytest.mark.usefixtures("poisoned")]

SHAPES = [(130, 300), (70, 63), (257, 513), (64, 128), (33, 1)]
TOKENS = [1, 17, 63, 130]
SMALL = KernelConfig(16, 32, 128, num_warps=4, num_stages=2)
FEW = replace(SMALL, share_k=True)
# The interpreter multiplies bf16 wrongly, so bf16 runs on a GPU only.
FLOATS = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def random_codes(N, K, bits=2):
    most = LARGEST_CODE[bits]
    return torch.randint(-most, most + 1, (N, K), dtype=torch.int8)


def operands(M, N, K, device, bits=2):
    x_q, codes = torch.randint(-127, 128, (M, K), dtype=torch.int8), random_codes(N, K, bits)
    padded = torch.nn.functional.pad(x_q, (0, padded_k(K) - K))
    return x_q, codes, to_packed_order(padded).to(device), pack(codes, bits).to(device)


def sums(x_packed, packed, config):
    """The kernel's int32 sums: all scales 1, float32 output, exact below 2**24."""
    M, N = x_packed.shape[0], packed.shape[0]
    ones_m, ones_n = torch.ones(M, device=packed.device), torch.ones(N, device=packed.device)
    return cuda.gemm_int8(x_packed, ones_m, packed, ones_n, None, config, torch.float32).cpu()


@pytest.mark.parametrize("config", [SMALL, FEW], ids=["tiles", "share_k"])
@pytest.mark.parametrize("M", TOKENS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_int8_sums_are_exact(config, M, N, K, bits, device):
    x_q, codes, x_packed, packed = operands(M, N, K, device, bits)
    config = replace(config, block_m=64, block_n=64) if M > 64 and not config.share_k else config
    assert torch.equal(sums(x_packed, packed, config).to(torch.int32), reference.int8_sums(x_q, codes))


@pytest.mark.parametrize("split", [2, 3, 5])
@pytest.mark.parametrize("M", [1, 17, 63])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_split_k_is_exact(M, split, bits, device):
    x_q, codes, x_packed, packed = operands(M, 130, 5 * 128 - 7, device, bits)
    got = sums(x_packed, packed, replace(SMALL, split_k=split))
    assert torch.equal(got.to(torch.int32), reference.int8_sums(x_q, codes))


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_sums_at_the_extremes(bits, device):
    K, most = 1024, LARGEST_CODE[bits]
    x_q, codes = torch.full((2, K), 127, dtype=torch.int8), torch.full((2, K), most, dtype=torch.int8)
    x_q[1], codes[1] = -127, -most
    got = sums(to_packed_order(x_q).to(device), pack(codes, bits).to(device), SMALL)
    largest = 127.0 * K * most
    assert got.tolist() == [[largest, -largest], [-largest, largest]]


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_one_hot_tokens_read_out_columns(bits, device):
    K = 200
    codes = random_codes(37, K, bits)
    x_q = torch.nn.functional.pad(torch.eye(K, dtype=torch.int8), (0, padded_k(K) - K))
    got = sums(to_packed_order(x_q).to(device), pack(codes, bits).to(device), SMALL)
    assert torch.equal(got.to(torch.int8), codes.T)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("out", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_int8_epilogue(split, out, bits, device):
    M, N, K = 17, 70, 384
    x_q, codes, x_packed, packed = operands(M, N, K, device, bits)
    scale_x, scale, bias = torch.rand(M) / 100, torch.rand(N), torch.randn(N)
    config = replace(SMALL, split_k=split)
    got = cuda.gemm_int8(
        x_packed, scale_x.to(device), packed, scale.to(device), bias.to(device), config, out
    ).cpu()
    exact = reference.epilogue(reference.int8_sums(x_q, codes), scale_x, scale, bias)
    bound = 4 * torch.finfo(out).eps * exact.abs().amax()  # float32 arithmetic, then one rounding to out
    assert got.dtype == out and (got.double() - exact).abs().amax() <= bound


@pytest.mark.parametrize("config", [SMALL, FEW], ids=["tiles", "share_k"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("M", TOKENS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_16bit_is_within_torchs_own_error(config, dtype, M, N, K, bits, device):
    x, codes = torch.randn(M, K).to(dtype), random_codes(N, K, bits)
    scale, bias = torch.rand(N), torch.randn(N).to(dtype)
    got = cuda.gemm_direct(
        x.to(device), pack(codes, bits).to(device), scale.to(device), bias.to(device), config, dtype
    ).cpu()
    exact = reference.epilogue(x.double() @ codes.double().T, None, scale, bias)
    torchs = torch.nn.functional.linear(x, (codes * scale[:, None]).to(dtype), bias)
    assert (got.double() - exact).abs().amax() <= (torchs.double() - exact).abs().amax() * 1.01 + 1e-6
    assert (got.double() - exact).square().mean() <= (torchs.double() - exact).square().mean() * 1.01 + 1e-12


def test_outputs_do_not_depend_on_tile_or_batch(device):
    M, K = 150, 512  # ten rows of tiles: a group of eight and one of two
    x_q, codes, x_packed, packed = operands(M, 96, K, device)
    scale_x, scale, bias = torch.rand(M).to(device), torch.rand(96).to(device), torch.randn(96).to(device)

    def run(rows, config):
        return cuda.gemm_int8(
            x_packed[rows].contiguous(), scale_x[rows], packed, scale, bias, config, torch.float16
        )

    whole = run(slice(None), SMALL)
    sums = reference.int8_sums(x_q, codes)
    exact = reference.epilogue(sums, scale_x.cpu(), scale.cpu(), bias.cpu())
    assert (whole.cpu().double() - exact).abs().max() <= 1e-3 * exact.abs().max()
    large = replace(SMALL, block_m=64, block_n=64, block_k=256)
    for config in (large, replace(SMALL, split_k=4), FEW):
        assert torch.equal(run(slice(None), config), whole)
        assert torch.equal(run(slice(7, 8), config), whole[7:8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 63, 128, 300, 1000, 8192 + 130])
@pytest.mark.parametrize("M", [1, 5])
def test_quantize(M, K, dtype, device):
    x = (torch.randn(M, K) * 10).to(dtype)
    x[0, 0] = 0.0
    q, scale = cuda.quantize(x.to(device))
    expected_q, expected_scale = reference.quantize_activations(x)
    expected_q = to_packed_order(torch.nn.functional.pad(expected_q, (0, padded_k(K) - K)))
    assert torch.equal(q.cpu(), expected_q) and torch.equal(scale.cpu(), expected_scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("K", [63, 384, 8192 + 130])
def test_quantize_behind_gelu(K, dtype, device):
    x = torch.randn(5, K).to(dtype)
    q, scale = cuda.quantize(x.to(device), activation="gelu")
    exact = torch.nn.functional.gelu(x.double())
    got = from_packed_order(q.cpu()).double()[:, :K] * scale.cpu().double()[:, None]
    step = exact.abs().amax(1, keepdim=True) / 127
    assert ((got - exact).abs() <= 0.51 * step + torch.finfo(dtype).eps * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, *FLOATS])
@pytest.mark.parametrize("K", [63, 384, 8192 + 130])
def test_quantize_behind_swiglu(K, dtype, device):
    x = torch.randn(5, 2 * K).to(dtype)
    q, scale = cuda.quantize(x.to(device), activation="swiglu")
    gate, up = x.double().chunk(2, dim=1)
    exact = torch.nn.functional.silu(gate) * up
    got = from_packed_order(q.cpu()).double()[:, :K] * scale.cpu().double()[:, None]
    step = exact.abs().amax(1, keepdim=True) / 127
    assert ((got - exact).abs() <= 0.51 * step + 1.1 * torch.finfo(dtype).eps * exact.abs()).all()
    assert not from_packed_order(q.cpu())[:, K:].any()


@pytest.mark.parametrize("dtype", [torch.float32, *FLOATS])
@pytest.mark.parametrize(("M", "K"), [(1, 63), (17, 384), (5, 1100), (3, 8192)])
def test_add_layer_norm_quantize(M, K, dtype, device):
    x, residual = torch.randn(M, K).to(dtype), torch.randn(M, K).to(dtype)
    weight, bias = torch.rand(K).to(dtype) + 0.5, torch.randn(K).to(dtype)
    got = cuda.norm_quantize(*(t.to(device) for t in (x, residual, weight, bias)), 1e-12)
    y, q, scale = (t.cpu() for t in got)
    doubles = (weight.double(), bias.double())
    exact = torch.nn.functional.layer_norm((x + residual).double(), (K,), *doubles, eps=1e-12)
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 4e-6).all()
    expected_q, expected_scale = reference.quantize_activations(y)
    assert torch.equal(from_packed_order(q)[:, :K], expected_q) and torch.equal(scale, expected_scale)


def rms_norm(x, weight, eps):
    """As in transformers' decoders: each step rounded to the dtype."""
    normalized = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return weight * normalized.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *FLOATS])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("M", "K"), [(1, 63), (17, 384), (5, 1100), (3, 8192)])
def test_rms_norm_quantize(M, K, add, dtype, device):
    x, weight = torch.randn(M, K).to(dtype), torch.rand(K).to(dtype) + 0.5
    residual = torch.randn(M, K).to(dtype) if add else None
    on_device = [None if t is None else t.to(device) for t in (x, residual, weight)]
    y, q, scale = (t.cpu() for t in cuda.norm_quantize(*on_device, None, 1e-6))
    assert torch.equal(y, x + residual if add else x)
    exact = rms_norm(y.double(), weight.double(), 1e-6)
    got = from_packed_order(q).double()[:, :K] * scale.double()[:, None]
    step = exact.abs().amax(1, keepdim=True) / 127
    assert ((got - exact).abs() <= 0.51 * step + 1.1 * torch.finfo(dtype).eps * exact.abs()).all()
    # and but for last bits of the mean square what torch gives
    assert (
        from_packed_order(q)[:, :K] != reference.quantize_activations(rms_norm(y, weight, 1e-6))[0]
    ).float().mean() < 0.01


def test_norm_quantize_isolates_bad_tokens(device):
    x = torch.randn(3, 384)
    x[1, 7] = float("inf")
    x, ones, zeros = x.to(device), torch.ones(384, device=device), torch.zeros(384, device=device)
    for bias in (zeros, None):
        y, q, scale = cuda.norm_quantize(x, x, ones, bias, 1e-5)
        assert scale.cpu().isnan().tolist() == [False, True, False] and q[1].count_nonzero() == 0
        assert y.isfinite().all(1).cpu().tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, *FLOATS])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("heads", "head_dim", "texts"), [((3, 1), 16, 3), ((16, 8), 128, 1)])
def test_norm_rotate(heads, head_dim, texts, normalize, dtype, device):
    tokens, total = 7, sum(heads)
    x = torch.randn(texts * tokens, (total + heads[1]) * head_dim + 5).to(dtype)
    angles = torch.outer(torch.arange(tokens), 1e4 ** -torch.arange(0, 1, 2 / head_dim)).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = tuple((torch.rand(head_dim) + 0.5).to(dtype) for _ in range(2)) if normalize else None
    got = x.clone().to(device)
    cuda.norm_rotate(
        got, cos.to(device), sin.to(device), heads, weights and tuple(w.to(device) for w in weights), 1e-6
    )
    got = got.cpu()
    assert torch.equal(got[:, total * head_dim :], x[:, total * head_dim :])  # values and what follows
    turned = x[:, : total * head_dim].view(texts, tokens, total, head_dim)
    if weights:
        turned = torch.cat([rms_norm(t, w, 1e-6) for t, w in zip(turned.split(heads, 2), weights)], 2)
    low, high = turned.chunk(2, -1)
    expected = turned * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]
    difference = (got[:, : total * head_dim].view_as(expected) - expected).abs().double()
    assert (difference <= 4 * torch.finfo(dtype).eps * turned.abs().amax(-1, keepdim=True)).all()
    assert (difference > 0).double().mean() < (0.5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("K", [64, 8192 + 130])
def test_quantize_isolates_bad_tokens(K, device):
    x = torch.randn(6, K)
    x[1, 3], x[2, K - 1], x[3, 5], x[4] = float("nan"), float("inf"), -float("inf"), 1e-38
    q, scale = cuda.quantize(x.to(device))
    expected_q, expected_scale = reference.quantize_activations(x)
    assert q[1:5].count_nonzero() == 0 and scale[1:4].isnan().all()
    assert torch.equal(scale.cpu()[[0, 4, 5]], expected_scale[[0, 4, 5]])
    assert torch.equal(
        q.cpu()[0], to_packed_order(torch.nn.functional.pad(expected_q, (0, padded_k(K) - K)))[0]
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("M", [1, 17])
@pytest.mark.parametrize(("N", "K"), [(70, 63), (33, 384), (130, 500)])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_quantizing_on_the_way_gives_the_same_bits(dtype, M, N, K, bits, device):
    x, codes = torch.randn(M, K).to(dtype).to(device), random_codes(N, K, bits)
    x[0, 0] = float("nan") if M > 1 else 3.0
    packed, scale, bias = pack(codes, bits).to(device), torch.rand(N).to(device), torch.randn(N).to(device)
    config = replace(FEW, quantizing=True)
    got = cuda.gemm_direct(x, packed, scale, bias, config, dtype)
    apart = cuda.gemm_int8(*cuda.quantize(x), packed, scale, bias, SMALL, dtype)
    assert torch.equal(got.isnan(), apart.isnan()) and torch.equal(got.nan_to_num(), apart.nan_to_num())
    assert got[0].isnan().all() == (M > 1)


@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize(("N", "K"), [(9, 300), (5, 1), (3, 128), (17, 777)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ternarize(rule, N, K, dtype, device):
    weight = (torch.randn(N, K) * 0.02).to(dtype)
    weight[0] = 0.0
    if N > 4 and K > 2:
        weight[1, :] = 1e-3
        weight[1, 2] = 3.0  # one outlier: the best threshold is far above the mean
        weight[2] = torch.randn(K).sign() * 0.1  # no zeros at all
    got = ternarize(weight.to(device), rule)
    codes, scale = reference.ternarize(weight, rule)
    got_codes, got_scale = got.codes().cpu(), got.scale.cpu()
    if rule == "mse":
        exact = weight.double()

        def error(c, s):
            return ((s.double()[:, None] * c - exact) ** 2).sum(1)

        assert (error(got_codes, got_scale) <= error(codes, scale) * (1 + 1e-4) + 1e-12).all()
    else:
        assert torch.allclose(got_scale, scale, rtol=1e-6, atol=0)
        assert torch.equal(got_codes, codes)


def test_ternarize_takes_strided_weights(device):
    weight = torch.randn(300, 40).to(device)
    assert torch.equal(ternarize(weight.T, "twn").packed, ternarize(weight.T.contiguous(), "twn").packed)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["int8", "16bit"])
@pytest.mark.parametrize("M", [1, 33, 64, 100, 700, 3000])
@pytest.mark.parametrize("rounded", [ternarize_weight, round_to_int4])
def test_dispatch_on_the_gpu(mode, M, rounded):
    bits = 8 if mode == "int8" else 16
    for N, K in [(384, 384), (1536, 384), (384, 1536), (1000, 130), (4096, 1024)]:
        weight = rounded(torch.randn(N, K, device="cuda"))
        x, bias = torch.randn(M, K, device="cuda", dtype=torch.float16), torch.randn(N, device="cuda").half()
        exact = reference.linear(x, weight.codes(), weight.scale, bias, bits)
        got = linear(x, weight, bias, activation_bits=bits).double()
        assert (got - exact).abs().max() <= 2e-3 * exact.abs().max(), (M, N, K)
        assert torch.equal(linear(x[:1], weight, bias, activation_bits=8), linear(x, weight, bias)[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 128, 4096])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_every_tile_on_the_gpu(M, bits):
    capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    x_q, codes, x_packed, packed = operands(M, 520, 1024, "cuda", bits)
    exact = reference.int8_sums(x_q, codes)
    for tile in formula_tiles("int8", capability):
        for split in (1, 2, 4):
            config = replace(tile, split_k=split)
            if config.invalid("int8", 1024, capability, bits) is None:
                assert torch.equal(sums(x_packed, packed, config).to(torch.int32), exact), config


TABLES = [e for path in sorted(tables.CONFIG_DIR.glob("*.json")) for e in tables.load_table(path)]
TABLED = list(dict.fromkeys((e.mode, replace(e.config, expand=False)) for e in TABLES))


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "config"), TABLED, ids=[f"{m} {describe(c)}" for m, c in TABLED])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_every_tables_configuration_on_the_gpu(mode, config, bits):
    capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    K = config.step if config.quantizing else 4096
    M, N = config.block_m + 3, 520
    if config.invalid(mode, K, capability, bits):
        assert bits == 4  # for which it is not chosen
        return
    codes, scale = random_codes(N, K, bits).to("cuda"), torch.rand(N, device="cuda")
    if mode == "16bit" or config.quantizing:
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        got = cuda.gemm_direct(x, pack(codes, bits), scale, None, config, torch.bfloat16)
        exact = reference.linear(x, codes, scale, None, 16 if mode == "16bit" else 8)
        assert (got.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    if mode == "int8":
        x_q, codes, x_packed, packed = operands(M, N, K, "cuda", bits)
        assert torch.equal(sums(x_packed, packed, config).to(torch.int32), reference.int8_sums(x_q, codes))


@pytest.mark.parametrize(("N", "K"), [*SHAPES, (5, 128 * 19 + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_expand_equals_the_reference(N, K, dtype, bits, device):
    codes, scale = random_codes(N, K, bits), torch.rand(N)
    got = expand(pack(codes, bits).to(device), scale.to(device), K, dtype)
    assert torch.equal(got.cpu(), (codes * scale[:, None]).to(dtype))
