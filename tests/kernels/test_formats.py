import pickle

import pytest
import torch

from tritern_kernels import MAX_K, PackedTernary, pack, padded_k, unpack
from tritern_kernels.formats import check_scale, check_shape, from_packed_order, to_packed_order

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies


def random_codes(N, K, seed=0):
    return torch.randint(-1, 2, (N, K), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


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


@settings(max_examples=200, deadline=None)
@given(N=st.integers(1, 300), K=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_round_trip(N, K, seed):
    codes = random_codes(N, K, seed)
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (N, padded_k(K) // 4)
    assert torch.equal(unpack(packed, K), codes)


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


def test_packed_ternary_dequantizes():
    codes, scale = random_codes(5, 130), torch.rand(5)
    weight = PackedTernary(pack(codes), scale, (5, 130))
    assert torch.equal(weight.dequantize(), codes.float() * scale[:, None])
    assert weight.dequantize(torch.float16).dtype == torch.float16


def test_packed_ternary_is_compared_by_its_bits():
    codes, scale = random_codes(5, 130), torch.rand(5)
    weight, same = (PackedTernary(pack(codes), scale.clone(), (5, 130)) for _ in range(2))
    assert weight == weight and weight == same and hash(weight) == hash(same)
    assert {weight, same, pickle.loads(pickle.dumps(weight))} == {weight}
    other = codes.clone()
    other[4, 129] = 1 - other[4, 129].abs()
    for different in (
        PackedTernary(pack(other), scale, (5, 130)),
        PackedTernary(pack(codes), scale.nextafter(torch.tensor(2.0)), (5, 130)),
        PackedTernary(pack(random_codes(5, 130)), scale, (5, 129)),
        PackedTernary(pack(codes[:4]), scale[:4], (4, 130)),
        PackedTernary(pack(codes).to("meta"), scale.to("meta"), (5, 130)),
        codes, "weight", None,
    ):  # fmt: skip
        assert weight != different and not weight == different
    meta = [PackedTernary(pack(codes).to("meta"), scale.to("meta"), (5, 130)) for _ in range(2)]
    assert meta[0] == meta[0] and meta[0] != meta[1] and meta.index(meta[1]) == 1


def test_the_largest_k_cannot_overflow():
    assert 127 * 64 * MAX_K <= 2**31 - 1 < 127 * 64 * (MAX_K + 128)
    check_shape(1, MAX_K)
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
        (r"packed must have shape \[2, 32\].*received \[2, 64\]",
         torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2), (2, 100)),
        (r"scale must hold one value per output row, shape \[2\]; received \[3\]",
         torch.zeros(2, 32, dtype=torch.uint8), torch.ones(3), (2, 100)),
        ("scale must be float32; received torch.float16",
         torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2).half(), (2, 100)),
        ("packed must be uint8", torch.zeros(2, 32, dtype=torch.int8), torch.ones(2), (2, 100)),
        ("one device", torch.zeros(2, 32, dtype=torch.uint8, device="meta"), torch.ones(2), (2, 100)),
    ],
)  # fmt: skip
def test_packed_ternary_refuses(match, packed, scale, shape):
    with pytest.raises((TypeError, ValueError), match=match):
        PackedTernary(packed, scale, shape)
