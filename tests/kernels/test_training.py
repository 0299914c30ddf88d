"""The trainable product against a plain-torch layer with fake quantization and torch's own gradients."""

import pytest
import torch

from tritern_kernels import PackedWeight, linear, pack, reference, ternarize_weight, unpack
from tritern_kernels.ternarize import ternarize_given as ternarize_given_kernel
from tritern_kernels.training import Codes, blended_weight, ternarize_given, ternary_linear


def problem(M=33, N=24, K=40, dtype=torch.float32, device="cpu"):
    x = torch.randn(M, K, dtype=dtype)
    weight, bias = torch.randn(N, K) * 0.05, torch.randn(N)
    scale = ternarize_weight(weight).scale
    return [t.to(device).requires_grad_() for t in (x, weight, scale, bias)]


def plain(x, weight, scale, bias, activation_bits, clip):
    """Straight-through by detach: what the docstring's formulas say, left to autograd."""
    x_hat = x
    if activation_bits == 8:
        q, scale_x = reference.quantize_activations(x.detach())
        x_hat = x + (q * scale_x[:, None] - x).detach()
    ratio = weight / scale[:, None]
    inside = (ratio.abs() <= clip).float()
    through = ratio * inside  # outside the clip the code is a constant
    codes = reference.codes_given(weight.detach(), scale.detach())
    w_hat = scale[:, None] * (through + (codes - through).detach())
    return torch.nn.functional.linear(x_hat, w_hat, bias)


def test_codes_for_given_scales_by_hand(device):
    weight = torch.tensor([[0.6, -0.6, 0.5, 0.4], [3.0, -1.1, 0.9, 1.0]], device=device)
    scale = torch.tensor([1.0, 2.0], device=device)
    expected = [[1, -1, 0, 0], [1, -1, 0, 0]]  # exactly scale / 2 is zero
    assert ternarize_given_kernel(weight, scale).codes().tolist() == expected
    assert unpack(ternarize_given(weight, scale).packed, 4).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("N, K", [(1, 1), (5, 130), (17, 300)])
def test_codes_for_given_scales_equal_the_reference(N, K, dtype, device):
    weight, scale = torch.randn(N, K).to(dtype), torch.rand(N) + 0.1
    got = ternarize_given_kernel(weight.to(device), scale.to(device))
    assert torch.equal(got.codes().cpu(), reference.codes_given(weight, scale))
    assert torch.equal(got.scale.cpu(), scale)
    codes = ternarize_given(weight, scale)
    assert torch.equal(codes.packed, got.packed.cpu())


def test_mse_optimal_codes_are_those_of_their_scale():
    weight = torch.randn(50, 200)
    packed = ternarize_weight(weight, "mse")
    assert torch.equal(ternarize_given(weight, packed.scale).packed, packed.packed)


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_inference_product_to_the_bit(dtype, activation_bits, device):
    if dtype == torch.bfloat16 and activation_bits == 16 and device == "cuda":
        pytest.skip("split sums may be added in another order")
    for M in (1, 33, 1030):
        x, weight, scale, bias = problem(M, dtype=dtype, device=device)
        codes = ternarize_given(weight, scale)
        packed = PackedWeight(codes.packed, scale.detach(), tuple(weight.shape))
        expected = linear(x.detach(), packed, bias.detach(), activation_bits=activation_bits)
        got = ternary_linear(x, weight, scale, bias, codes, activation_bits=activation_bits)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("clip", [1.0, 1.5, 1e9])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_gradients_equal_autograd_through_fake_quantization(activation_bits, clip, device):
    ours = problem(device=device)
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    upstream = torch.randn(33, 24, device=device)
    codes = ternarize_given(*ours[1:3])
    y = ternary_linear(*ours, codes, activation_bits=activation_bits, clip=clip)
    y.backward(upstream)
    plain(*theirs, activation_bits, clip).backward(upstream)
    tolerance = 1e-5 if device == "cpu" else 1e-2  # on CUDA the input gradient is a 16-bit product
    for name, a, b in zip(("x", "weight", "scale", "bias"), ours, theirs):
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max(), name
    assert (ours[1].grad == 0).any() == (clip < 2)  # the clip leaves some weights out


@pytest.mark.parametrize("clip", [1.0, 1e9])
def test_blended_weight_has_the_gradients_of_both_parts(clip, device):
    _, weight, scale, _ = problem(device=device)
    codes, upstream = ternarize_given(weight, scale), torch.randn(24, 40, device=device)
    value = blended_weight(weight, scale, codes, 0.25, clip)
    ternary = unpack(codes.packed, 40) * scale[:, None]
    assert torch.allclose(value, 0.75 * weight + 0.25 * ternary)
    value.backward(upstream)
    inside = (weight.abs() <= clip * scale[:, None]).float()
    expected = upstream * (unpack(codes.packed, 40) - inside * weight / scale[:, None])
    assert torch.allclose(weight.grad, 0.75 * upstream + 0.25 * inside * upstream)
    assert torch.allclose(scale.grad, 0.25 * expected.sum(1), atol=1e-6)


def test_backward_products_in_bfloat16_round_and_no_more():
    exact = problem()
    rounded = [t.detach().clone().requires_grad_() for t in exact]
    upstream = torch.randn(33, 24)
    for tensors, dtype in ((exact, None), (rounded, torch.bfloat16)):
        codes = ternarize_given(*tensors[1:3])
        ternary_linear(*tensors, codes, backward_dtype=dtype).backward(upstream)
    for name, a, b in zip(("x", "weight", "scale", "bias"), rounded, exact):
        assert a.grad.dtype == b.grad.dtype
        assert (a.grad - b.grad).abs().max() <= 0.01 * b.grad.abs().max(), name
    assert not torch.equal(rounded[1].grad, exact[1].grad)
    assert torch.equal(rounded[3].grad, exact[3].grad)  # sums of the float32 gradient


def test_input_gradient_through_the_packed_transpose():
    """The path of CUDA, taken on the CPU: dX = (G * scale) times the packed transpose."""
    tensors = problem()
    codes = ternarize_given(*tensors[1:3])
    transposed = pack(unpack(codes.packed, 40).T.contiguous())
    upstream = torch.randn(33, 24)
    expected = torch.autograd.grad(ternary_linear(*tensors, codes), tensors[0], upstream)[0]
    both = Codes(codes.packed, transposed)
    got = torch.autograd.grad(ternary_linear(*tensors, both), tensors[0], upstream)[0]
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_empty_batch_and_leading_dimensions():
    x, weight, scale, bias = problem()
    codes = ternarize_given(weight, scale)
    assert ternary_linear(x[:0], weight, scale, bias, codes).shape == (0, 24)
    three = x.detach().view(3, 11, 40).clone().requires_grad_()
    ternary_linear(three, weight, scale, bias, codes).sum().backward()
    ternary_linear(x, weight, scale, bias, codes).sum().backward()
    assert torch.equal(three.grad.view(33, 40), x.grad)
