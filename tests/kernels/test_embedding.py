"""Tables of 4 bits: the format by hand, its rounding against a finer search, the kernel against the CPU."""

import pytest
import torch

from tritern_kernels import lookup, quantize_table
from tritern_kernels.embedding import _launch as launched

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def plain(packed, scale, width):
    """The values one by one, from the description of the format."""
    rows = []
    for row, scales in zip(packed.tolist(), scale.double().tolist()):
        values = []
        for i, s in enumerate(scales):
            group = row[16 * i : 16 * i + 16]
            values += [s * ((b & 15) - 8) for b in group] + [s * ((b >> 4) - 8) for b in group]
        rows.append(values[:width])
    return torch.tensor(rows, dtype=torch.float64)


def relative_error(values, weight):
    return float((values.double() - weight.double()).square().sum() / weight.double().square().sum())


def test_by_hand():
    codes = torch.arange(32) % 16 - 8.0  # -8 to 7 twice
    weight = torch.stack([codes * 0.5, codes * -0.25, torch.zeros(32)])
    packed, scale = quantize_table(weight)
    assert scale.tolist() == [[0.5], [-0.25], [0.0]]
    assert packed[0].tolist() == packed[1].tolist() == [17 * i for i in range(16)]  # both halves hold i
    assert packed[2].tolist() == [0x88] * 16
    assert torch.equal(lookup(torch.tensor([[2, 0, 1]]), packed, scale, 32), weight[[2, 0, 1]][None])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 31, 32, 80, 384])
def test_lookup_reads_the_format(width, dtype):
    packed, scale = quantize_table(torch.randn(50, width).to(dtype))
    assert packed.shape == (50, 16 * -(-width // 32)) and scale.shape == (50, -(-width // 32))
    got = lookup(torch.arange(50), packed, scale, width)
    assert got.dtype == scale.dtype == dtype and torch.equal(got, plain(packed, scale, width).to(dtype))


def test_rounding_is_near_the_best():
    """Against 400 scales a group, of either sign: within a hundredth of their squared error."""
    weight = torch.randn(64, 96)
    groups = weight.view(64, 3, 32)
    least = torch.full((64, 3), torch.inf)
    peak = groups.abs().amax(-1, keepdim=True)
    for factor in torch.linspace(0.05, 0.2, 200):
        for scale in (peak * factor, -peak * factor):
            error = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(-1)
            least = torch.minimum(least, error)
    best = float(least.sum() / weight.square().sum())
    packed, scale = quantize_table(weight)
    assert best * 0.99 < relative_error(plain(packed, scale, 96), weight) < best * 1.015


def test_better_than_the_rounding_of_llama_cpp():
    quants = pytest.importorskip("gguf.quants", reason="needs the gguf package")
    from gguf import GGMLQuantizationType

    weight, kind = torch.randn(200, 384), GGMLQuantizationType.Q4_0
    theirs = quants.dequantize(quants.quantize(weight.numpy(), kind), kind)
    ours = lookup(torch.arange(200), *quantize_table(weight), 384)
    assert relative_error(ours, weight) < 0.93 * relative_error(torch.from_numpy(theirs), weight)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_rounding_does_not_depend_on_the_size(size):
    weight = torch.randn(9, 64)
    packed, scale = quantize_table(weight)
    other, other_scale = quantize_table(weight * size)
    assert torch.equal(other, packed) and torch.allclose(other_scale, scale * size)


def test_values_too_small_for_a_scale_are_zero():
    weight = torch.full((1, 32), 1e-7).half()
    packed, scale = quantize_table(weight / 8)
    assert scale.item() == 0 and not lookup(torch.tensor([0]), packed, scale, 32).any()


def test_rows_are_rounded_alone():
    """However many are rounded at once, and whatever stands beside them."""
    weight = torch.randn(5000, 40)
    packed, scale = quantize_table(weight)
    for part in (slice(0, 1), slice(1023, 1025), slice(4999, 5000)):
        alone = quantize_table(weight[part])
        assert torch.equal(alone[0], packed[part]) and torch.equal(alone[1], scale[part])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [*FLOATS[:2], pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("M", "width"), [(0, 32), (1, 32), (63, 80), (17, 384), (130, 33)])
def test_the_kernel_gives_the_bits_of_the_cpu(M, width, dtype, ids_dtype, device):
    packed, scale = quantize_table(torch.randn(70, width).to(dtype))
    ids = torch.randint(0, 70, (M,), dtype=ids_dtype)
    got = launched(ids.to(device), packed.to(device), scale.to(device), width)
    assert torch.equal(got.cpu(), lookup(ids, packed, scale, width))


def test_ids_that_are_no_rows(device):
    """An error on a CPU; in the kernel, which cannot raise one, NaN and no read outside of the table."""
    packed, scale = quantize_table(torch.randn(7, 40))
    for bad in (-1, 7, 1 << 40):
        with pytest.raises(IndexError):
            lookup(torch.tensor([bad]), packed, scale, 40)
        got = launched(torch.tensor([3, bad]).to(device), packed.to(device), scale.to(device), 40)
        assert got[1].isnan().all() and got[0].isfinite().all()


@pytest.mark.gpu
def test_the_operator_on_the_gpu():
    packed, scale = (t.cuda() for t in quantize_table(torch.randn(70, 80).half()))
    ids = torch.randint(0, 70, (3, 5)).cuda()
    got = lookup(ids, packed, scale, 80)
    assert torch.equal(got.cpu(), lookup(ids.cpu(), packed.cpu(), scale.cpu(), 80))
    compiled = torch.compile(lambda i: lookup(i, packed, scale, 80) + 1, fullgraph=True)
    assert torch.equal(compiled(ids), got + 1)


def test_operator_schema_and_fake():
    packed, scale = quantize_table(torch.randn(9, 40))
    torch.library.opcheck(torch.ops.tritern.lookup, (torch.tensor([[1, 2, 8]]), packed, scale, 40))


def test_refusals():
    packed, scale = quantize_table(torch.randn(9, 40))
    ids = torch.tensor([1])
    with pytest.raises(
        TypeError, match="weight must be float32, float16 or bfloat16; received torch.float64"
    ):
        quantize_table(torch.randn(9, 40).double())
    with pytest.raises(ValueError, match=r"weight must be a matrix \[rows, width\]; received shape \[9\]"):
        quantize_table(torch.randn(9))
    with pytest.raises(TypeError, match="ids must be int32 or int64; received torch.float32"):
        lookup(ids.float(), packed, scale, 40)
    with pytest.raises(TypeError, match="packed must be uint8 and scale .*; received torch.int8 and"):
        lookup(ids, packed.to(torch.int8), scale, 40)
    with pytest.raises(
        ValueError,
        match=r"rows of 65 values need packed \[rows, 48\] and scale \[rows, 3\]; received \[9, 32\]",
    ):
        lookup(ids, packed, scale, 65)
    with pytest.raises(ValueError, match="ids are on meta, packed on cpu"):
        torch.ops.tritern.lookup(ids.to("meta"), packed, scale, 40)
