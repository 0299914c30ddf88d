"""The public operations on this machine's device: numbers, gradients, torch.compile, errors."""

import platform

import pytest
import torch

from tritern_kernels import (
    MAX_K,
    PackedWeight,
    cpu,
    linear,
    pack,
    quantize_activations,
    reference,
    ternarize_weight,
)
from tritern_kernels.formats import LARGEST_CODE, from_packed_order


def weight(N, K, device="cpu", bits=2):
    most = LARGEST_CODE[bits]
    codes = torch.randint(-most, most + 1, (N, K), dtype=torch.int8)
    return PackedWeight(pack(codes, bits).to(device), (torch.rand(N) + 0.1).to(device), (N, K))


def fake_quantized(x, w, bias):
    """Plain torch with straight-through rounding: what linear's value and gradients must be."""
    q, scale = reference.quantize_activations(x.detach().reshape(-1, x.shape[-1]))
    rounded = (q.float() * scale[:, None]).view_as(x)
    y = torch.nn.functional.linear(x + (rounded - x).detach(), w.dequantize(), bias)
    return y


@pytest.mark.parametrize("M", [1, 17, 130])
@pytest.mark.parametrize(("N", "K"), [(130, 300), (1, 1), (64, 128), (7, 2050)])
@pytest.mark.parametrize("bits", [2, 4])
def test_cpu_sums_equal_the_reference(M, N, K, bits):
    w = weight(N, K, bits=bits)
    x = torch.randint(-127, 128, (M, K)).float()
    x[:, 0] = 127.0  # the scale of every token is 1
    w = PackedWeight(w.packed, torch.ones(N), (N, K))
    expected = reference.int8_sums(x.to(torch.int8), w.codes())
    assert torch.allclose(linear(x, w), expected.float(), rtol=1e-6, atol=0)
    q, _ = quantize_activations(x)
    assert torch.equal(from_packed_order(q)[:, :K], x.to(torch.int8))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="FBGEMM is for x86")
def test_every_product_is_right_on_this_processor():
    assert {*cpu.fastest(8), *cpu.fastest(16)} == set(cpu.PRODUCTS)


def test_every_process_takes_the_same_product_for_16_bit_activations(monkeypatch):
    """Whatever the clock says: sums in float32 differ in the last bits from product to product."""
    monkeypatch.setattr(cpu.time, "perf_counter", iter(range(1, 1000, 7)).__next__)
    right = cpu.fastest.__wrapped__(16)
    assert right == tuple(n for n in ("FBGEMM fp16", "float32") if n in right)


@pytest.mark.parametrize("name", ["oneDNN int8", "FBGEMM int8", "float32"])
@pytest.mark.parametrize(
    ("K", "most"), [(1, 1), (300, 7), (4096, 1), (cpu.largest_exact_k(2), 1), (cpu.largest_exact_k(4), 7)]
)
def test_int8_products_give_the_same_sums(name, K, most):
    """Also where they are the largest and odd, so that float32 could not hold the next one."""
    if name not in cpu.fastest(8):
        pytest.skip(f"this build of torch has no {name}")
    codes = torch.randint(-most, most + 1, (5, K), dtype=torch.int8)
    codes[0], codes[1] = most, -most
    x_q = torch.randint(-127, 128, (7, K), dtype=torch.int8)
    x_q[0], x_q[1] = 127, -127
    product = cpu.PRODUCTS[name]
    sums = product.multiply(x_q.to(product.operand), product.prepare(codes))
    assert torch.equal(sums.to(torch.int32), reference.int8_sums(x_q, codes))


@pytest.mark.parametrize("extra", [None, 0, 1])
@pytest.mark.parametrize("bits", [2, 4])
def test_outputs_do_not_depend_on_the_product(monkeypatch, extra, bits):
    K = 300 if extra is None else cpu.largest_exact_k(bits) + extra
    w, x = weight(3, K, bits=bits), torch.randn(2000 if K == 300 else 5, K)
    w.packed[0] = pack(torch.full((1, K), LARGEST_CODE[bits], dtype=torch.int8), bits)
    x[:2] = 1.0
    x[2, 0] = torch.nan
    results, taken = [], []
    for name in cpu.fastest(8):
        monkeypatch.setattr(cpu, "fastest", lambda bits, name=name: (name,))
        results.append(linear(x, w))
        taken.append(cpu.product_for(8, K, bits))
    assert all(torch.equal(y.nan_to_num(7.0), results[0].nan_to_num(7.0)) for y in results)
    assert results[0].isnan().any(1).nonzero().tolist() == [[2]]
    assert len(set(taken)) == (1 if extra == 1 else len(taken))


def test_training_does_not_pack_weights_that_change_with_every_step(monkeypatch):
    w, x = weight(3, 300), torch.randn(5, 300)
    expected = linear(x, w)
    monkeypatch.setattr(cpu, "fastest", lambda bits: ("FBGEMM int8", "float32", "oneDNN int8"))
    changed = w.packed.clone()
    assert torch.equal(cpu.linear_int8(*cpu.quantize(x), changed, w.scale, None, x.dtype), expected)
    assert list(cpu._kept[changed].forms) == ["float32"]


def test_a_product_that_torch_has_not_is_left_out(monkeypatch):
    def missing(codes):
        raise AttributeError("no such operator")

    wrong = cpu.PRODUCTS["oneDNN int8"]._replace(multiply=lambda x, codes: x.float() @ codes.float().t() + 1)
    absent = cpu.PRODUCTS["FBGEMM int8"]._replace(prepare=missing)
    monkeypatch.setattr(cpu, "PRODUCTS", {**cpu.PRODUCTS, "FBGEMM int8": absent, "oneDNN int8": wrong})
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert cpu.fastest.__wrapped__(8) == ("float32",)


def test_the_quantized_engine_stays_as_the_user_set_it(monkeypatch):
    if "FBGEMM int8" not in cpu.fastest(8):
        pytest.skip("this build of torch has no FBGEMM")
    monkeypatch.setattr(torch.backends.quantized, "engine", "onednn")
    codes = torch.ones(3, 128, dtype=torch.int8)
    kept = cpu.PRODUCTS["FBGEMM int8"].prepare(codes)
    assert torch.backends.quantized.engine == "onednn"
    assert cpu.PRODUCTS["FBGEMM int8"].multiply(torch.ones(2, 128), kept).eq(128).all()


def test_activations_may_be_laid_out_in_any_way():
    """As FBGEMM reads memory as it lies."""
    w, wide = weight(70, 300), torch.randn(9, 2, 400)
    for x in (
        torch.randn(300, 9).t(),
        wide[:, 0, 50:350],
        wide[:, 1, :300].flip(0),
        wide[:1, :1, :300].expand(9, 2, 300),
    ):
        for bits in (8, 16):
            assert torch.equal(
                linear(x, w, activation_bits=bits), linear(x.contiguous(), w, activation_bits=bits)
            )


@pytest.mark.parametrize("bits", [8, 16])
def test_autocast_around_the_operator_changes_nothing(bits):
    w, x = weight(70, 300), torch.randn(9, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, w, activation_bits=bits)
    assert torch.equal(y, linear(x, w, activation_bits=bits))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_equals_the_reference(bits, dtype, device):
    w, bias = weight(70, 300, device), torch.randn(70, device=device)
    x = torch.randn(2, 9, 300, device=device).to(dtype)
    exact = reference.linear(x.view(18, 300), w.codes(), w.scale, bias, bits).view(2, 9, 70)
    y = linear(x, w, bias, activation_bits=bits)
    assert y.dtype == dtype and y.shape == (2, 9, 70)
    rounded_to_bf16 = bits == 16 and device == "cuda" and dtype == torch.float32
    eps = torch.finfo(torch.bfloat16 if rounded_to_bf16 else dtype).eps
    assert (y.double() - exact).abs().max() <= 4 * eps * exact.abs().max()


def test_any_rank_any_strides_any_batch(device):
    w = weight(33, 130, device)
    x = torch.randn(6, 260, device=device)
    y = linear(x[:, ::2], w)
    assert torch.equal(y, linear(x[:, ::2].contiguous(), w))
    assert torch.equal(linear(x[0, :130], w), linear(x[:1, :130], w)[0])
    assert torch.equal(linear(x[3:4, ::2], w), y[3:4])  # alone or in a batch: the same bits
    assert linear(x[:0, :130], w).shape == (0, 33)
    assert linear(torch.zeros(2, 0, 130, device=device), w).shape == (2, 0, 33)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_bad_token_spoils_only_itself(bad, bits, device):
    w = weight(20, 150, device)
    x = torch.randn(5, 150, device=device)
    clean = linear(x, w, activation_bits=bits)
    x[2, 7] = bad
    y = linear(x, w, activation_bits=bits)
    assert not y[2].isfinite().any() if bits == 8 else not y[2].isfinite().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(y[keep], clean[keep])


def test_zero_tokens_give_the_bias(device):
    w, bias = weight(20, 150, device), torch.randn(20, device=device)
    assert torch.equal(linear(torch.zeros(3, 150, device=device), w, bias), bias.expand(3, 20))


def test_gradients_are_straight_through():
    w, bias = weight(30, 100), torch.randn(30, requires_grad=True)
    x = torch.randn(2, 5, 100, requires_grad=True)
    out = torch.randn(2, 5, 30)
    fake_quantized(x, w, bias).backward(out)
    expected = x.grad, bias.grad
    x.grad = bias.grad = None
    linear(x, w, bias).backward(out)
    assert torch.allclose(x.grad, expected[0], atol=2e-5)
    assert torch.allclose(bias.grad, expected[1], atol=2e-5)


def test_backward_after_inference_mode():
    w, x = weight(8, 40), torch.randn(3, 40)
    with torch.inference_mode():
        inside = linear(x, w)
    x.requires_grad_()
    y = linear(x, w)
    y.sum().backward()
    assert torch.equal(y.detach(), inside) and x.grad is not None


def test_opcheck(device):
    w, bias = weight(16, 130, device), torch.randn(16, device=device)
    for x in (torch.randn(3, 130, device=device), torch.randn(2, 3, 130, device=device, requires_grad=True)):
        for bits in (8, 16):
            torch.library.opcheck(torch.ops.tritern.linear.default, (x, w.packed, w.scale, bias, 130, bits))
    torch.library.opcheck(
        torch.ops.tritern.quantize_activations.default, (torch.randn(4, 130, device=device),)
    )
    torch.library.opcheck(torch.ops.tritern.dequantize.default, (w.packed, w.scale, 130, torch.float16))


def test_compile_in_one_graph(device):
    w, bias = weight(16, 130, device), torch.randn(16, device=device)

    def function(x):
        return torch.relu(linear(x * 2, w, bias)) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for M in (1, 2, 9):
        x = torch.randn(M, 130, device=device)
        assert torch.equal(compiled(x), function(x))


def test_a_change_in_place_is_noticed():
    w, x = weight(8, 128), torch.randn(3, 128)
    before = linear(x, w)
    w.packed.copy_(pack(torch.zeros(8, 128, dtype=torch.int8)))
    assert linear(x, w).count_nonzero() == 0 and before.count_nonzero() > 0
    w.packed.data = pack(torch.ones(8, 128, dtype=torch.int8))
    assert linear(x, w).count_nonzero() > 0
    with torch.inference_mode():
        made_inside = pack(torch.ones(8, 128, dtype=torch.int8))
        twin = PackedWeight(made_inside, w.scale.clone(), (8, 128))
        assert linear(x, twin).count_nonzero() > 0
        made_inside.zero_()
        assert linear(x, twin).count_nonzero() == 0


def test_the_unpacked_copy_goes_with_its_weight():
    w = weight(8, 128)
    before = len(cpu._kept)
    linear(torch.randn(1, 128), w)
    assert len(cpu._kept) == before + 1
    del w
    assert len(cpu._kept) == before


@pytest.mark.parametrize("bits", [8, 16])
def test_a_weight_is_prepared_once(monkeypatch, bits):
    """Also one that was made in inference mode, as by a model loaded there."""
    name, times = cpu.fastest(bits)[0], []
    product = cpu.PRODUCTS[name]
    counting = product._replace(prepare=lambda codes: (times.append(1), product.prepare(codes))[1])
    monkeypatch.setitem(cpu.PRODUCTS, name, counting)
    for inside in (False, True):
        times.clear()
        with torch.inference_mode(inside):
            w = weight(8, 128)
        for _ in range(3):
            linear(torch.randn(2, 128), w, activation_bits=bits)
        assert len(times) == 1


def test_refusals():
    w, x = weight(8, 100), torch.randn(2, 100)
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16; received torch.float64"):
        linear(x.double(), w)
    with pytest.raises(ValueError, match=r"x must have shape \[..., 100\]; received \[2, 99\]"):
        linear(x[:, :99], w)
    with pytest.raises(ValueError, match="activation_bits must be 8 or 16; received 4"):
        linear(x, w, activation_bits=4)
    with pytest.raises(
        ValueError,
        match=r"bias must be float32, float16 or bfloat16, shape \[8\].*received torch.float32, \[9\]",
    ):
        linear(x, w, torch.zeros(9))
    with pytest.raises(ValueError, match="x is on meta and the weight on cpu; move one"):
        linear(x.to("meta"), w)
    with pytest.raises(TypeError, match="x must be float32"):
        quantize_activations(x.int())
    with pytest.raises(ValueError, match=r"x must be a matrix \[M, K\]; received shape \[100\]"):
        quantize_activations(x[0])


def test_ternarize_refusals():
    with pytest.raises(ValueError, match=r"NaN or infinity \(first in row 1\)"):
        ternarize_weight(torch.tensor([[1.0, 2.0], [float("inf"), 1.0]]))
    with pytest.raises(TypeError, match="weight must be float32.*received torch.float64"):
        ternarize_weight(torch.ones(2, 2).double())
    with pytest.raises(ValueError, match=r"matrix \[N, K\]; received shape \[2\]"):
        ternarize_weight(torch.ones(2))
    with pytest.raises(ValueError, match="rule must be one of mse, absmean, twn; received 'best'"):
        ternarize_weight(torch.ones(2, 2), "best")
    with pytest.raises(ValueError, match="in_features must be at most 264,192"):
        ternarize_weight(torch.ones(1, MAX_K + 1))


def test_ternarize_equals_the_reference():
    matrix = torch.randn(12, 130)
    for rule in reference.RULES:
        codes, scale = reference.ternarize(matrix, rule)
        got = ternarize_weight(matrix.requires_grad_(), rule)
        assert torch.equal(got.codes(), codes) and torch.equal(got.scale, scale)
        assert not got.scale.requires_grad
        matrix = matrix.detach()
