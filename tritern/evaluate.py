"""How close a model's vectors and neighbours are to another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import rankdata

from .errors import TriternError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class Fidelity:
    """Closeness of a model to its teacher on a set of texts; 1.0 is identical everywhere.

    Attributes:
        cosine: mean cosine between the two vectors of a text.
        cosine_p5: its 5th percentile.
        overlap: mean share of a text's k nearest other texts that both models find.
        rank_correlation: mean over texts of Spearman's correlation between the two models' similarities to
            all other texts.
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
    model: SentenceTransformer,
    teacher: SentenceTransformer | np.ndarray,
    texts: Sequence[str],
    *,
    k: int = 10,
    batch_size: int = 64,
    show_progress_bar: bool = False,
    prompt: str | None = None,
) -> Fidelity:
    """Compare a model with a teacher on texts; cosine, top-k overlap and rank correlation.

    Args:
        model: the model to judge.
        teacher: the model it should agree with, or that model's vectors [len(texts), any width].
        texts: at least k + 2 different texts. Time and memory grow with the square of their number for the
            neighbours.
        k: neighbours to compare.
        batch_size, show_progress_bar, prompt: passed to ``encode``; a prompt of None is the model's default.

    Raises:
        TriternError: too few texts, or teacher vectors whose number does not fit.
    """
    if isinstance(texts, str) or len(texts) < k + 2:
        raise TriternError(f"texts must hold at least k + 2 = {k + 2} strings; received {len(texts)}")
    options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar, "convert_to_numpy": True}
    options |= {} if prompt is None else {"prompt": prompt}
    ours = _normalized(np.asarray(model.encode(list(texts), **options), dtype=np.float32))
    if isinstance(teacher, np.ndarray):
        theirs = _normalized(teacher.astype(np.float32))
    else:
        theirs = _normalized(np.asarray(teacher.encode(list(texts), **options), dtype=np.float32))
    if len(theirs) != len(texts):
        raise TriternError(f"teacher must hold one vector per text, {len(texts)}; received {len(theirs)}")
    same_width = ours.shape == theirs.shape
    cosine = (ours * theirs).sum(1) if same_width else np.full(len(texts), np.nan)
    overlap, correlation = [], []
    for i in range(len(texts)):
        a, b = np.delete(ours @ ours[i], i), np.delete(theirs @ theirs[i], i)
        nearest = set(np.argpartition(-a, k)[:k].tolist())
        overlap.append(len(nearest.intersection(np.argpartition(-b, k)[:k].tolist())) / k)
        correlation.append(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
    return Fidelity(
        cosine=float(cosine.mean()),
        cosine_p5=float(np.percentile(cosine, 5)),
        overlap=float(np.mean(overlap)),
        rank_correlation=float(np.mean(correlation)),
        k=k,
        texts=len(texts),
    )


def _normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
