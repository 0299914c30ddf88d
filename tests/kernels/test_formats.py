import pickle

import pytest
import torch

from tritern_kernels import MAX_K, PackedWeight, pack, unpack
from tritern_kernels.formats import (
    LARGEST_CODE,
    check_scale,
    check_shape,
    from_packed_order,
    max_k,
    packed_width,
    to_packed_order,
    weight_bits,
)

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies


def random_codes(N, K, seed=0, bits=2):
    most, generator = LARGEST_CODE[bits], torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, (N, K), dtype=torch.int8, generator=generator)


def test_two_rows_by_hand():
    packed = pack(torch.tensor([[1, -1, 0, 1], [0, 0, -1, 0]], dtype=torch.int8))
    assert packed.shape == (2, 32)
    # k = 0..3 are slab 0 of words 0..3: the low two bits of bytes 0, 2, 4, 6
    assert packed[0, :8].tolist() == [0b01, 0, 0b11, 0, 0b00, 0, 0b01, 0]
    assert packed[1, :8].tolist() == [0, 0, 0, 0, 0b11, 0, 0, 0]
    assert packed[:, 8:].count_nonzero() == 0


@pytest.mark.parametrize("k", [0, 1, 15, 16, 63, 64, 100, 127, 128, 200])
def test_every_weight_sits_where_the_format_says(k):
    codes = torch.zeros(1, 256, dtype=torch.int8)
    codes[0, k] = -1
    words = pack(codes).view(torch.int16)[0]
    atom, inside = divmod(k, 128)
    expected = torch.zeros(32, dtype=torch.int32)
    expected[16 * atom + inside % 16] = 0b11 << (2 * (inside // 16))
    assert torch.equal(words.int() & 0xFFFF, expected)


@pytest.mark.parametrize("k", [0, 1, 15, 31, 32, 63, 64, 100, 127, 128, 200])
def test_every_4_bit_weight_sits_where_the_format_says(k):
    codes = torch.zeros(1, 256, dtype=torch.int8)
    codes[0, k] = -3
    words = pack(codes, 4).view(torch.int16)[0]
    atom, inside = divmod(k, 128)
    expected = torch.zeros(64, dtype=torch.int32)
    expected[32 * atom + inside % 32] = 0b1101 << (4 * (inside // 32))
    assert torch.equal(words.int() & 0xFFFF, expected)


@settings(max_examples=200, deadline=None)
@given(N=st.integers(1, 300), K=st.integers(1, 300), seed=st.integers(0, 2**31), bits=st.sampled_from([2, 4]))
def test_round_trip(N, K, seed, bits):
    codes = random_codes(N, K, seed, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (N, packed_width(K, bits))
    assert weight_bits(packed, K) == bits and torch.equal(unpack(packed, K), codes)


@settings(max_examples=50, deadline=None)
@given(M=st.integers(1, 5), atoms=st.integers(1, 4))
def test_activation_order(M, atoms):
    x = torch.randint(-127, 128, (M, atoms * 128), dtype=torch.int8)
    permuted = to_packed_order(x)
    assert torch.equal(from_packed_order(permuted), x)
    codes = random_codes(7, atoms * 128)
    byte = pack(codes).view(7, atoms, 32)
    lanes = torch.stack(
        [(byte >> (2 * j)) & 3 for j in range(4)], dim=2
    )  # slab by slab, as the kernel unpacks
    lanes = torch.where(lanes == 3, -1, lanes.int()).view(7, -1)
    assert torch.equal(permuted.int() @ lanes.T, x.int() @ codes.int().T)
    codes = random_codes(7, atoms * 128, bits=4)
    byte = pack(codes, 4).view(7, atoms, 64)
    lanes = torch.stack([byte & 15, byte >> 4], dim=2).int()
    lanes = torch.where(lanes > 7, lanes - 16, lanes).view(7, -1)
    assert torch.equal(permuted.int() @ lanes.T, x.int() @ codes.int().T)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_packed_weight_dequantizes(bits):
    codes, scale = random_codes(5, 130, bits=bits), torch.rand(5)
    weight = PackedWeight(pack(codes, bits), scale, (5, 130))
    assert weight.bits == bits
    assert torch.equal(weight.dequantize(), codes.float() * scale[:, None])
    assert weight.dequantize(torch.float16).dtype == torch.float16


def test_a_packed_weight_is_compared_by_its_bits():
    codes, scale = random_codes(5, 130), torch.rand(5)
    weight, same = (PackedWeight(pack(codes), scale.clone(), (5, 130)) for _ in range(2))
    assert weight == weight and weight == same and hash(weight) == hash(same)
    assert {weight, same, pickle.loads(pickle.dumps(weight))} == {weight}
    other = codes.clone()
    other[4, 129] = 1 - other[4, 129].abs()
    for different in (
        PackedWeight(pack(other), scale, (5, 130)),
        PackedWeight(pack(codes), scale.nextafter(torch.tensor(2.0)), (5, 130)),
        PackedWeight(pack(random_codes(5, 130)), scale, (5, 129)),
        PackedWeight(pack(codes[:4]), scale[:4], (4, 130)),
        PackedWeight(pack(codes).to("meta"), scale.to("meta"), (5, 130)),
        codes, "weight", None,
    ):  # fmt: skip
        assert weight != different and not weight == different
    meta = [PackedWeight(pack(codes).to("meta"), scale.to("meta"), (5, 130)) for _ in range(2)]
    assert meta[0] == meta[0] and meta[0] != meta[1] and meta.index(meta[1]) == 1


def test_the_largest_k_cannot_overflow():
    assert max_k(2) == MAX_K
    for bits, unit in ((2, 64), (4, 7 * 16)):
        assert 127 * unit * max_k(bits) <= 2**31 - 1 < 127 * unit * (max_k(bits) + 128)
        check_shape(1, max_k(bits), bits)
    with pytest.raises(ValueError, match=r"at most 150,912.*4-bit weights; received 150,913"):
        check_shape(1, max_k(4) + 1, 4)
    with pytest.raises(ValueError, match=r"at most 264,192.*received 264,193"):
        check_shape(1, MAX_K + 1)


@pytest.mark.parametrize(
    ("error", "match", "codes"),
    [
        (TypeError, "codes must be int8; received torch.float32", torch.zeros(2, 2)),
        (ValueError, r"matrix \[N, K\]; received shape \[4\]", torch.zeros(4, dtype=torch.int8)),
        (ValueError, "received values from 0 to 2", torch.tensor([[0, 2]], dtype=torch.int8)),
        (ValueError, "received values from -128 to 0", torch.tensor([[0, -128]], dtype=torch.int8)),
        (ValueError, "at least 1; received", torch.zeros(0, 4, dtype=torch.int8)),
    ],
)
def test_pack_refuses(error, match, codes):
    with pytest.raises(error, match=match):
        pack(codes)


def test_pack_takes_codes_for_its_bits():
    pack(torch.tensor([[7, -7]], dtype=torch.int8), 4)
    for codes, bits, match in (
        ([[-8, 0]], 4, "between -7 and 7; received values from -8 to 0"),
        ([[2, 0]], 2, r"in \{-1, 0, \+1\}; received values from 0 to 2"),
        ([[1, 0]], 3, "bits must be 2 or 4; received 3"),
    ):
        with pytest.raises(ValueError, match=match):
            pack(torch.tensor(codes, dtype=torch.int8), bits)
    with pytest.raises(ValueError, match=r"\[N, 32\] \(2 bits\) or \[N, 64\].*received \[2, 33\]"):
        weight_bits(torch.zeros(2, 33, dtype=torch.uint8), 100)


@pytest.mark.parametrize("byte", [0b1000_0000, 0b0111_1000])
def test_unpack_refuses_the_unused_4_bit_pattern(byte):
    packed = pack(random_codes(2, 128, bits=4), 4)
    packed[1, 5] = byte
    with pytest.raises(ValueError, match="bit pattern 1000"):
        unpack(packed, 128)


def test_unpack_refuses_the_unused_pattern():
    packed = pack(random_codes(2, 128))
    packed[1, 5] = 0b00_10_00_01
    with pytest.raises(ValueError, match="bit pattern 10"):
        unpack(packed, 128)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-9])
def test_check_scale_refuses(value):
    check_scale(torch.tensor([0.0, 1e-30, 3.0]))
    with pytest.raises(ValueError, match="scale holds NaN, infinity or a negative value"):
        check_scale(torch.tensor([1.0, value]))


@pytest.mark.parametrize(
    ("match", "packed", "scale", "shape"),
    [
        (r"packed must have shape \[2, 32\], or \[2, 64\] in 4 bits.*received \[2, 96\]",
         torch.zeros(2, 96, dtype=torch.uint8), torch.ones(2), (2, 100)),
        (r"scale must hold one value per output row, shape \[2\]; received \[3\]",
         torch.zeros(2, 32, dtype=torch.uint8), torch.ones(3), (2, 100)),
        ("scale must be float32; received torch.float16",
         torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2).half(), (2, 100)),
        ("packed must be uint8", torch.zeros(2, 32, dtype=torch.int8), torch.ones(2), (2, 100)),
        ("one device", torch.zeros(2, 32, dtype=torch.uint8, device="meta"), torch.ones(2), (2, 100)),
    ],
)  # fmt: skip
def test_a_packed_weight_refuses(match, packed, scale, shape):
    with pytest.raises((TypeError, ValueError), match=match):
        PackedWeight(packed, scale, shape)
