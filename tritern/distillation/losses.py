"""Distances between a student and its teacher: pure functions of their outputs.

Every function returns a mean over the texts of the batch. So the average over processes with equal batches is
the value for all their texts. Padding does not count.

Letters: B texts, T tokens (padded), D width, mask [B, T] with 1 for real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of the pooled vectors [B, D]."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def similarity(
    student: Tensor,
    teacher: Tensor,
    all_student: Tensor | None = None,
    all_teacher: Tensor | None = None,
    first: int = 0,
    temperature: float = 0.05,
) -> Tensor:
    """KL(teacher || student) of each text's similarities to the other texts.

    The similarities are softmax(cosine / temperature) over all other texts.

    Args:
        student, teacher: pooled vectors [B, D]; the widths may differ.
        all_student, all_teacher: vectors of all processes [R * B, D]; None: those of the batch.
        first: the start of this batch in them.
        temperature: of the softmax.
    """
    own = torch.arange(first, first + len(student), dtype=torch.int64, device=student.device)[:, None]

    def rows(vectors: Tensor, everything: Tensor | None) -> Tensor:
        everything = vectors if everything is None else everything
        cosines = F.normalize(vectors.float(), dim=-1) @ F.normalize(everything.float(), dim=-1).T
        others = torch.ones_like(cosines, dtype=torch.bool).scatter_(1, own, False)
        cosines = cosines[others].view(len(cosines), -1)
        return F.log_softmax(cosines / temperature, dim=-1)

    if (len(student) if all_student is None else len(all_student)) < 2:
        return student.sum() * 0.0  # a text alone has no neighbours
    target = rows(teacher, all_teacher)
    return F.kl_div(rows(student, all_student), target, reduction="batchmean", log_target=True)


def hidden_mse(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Squared distance of hidden states [B, T, D], averaged over the given layers.

    The distance of each token is divided by the variance of the teacher's state of that token.
    """
    terms = []
    for s, t in zip(student, teacher, strict=True):
        t = t.float()
        error = (s.float() - t).square().mean(-1) / t.var(-1, correction=0).clamp(min=1e-6)
        terms.append(_per_text(error, mask))
    return torch.stack(terms).mean()


def last_hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Plain mean squared error of the last hidden states [B, T, D]."""
    return _per_text((student.float() - teacher.float()).square().mean(-1), mask)


def _per_text(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over texts of the mean over their real tokens; values and mask [B, T]."""
    mask = mask.to(values.dtype)
    return ((values * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


LOSSES = ("cosine", "similarity", "hidden", "last_hidden")
"""Names of the terms, as in the weights of ``TernaryDistillationArguments``."""


class Outputs(NamedTuple):
    """A model's outputs for a batch: ``pooled`` [B, D] and one tensor [B, T, D] per block in ``hidden``."""

    pooled: Tensor
    hidden: list[Tensor]


def terms(
    student: Outputs,
    teacher: Outputs,
    mask: Tensor | None,
    names: Sequence[str],
    *,
    gathered: dict[str, Any] | None = None,
    dims: Sequence[int] = (),
    temperature: float = 0.05,
) -> dict[str, Tensor]:
    """The named terms, unweighted.

    Args:
        student, teacher: their outputs on the same texts.
        mask: [B, T]; None if no term needs it.
        names: some of ``LOSSES``.
        gathered: keyword arguments ``all_student``, ``all_teacher`` and ``first`` of ``similarity``.
        dims: Matryoshka dimensions. Pooled terms are means over vectors cut to each of these.
        temperature: of ``similarity``.
    """
    result: dict[str, Tensor] = {}
    widths = list(dims) or [student.pooled.shape[-1]]
    for name in names:
        if name == "cosine":
            values = [cosine(student.pooled[:, :d], teacher.pooled[:, :d]) for d in widths]
            result[name] = torch.stack(values).mean()
        elif name == "similarity":
            cut = [_cut(gathered or {}, d) for d in dims] or [gathered or {}]
            pairs = [(student.pooled[:, :d], teacher.pooled[:, :d]) for d in dims]
            pairs = pairs or [(student.pooled, teacher.pooled)]
            values = [similarity(s, t, **g, temperature=temperature) for (s, t), g in zip(pairs, cut)]
            result[name] = torch.stack(values).mean()
        elif mask is not None and name == "hidden":
            result[name] = hidden_mse(student.hidden, teacher.hidden, mask)
        elif mask is not None and name == "last_hidden":
            result[name] = last_hidden_mse(student.hidden[-1], teacher.hidden[-1], mask)
    return result


def _cut(gathered: dict[str, Any], width: int) -> dict[str, Any]:
    return {k: v[:, :width] if isinstance(v, Tensor) else v for k, v in gathered.items()}
