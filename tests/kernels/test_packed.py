"""Attention and pooling over packed texts, against float64 text by text."""

import pytest
import torch

from tritern_kernels.attention import packed_attention
from tritern_kernels.config import QUERY_ROWS
from tritern_kernels.pooling import MODES, normalize, pool

LENGTHS = (1, 63, 65, 2, 200, 64, 17)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def starts_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).tolist()


def tiles_of(lengths, unused=2):
    """Tiles, every one followed by unused ones."""
    tiles = []
    for start, end in zip(starts_of(lengths), starts_of(lengths)[1:]):
        for first in range(start, end, QUERY_ROWS):
            tiles += [[first, start, end], *[[0, 0, 0]] * unused]
    return torch.tensor(tiles, dtype=torch.int32)


def expected(q, k, v, lengths, scale, causal=False, window=None, bias=None):
    """[T, heads, D] in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    parts = []
    for start, end in zip(starts_of(lengths), starts_of(lengths)[1:]):
        score = scale * q[:, start:end] @ k[:, start:end].mT
        offset = torch.arange(end - start)[None, :] - torch.arange(end - start)[:, None]
        if bias is not None:
            middle = bias.shape[1] // 2
            score = score + bias.double()[:, offset.clamp(-middle, middle) + middle]
        seen = torch.ones_like(offset, dtype=torch.bool)
        seen &= (offset <= 0) if causal else seen
        seen &= (offset.abs() < window) if window else seen
        parts.append(score.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, start:end])
    return torch.cat(parts, 1).transpose(0, 1)


def qkv(heads, key_heads, head_dim, dtype, device, lengths=LENGTHS):
    """Views of one buffer [T, (heads + 2 * key heads) * D], as a block has them."""
    torch.manual_seed(0)
    rows = torch.randn(sum(lengths), (heads + 2 * key_heads) * head_dim).to(dtype).to(device)
    parts = rows.view(sum(lengths), -1, head_dim).transpose(0, 1)
    return parts.split([heads, key_heads, key_heads])


def check(got, exact, dtype):
    # rounding of p and of the result to the dtype, and in fp32 what sums of a few hundred numbers lose
    bound = {torch.float32: 4e-6, torch.float16: 3e-3, torch.bfloat16: 2.4e-2}[dtype]
    assert (got.cpu().double() - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(2, 2, 32), (4, 2, 48), (2, 1, 128)])
@pytest.mark.parametrize("settings", [{}, {"causal": True}, {"window": 30}, {"causal": True, "window": 70}])
def test_attention(heads, key_heads, head_dim, settings, dtype, device):
    q, k, v = qkv(heads, key_heads, head_dim, dtype, device)
    got = packed_attention(q, k, v, tiles_of(LENGTHS).to(device), scale=head_dim**-0.5, **settings)
    assert got.shape == (sum(LENGTHS), heads, head_dim) and got.is_contiguous() and got.dtype == dtype
    check(got, expected(q.cpu(), k.cpu(), v.cpu(), LENGTHS, head_dim**-0.5, **settings), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_a_bias(dtype, device):
    q, k, v = qkv(3, 3, 32, dtype, device)
    bias = torch.randn(3, 41).to(dtype)
    got = packed_attention(q, k, v, tiles_of(LENGTHS).to(device), scale=0.2, bias=bias.to(device))
    check(got, expected(q.cpu(), k.cpu(), v.cpu(), LENGTHS, 0.2, bias=bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"causal": True, "window": 50}])
def test_a_text_has_the_same_bits_at_another_place(dtype, settings, device):
    q, k, v = qkv(2, 1, 64, dtype, device)
    starts = starts_of(LENGTHS)
    together = packed_attention(q, k, v, tiles_of(LENGTHS).to(device), scale=0.1, **settings)
    order = [4, 0, 6, 2]
    rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order]).to(device)
    lengths = [LENGTHS[i] for i in order]
    moved = [t[:, rows] for t in (q, k, v)]
    apart = packed_attention(*moved, tiles_of(lengths, unused=0).to(device), scale=0.1, **settings)
    assert torch.equal(apart, together[rows])


def test_scores_that_overflow_nowhere(device):
    q, k, v = qkv(1, 1, 32, torch.float32, device)
    got = packed_attention(1e3 * q, k, v, tiles_of(LENGTHS).to(device), scale=1.0)
    check(got, expected(1e3 * q.cpu(), k.cpu(), v.cpu(), LENGTHS, 1.0), torch.float32)


def test_no_texts(device):
    q, k, v = qkv(1, 1, 32, torch.float32, device)
    none = torch.zeros(0, 3, dtype=torch.int32, device=device)
    assert packed_attention(q, k, v, none, scale=1.0).shape == (sum(LENGTHS), 1, 32)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda q, k, v, t: (q.double(), k, v, t), TypeError, "all the same; received torch.float64"),
        (lambda q, k, v, t: (q, k[:, 1:], v, t), ValueError, r"received \[2, 412, 32\], \[2, 411, 32\]"),
        (lambda q, k, v, t: (q[..., :8], k[..., :8], v[..., :8], t), ValueError, "D from 16 to 128"),
        (lambda q, k, v, t: (q, k, v, t.long()), ValueError, r"tiles must be int32 \[G, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, match, device):
    arguments = change(*qkv(2, 2, 32, torch.float32, device), tiles_of(LENGTHS).to(device))
    with pytest.raises(error, match=match):
        packed_attention(*arguments, scale=1.0)


def test_a_bias_that_does_not_fit_is_refused(device):
    with pytest.raises(ValueError, match=r"bias must be \[2, B\], B odd; received \[2, 4\]"):
        arguments = *qkv(2, 2, 32, torch.float32, device), tiles_of(LENGTHS).to(device)
        packed_attention(*arguments, scale=1.0, bias=torch.zeros(2, 4, device=device))


# ---------------------------------------------------------------- pooling


def pooled(x, mode):
    """Of one text [tokens, H] in float64."""
    x = x.double()
    weights = torch.arange(1, len(x) + 1).double()[:, None]
    return {
        "cls": lambda: x[0],
        "lasttoken": lambda: x[-1],
        "max": lambda: x.max(0).values,
        "mean": lambda: x.mean(0),
        "mean_sqrt_len_tokens": lambda: x.sum(0) / len(x) ** 0.5,
        "weightedmean": lambda: (x * weights).sum(0) / weights.sum(),
    }[mode]()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [32, 200])
def test_pool(mode, width, dtype, device):
    lengths = (*LENGTHS, 0, 5, 0)
    x, starts = torch.randn(sum(lengths), width).to(dtype), starts_of(lengths)
    got = pool(x.to(device), torch.tensor(starts, dtype=torch.int32, device=device), mode).cpu()
    assert got.dtype == dtype and not got[7].any() and not got[9].any()
    for i, (start, end) in enumerate(zip(starts, starts[1:])):
        if end > start:
            exact = pooled(x[start:end], mode)
            error = torch.finfo(dtype).eps * exact.abs() + 1e-5
            assert ((got[i].double() - exact).abs() <= error).all()
    alone = pool(
        x[starts[4] : starts[5]].to(device), torch.tensor([0, 200], dtype=torch.int32, device=device), mode
    )
    assert torch.equal(alone[0].cpu(), got[4])


def test_pool_keeps_nan_with_its_text(device):
    x = torch.randn(6, 32)
    x[4, 3] = float("nan")
    starts = torch.tensor([0, 3, 6], dtype=torch.int32, device=device)
    for mode in ("mean", "max"):
        found = pool(x.to(device), starts, mode).cpu()
        assert found[0].isfinite().all() and found[1].isnan().nonzero().flatten().tolist() == [3]


def test_pool_refuses(device):
    x, starts = torch.randn(4, 32, device=device), torch.tensor([0, 4], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="mode must be one of cls, .*; received 'median'"):
        pool(x, starts, "median")
    with pytest.raises(TypeError, match="starts int32; received torch.float32 and torch.int64"):
        pool(x, starts.long(), "mean")
    with pytest.raises(ValueError, match=r"contiguous, and starts \[N \+ 1\]"):
        pool(x[:, :16], starts, "mean")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "W"), [(1, 384), (5, 33), (3, 4096)])
def test_normalize(N, W, dtype, device):
    x = torch.randn(N, W + 7).to(dtype)[:, :W]
    x[0] = 0
    got = normalize(x.to(device)).cpu()
    exact = torch.nn.functional.normalize(x.double())
    assert got.dtype == dtype and got.is_contiguous()
    assert ((got.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-7).all()
    assert torch.equal(normalize(x[-1:].to(device)).cpu(), got[-1:])


def test_normalize_keeps_nan_with_its_row(device):
    x = torch.tensor([[float("nan"), 3.0, 4.0], [3.0, 4.0, 0.0], [float("inf"), 1.0, 0.0]], device=device)
    assert normalize(x).cpu().isnan().any(1).tolist() == [True, False, True]
    assert normalize(x)[0].isnan().all() and torch.allclose(
        normalize(x)[1].cpu(), torch.tensor([0.6, 0.8, 0.0])
    )


def test_normalize_refuses(device):
    with pytest.raises(TypeError, match="received torch.int64"):
        normalize(torch.ones(2, 3, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match=r"received \[3\]"):
        normalize(torch.ones(3, device=device))
