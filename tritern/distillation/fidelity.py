"""Closeness to the teacher, measured during a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator

from ..errors import TriternError
from ..evaluate import Fidelity, encoded, fidelity, normalized, text_list
from ..inputs import check_vectors
from ..pretrained import model_of
from .split import LEAST_HELD

logger = logging.getLogger(__name__)

K = 10


class FidelityEvaluator(BaseEvaluator):
    """``tritern.evaluate`` as an evaluator for sentence-transformers' trainer: closeness to the teacher on
    texts. Its primary metric is the top-10 overlap.

    Metrics are NaN for a model with meaningless vectors, such as zeros early in a run. A warning says why.

    Args:
        texts: at least 12; a prompt, if any, is part of the text.
        teacher: the teacher, its name or folder, or its vectors [len(texts), width].
        name: prefix of the metrics.

    Raises:
        TriternError: too few texts; a text that is empty or not a string; no such teacher; vectors of a wrong
            shape, not finite or all zeros.
    """

    def __init__(
        self,
        texts: Iterable[str],
        teacher: SentenceTransformer | np.ndarray | str | Path,
        name: str = "fidelity",
    ) -> None:
        super().__init__()
        self.texts, self.name = text_list(texts), name
        if len(self.texts) < LEAST_HELD:
            raise TriternError(f"texts must hold at least {LEAST_HELD} strings; received {len(self.texts)}")
        if isinstance(teacher, np.ndarray):
            check_vectors(teacher, "teacher", len(self.texts))
            self.teacher = teacher
        else:
            self.teacher = encoded(model_of(teacher, "teacher", encoder=True), self.texts, prompt="")
            check_vectors(self.teacher, "vectors of the teacher", len(self.texts))
        self.primary_metric = "overlap"
        self.latest: Fidelity | None = None

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Metrics ``{name}_cosine``, ``{name}_overlap`` and ``{name}_rank_correlation``."""
        vectors = encoded(model, self.texts, prompt="", batch_size=64, show_progress_bar=False)
        try:
            check_vectors(vectors, "vectors of the student", len(self.texts))
            self.latest = fidelity(normalized(vectors), normalized(self.teacher), K)
        except TriternError as error:  # it must not end a run of hours
            logger.warning("closeness is not defined: %s", error)
            self.latest = Fidelity(math.nan, math.nan, math.nan, math.nan, K, len(self.texts))
        values = {k: getattr(self.latest, k) for k in ("cosine", "overlap", "rank_correlation")}
        return self.prefix_name_to_metrics(values, self.name)
