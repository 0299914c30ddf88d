"""Codes and scales that fit a layer to its wanted outputs."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_SCALE, KICKS = 0.8, (0.85, 1.15)
"""Factors of the rule's scales for rounding the first codes, and of the best scales for each restart.
Together they give a tenth less squared error than one descent from the rule's codes (MiniLM).
"""
COLUMNS = 128
"""The codes of this many inputs are revised before the rest of the row is updated."""


SWEEPS = 8
"""Passes of a descent through all codes. More would lower the error by less than a hundredth (MiniLM)."""


def search(scale: Tensor, H: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float32 [N, K] in {-1, 0, +1} and positive scales float32 [N] with a low
    ``scale^2 codes H codes^T - 2 scale codes C^T`` in every row.

    The first descent starts at the best real-valued weights, rounded. Further ones start at its result, with
    scales that are too small or too large for one sweep. Each row keeps the lowest result.

    Args:
        scale: float32 [N], about as large as the result.
        H: float64 [K, K], symmetric and positive definite.
        C: float64 [N, K].
    """
    weight = torch.linalg.solve(H, C.T).T.float()
    H, C, scale = H.float(), C.float(), FIRST_SCALE * scale
    codes = (weight / scale[:, None]).round().clamp(-1, 1)
    codes, scale = descend(codes, _best_scale(codes, scale, H, C), H, C)
    for factor in KICKS:
        others, other_scale = descend(codes, factor * scale, H, C)
        lower = _objective(others, other_scale, H, C) < _objective(codes, scale, H, C)
        codes, scale = torch.where(lower[:, None], others, codes), torch.where(lower, other_scale, scale)
    return codes, scale


def descend(codes: Tensor, scale: Tensor, H: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Descend from these codes and scales until no change of one code or scale helps, at most ``SWEEPS``
    sweeps. Shapes and objective are as in ``search``; all float32.
    """
    codes, diagonal = codes.clone(), H.diagonal()
    for _ in range(SWEEPS):
        slope = C / scale[:, None] - codes @ H
        changed = 0
        for begin in range(0, codes.shape[1], COLUMNS):
            part = slice(begin, begin + COLUMNS)
            inner, here = H[part, part], diagonal[part]
            now, g = codes[:, part].T.contiguous(), slope[:, part].T.contiguous()  # a row an input
            old = now.clone()
            for k in range(len(now)):
                best = (g[k] / here[k] + now[k]).round_().clamp_(-1, 1)
                g[k + 1 :] -= inner[k, k + 1 :, None] * (best - now[k])
                now[k] = best
            moved = (now - old).T
            changed += int(moved.count_nonzero())
            codes[:, part] = now.T
            slope[:, part.stop :] -= moved @ H[part, part.stop :]
        scale = _best_scale(codes, scale, H, C)
        if changed <= 1e-4 * codes.numel():
            break
    return codes, scale


def _best_scale(codes: Tensor, scale: Tensor, H: Tensor, C: Tensor) -> Tensor:
    """Scales [N] that minimise the objective for these codes; the given scale if that is not positive."""
    along, length = (codes * C).sum(1), ((codes @ H) * codes).sum(1)
    return torch.where((along > 0) & (length > 0), along / length.clamp(min=1e-30), scale)


def _objective(codes: Tensor, scale: Tensor, H: Tensor, C: Tensor) -> Tensor:
    """The objective of ``search``, [N]."""
    return scale**2 * ((codes @ H) * codes).sum(1) - 2 * scale * (codes * C).sum(1)
