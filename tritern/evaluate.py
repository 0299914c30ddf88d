"""How close a model's vectors and neighbours are to another's."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import rankdata
from torch import nn

from .engine.encoder import encode
from .errors import TriternError
from .inputs import check_texts, check_vectors, many, true_or_false, whole_number
from .modes import evaluating
from .pretrained import model_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


SAME = 1e-6
"""Cosines that differ by less count as equal: float32 rounds that much."""


@dataclass(frozen=True)
class Fidelity:
    """Closeness of a model to its teacher on a set of texts; 1.0 means identical.

    Attributes:
        cosine: mean cosine between the two vectors of a text.
        cosine_p5: its 5th percentile.
        overlap: mean share of a text's k nearest other texts that both models find.
        rank_correlation: Spearman's correlation between the two models' similarities of a text to all other
            texts, averaged over the texts.
        k: neighbours counted in ``overlap``.
        texts: number of texts.
    """

    cosine: float
    cosine_p5: float
    overlap: float
    rank_correlation: float
    k: int
    texts: int

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine:.4f} (5th percentile {self.cosine_p5:.4f}), "
            f"top-{self.k} overlap {self.overlap:.1%}, "
            f"rank correlation {self.rank_correlation:.4f} on {self.texts:,} texts"
        )


def evaluate(
    model: SentenceTransformer | str | Path,
    teacher: SentenceTransformer | np.ndarray | str | Path,
    texts: Iterable[str],
    *,
    k: int = 10,
    batch_size: int = 64,
    show_progress_bar: bool = False,
    prompt: str | None = None,
) -> Fidelity:
    """Compare a model with a teacher on texts: cosine, top-k overlap and rank correlation.

    Args:
        model: the model to judge, or its name or folder. It is not changed; its mode stays.
        teacher: the model to agree with, its name or folder, or its vectors [len(texts), any width].
        texts: at least k + 2 different texts, none empty. Time and memory grow with the square of their
            number.
        k: neighbours to compare.
        batch_size, show_progress_bar, prompt: passed to ``encode``; a prompt of None is the model's default.

    Returns:
        The closeness. ``cosine`` and ``cosine_p5`` are NaN if the widths differ.

    Raises:
        TriternError: too few texts; a text that is empty or not a string; a model that cannot be loaded;
            vectors of the wrong number, not finite, all zeros, or all alike (these have no nearest ones).
    """
    k, batch_size = whole_number(k, "k", 1), whole_number(batch_size, "batch_size", 1)
    show_progress_bar = true_or_false(show_progress_bar, "show_progress_bar")
    if prompt is not None and not isinstance(prompt, str):
        raise TriternError(f"prompt must be a string or None; received {prompt!r}")
    texts = text_list(texts)
    if len(texts) < k + 2:
        raise TriternError(f"texts must hold at least k + 2 = {k + 2} strings; received {len(texts)}")
    given = isinstance(teacher, np.ndarray)
    if given:
        check_vectors(teacher, "teacher", len(texts))
    else:
        teacher = model_of(teacher, "teacher", encoder=True)
    model = model_of(model, "model", encoder=True)
    options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    options |= {} if prompt is None else {"prompt": prompt}
    pair = {}
    for name, judged in (("model", model), ("teacher", teacher)):
        vectors = judged if isinstance(judged, np.ndarray) else encoded(judged, texts, **options)
        check_vectors(vectors, name if vectors is judged else f"vectors of the {name}", len(texts))
        pair[name] = normalized(vectors)
    result = fidelity(pair["model"], pair["teacher"], k)
    for name, vectors in pair.items() if np.isnan(result.rank_correlation) else ():
        if (number := next((i for i in range(len(texts)) if _alike(_others(vectors, i))), None)) is not None:
            raise TriternError(
                f"{name}: text number {number} is equally similar to all other texts: its neighbours have no "
                "order. Are the texts different, and the model's weights loaded?"
            )
    return result


def text_list(texts: Iterable[str]) -> list[str]:
    """The texts, checked.

    Raises:
        TriternError: not an iterable; a text that is empty or not a string.
    """
    if isinstance(texts, (str, Path)):
        raise TriternError(
            f"texts must be many strings; received one, {str(texts)[:60]!r}: read the texts of a file with "
            "tritern.distillation.read_texts(file)"
        )
    texts = list(many(texts, "texts"))
    check_texts(texts)
    return texts


def encoded(model: Any, texts: list[str], **options: Any) -> np.ndarray:
    """A model's vectors [len(texts), width]. ``encode`` would change the model's mode; this keeps it."""
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext():
        return np.asarray(encode(model, texts, convert_to_numpy=True, **options))


def fidelity(ours: np.ndarray, theirs: np.ndarray, k: int) -> Fidelity:
    """Closeness of normalized vectors [N, any width], N at least k + 2. Undefined figures are NaN."""
    cosine = (ours * theirs).sum(1) if ours.shape == theirs.shape else np.full(len(ours), np.nan)
    overlap, correlation = [], []
    for i in range(len(ours)):
        a, b = _others(ours, i), _others(theirs, i)
        nearest = set(np.argpartition(-a, k)[:k].tolist())
        overlap.append(len(nearest.intersection(np.argpartition(-b, k)[:k].tolist())) / k)
        ranked = not (_alike(a) or _alike(b))
        correlation.append(np.corrcoef(rankdata(a), rankdata(b))[0, 1] if ranked else np.nan)
    return Fidelity(
        cosine=float(cosine.mean()),
        cosine_p5=float(np.percentile(cosine, 5)),
        overlap=float(np.mean(overlap)),
        rank_correlation=float(np.mean(correlation)),
        k=k,
        texts=len(ours),
    )


def normalized(vectors: np.ndarray) -> np.ndarray:
    """float32 [N, width] of length 1; zeros stay zeros. Lengths are computed in float64: none overflows."""
    vectors = vectors.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def _others(vectors: np.ndarray, i: int) -> np.ndarray:
    """Cosines of a text to all others."""
    return np.delete(vectors @ vectors[i], i)


def _alike(cosines: np.ndarray) -> bool:
    return bool(np.ptp(cosines) <= SAME)
