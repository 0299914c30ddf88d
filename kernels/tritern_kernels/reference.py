"""Every operation in plain torch. Tests compare the kernels with this.

It is written for reading, not for speed. All functions work in natural (unpacked) order.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["mse", "absmean", "twn"]
RULES: tuple[str, ...] = get_args(Rule)

SMALLEST_ABSMAX = 1e-30
"""Least absolute maximum for quantizing a row, so that 127 / absmax stays finite."""
ONE_127TH = 1.0 / 127.0


def ternarize(weight: Tensor, rule: Rule = "mse") -> tuple[Tensor, Tensor]:
    """Weight [N, K] -> codes int8 [N, K] and scale float32 [N], with ``scale * codes`` close to the weight.

    ``mse``: per row, the threshold and scale with the smallest squared error; they keep the k largest
    magnitudes, where k maximises (sum of the k largest)^2 / k. ``absmean``: one scale for the matrix,
    mean|W|; codes are rounded and clamped (BitNet b1.58, arXiv:2402.17764). ``twn``: per row, threshold
    0.7 * mean|w| and the mean magnitude above it (Ternary Weight Networks, arXiv:1605.04711).
    """
    w = weight.float()
    magnitude = w.abs()
    if rule == "absmean":
        scale = magnitude.mean(dtype=torch.float64).float().expand(w.shape[0]).clone()
        threshold = 0.5 * scale
    elif rule == "twn":
        threshold = 0.7 * magnitude.mean(1)
        kept = magnitude > threshold[:, None]
        scale = (magnitude * kept).sum(1) / kept.sum(1).clamp(min=1)
    elif rule == "mse":
        ordered = magnitude.sort(dim=1, descending=True).values
        sums = ordered.cumsum(1, dtype=torch.float64)
        count = torch.arange(1, w.shape[1] + 1, dtype=torch.int64, device=w.device)
        best = (sums * sums / count).argmax(1, keepdim=True)
        scale = (sums.gather(1, best) / count[best]).squeeze(1).float()
        threshold = 0.5 * scale  # at the optimum the k-th magnitude is above scale / 2 and the next one below
    else:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; received {rule!r}")
    codes = (torch.sign(w) * (magnitude > threshold[:, None])).to(torch.int8)
    return codes, scale


def round_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [N, K] -> codes int8 [N, K] from -7 to 7 and scale float32 [N], with ``scale * codes`` close to
    the weight.

    Per row: of 32 scales from 0.3 to 1 times absmax / 7, the one with the smallest squared error, then the
    best scale for its codes.
    """
    w = weight.float()
    absmax = w.abs().amax(1).clamp(min=SMALLEST_ABSMAX)
    scale, least = absmax / 7, torch.full_like(absmax, torch.inf)
    for share in (0.3 + 0.7 * i / 31 for i in range(32)):
        candidate = absmax * (share / 7)
        error = (_round_int4(w, candidate) * candidate[:, None] - w).square().sum(1)
        scale, least = torch.where(error < least, candidate, scale), torch.minimum(error, least)
    codes = _round_int4(w, scale)
    length = codes.square().sum(1)
    scale = torch.where(length > 0, (codes * w).sum(1) / length.clamp(min=1), 0.0)
    return codes.to(torch.int8), scale


def _round_int4(w: Tensor, scale: Tensor) -> Tensor:
    return (w / scale[:, None]).round_().clamp_(-7, 7)


def codes_given(weight: Tensor, scale: Tensor) -> Tensor:
    """Codes int8 [N, K] of a weight [N, K] for known scales float32 [N]: sign(w) where |w| > scale / 2."""
    w, threshold = weight.float(), 0.5 * scale[:, None]
    return (w > threshold).to(torch.int8) - (w < -threshold).to(torch.int8)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token absmax int8: x [M, K] -> int8 [M, K] and scale float32 [M], with ``scale * q`` close to x.

    A token with NaN or infinity gets q = 0 and scale = NaN. Then only its own outputs are NaN.
    """
    values = x.float()
    absmax = values.abs().amax(1).clamp(min=SMALLEST_ABSMAX)
    finite = torch.isfinite(absmax)
    scale = absmax * ONE_127TH
    inverse = torch.full_like(absmax, 127.0) / absmax  # 127.0 / absmax would multiply a rounded reciprocal
    q = torch.round(values * inverse[:, None])
    q = torch.where(finite[:, None], q, 0.0).to(torch.int8)
    return q, torch.where(finite, scale, torch.nan)


def int8_sums(x_q: Tensor, codes: Tensor) -> Tensor:
    """int32 [M, N] = x_q int8 [M, K] times codes int8 [N, K] transposed; exact."""
    return (x_q.double() @ codes.double().T).to(torch.int32)


def epilogue(sums: Tensor, scale_x: Tensor | None, scale: Tensor, bias: Tensor | None) -> Tensor:
    """float64 [M, N] = scale_x[m] * scale[n] * sums[m, n] + bias[n]."""
    y = sums.double()
    if scale_x is not None:
        y = y * scale_x.double()[:, None]
    y = y * scale.double()
    return y if bias is None else y + bias.double()


def linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, activation_bits: int = 8) -> Tensor:
    """float64 [M, N] for x [M, K]: with int8 activations (8), or with x as it is (16)."""
    if activation_bits == 16:
        return epilogue(x.double() @ codes.double().T, None, scale, bias)
    x_q, scale_x = quantize_activations(x)
    return epilogue(int8_sums(x_q, codes), scale_x, scale, bias)
