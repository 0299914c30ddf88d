"""Codes and scales that fit a layer to its wanted outputs."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_SCALE, KICKS = 0.8, (0.8, 1.2)
"""Factors of the rule's scales for rounding the first codes, and of the best scales for each restart.
Each restart lowers the squared error a little more (benchmarks/NOTES.md).
"""
COLUMNS, FEW_COLUMNS = 128, 16
"""The codes of this many inputs are revised before the rest of the row is updated, in two levels."""

SWEEPS, PAYS = 8, 1e-4
"""A descent ends after so many passes through all codes, or when a pass changes a smaller share of them. More
would lower the error by less than a hundredth (MiniLM).
"""


def search(
    scale: Tensor, H: Tensor, C: Tensor, largest: int = 1, quick: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes float32 [N, K] from -largest to largest and positive scales float32 [N] with a low
    ``scale^2 codes H codes^T - 2 scale codes C^T`` in every row.

    The first descent starts at the best real-valued weights, rounded. Further ones start at its result, with
    scales that are too small or too large for one sweep. Each row keeps the lowest result.

    Args:
        scale: float32 [N], about as large as the result.
        H: float64 [K, K], symmetric and positive definite.
        C: float64 [N, K].
        largest: 1 for ternary codes, 7 for 4 bits.
        quick: one descent alone.
    """
    weight = torch.linalg.solve(H, C.T).T.float()
    H, C = H.float(), C.float()
    codes = (weight / (FIRST_SCALE * scale)[:, None]).round().clamp(-largest, largest)
    codes, scale = descend(codes, FIRST_SCALE * scale, H, C, largest, rescale=True)
    for factor in () if quick else KICKS:
        other, other_scale = descend(codes, factor * scale, H, C, largest)
        lower = _objective(other, other_scale, H, C) < _objective(codes, scale, H, C)
        codes, scale = torch.where(lower[:, None], other, codes), torch.where(lower, other_scale, scale)
    return codes, scale


def descend(
    codes: Tensor, scale: Tensor, H: Tensor, C: Tensor, largest: int = 1, rescale: bool = False
) -> tuple[Tensor, Tensor]:
    """Descend from these codes and scales until no change of one code or scale helps, at most ``SWEEPS``
    sweeps. Shapes and objective are as in ``search``; all float32. ``rescale``: begin with the best scales.
    """
    now, wanted = codes.T.contiguous(), C.T.contiguous()  # a row an input
    inverse = (1 / H.diagonal()).tolist()
    product = H @ now
    if rescale:
        scale = _best_scale(now, wanted, product, scale)
    for _ in range(SWEEPS):
        slope = wanted / scale - product
        before = now.clone()
        for begin in range(0, len(now), COLUMNS):
            part = slice(begin, begin + COLUMNS)
            _sweep(now[part], slope[part], H[part, part], inverse[part], largest)
            slope[part.stop :].addmm_(H[part.stop :, part], now[part] - before[part], alpha=-1)
        product = H @ now
        scale = _best_scale(now, wanted, product, scale)
        if int((now != before).count_nonzero()) <= PAYS * now.numel():
            break
    return now.T.contiguous(), scale


def _sweep(now: Tensor, slope: Tensor, H: Tensor, inverse: list[float], largest: int) -> None:
    """Revise the codes ``now`` [inputs, N] one input after the other, in place."""
    for begin in range(0, len(now), FEW_COLUMNS):
        end = min(begin + FEW_COLUMNS, len(now))
        before = now[begin:end].clone()
        for k in range(begin, end):
            best = torch.add(now[k], slope[k], alpha=inverse[k]).round_().clamp_(-largest, largest)
            slope[k + 1 : end].addr_(H[k + 1 : end, k], best - now[k], alpha=-1)
            now[k] = best
        slope[end:].addmm_(H[end:, begin:end], now[begin:end] - before, alpha=-1)


def _best_scale(codes: Tensor, wanted: Tensor, product: Tensor, scale: Tensor) -> Tensor:
    """Scales [N] that minimise the objective for codes [K, N]; the given scale where that is not positive."""
    along, length = (codes * wanted).sum(0), (codes * product).sum(0)
    return torch.where((along > 0) & (length > 0), along / length.clamp(min=1e-30), scale)


def _objective(codes: Tensor, scale: Tensor, H: Tensor, C: Tensor) -> Tensor:
    """The objective of ``search``, [N]."""
    return scale**2 * ((codes @ H) * codes).sum(1) - 2 * scale * (codes * C).sum(1)
