"""The fingerprint of an index's model: its vectors of a few texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import TriternError
from .embed import embed
from .store import Store

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PROBES = (
    "A man is playing a guitar on stage.",
    "How do I sort a list of dictionaries by a key?",
    "Übergrößenträger, naïve café, 北京, мир",
    "x = [f(i) for i in range(10)]  # 3.14",
    "The committee postponed its decision until the budget is known. " * 40,
)
SAME_MODEL = 0.995
"""Least mean cosine between the probes' vectors now and when the index was built. 16-bit arithmetic and other
hardware stay above it. A model and its ternary form are far below it."""


def check_model(store: Store, model: SentenceTransformer, now: np.ndarray) -> None:
    """Refuse a model other than the one that the store was made with.

    Args:
        store: its rows hold vectors of a model.
        model: it must be the same model.
        now: the model's ``probes``.

    Raises:
        TriternError: it is another model.
    """
    then = store["probes"]
    if len(then) != now.nbytes or similarity_of(model) != store["similarity"]:
        reason = "vectors of another width or similarity"
    else:
        then = np.frombuffer(then, np.float32).reshape(now.shape)
        lengths = np.linalg.norm(then, axis=1) * np.linalg.norm(now, axis=1)
        cosine = float(((then * now).sum(1) / np.maximum(lengths, 1e-12)).mean())
        if cosine >= SAME_MODEL:
            return
        reason = f"mean cosine {cosine:.3f} between the vectors of {len(now)} probes"
    raise TriternError(
        f"{store.folder} was built with another model ({store['model']}; {reason}): its vectors cannot be "
        "compared. Open it with that model, or build an index with this one"
    )


def similarity_of(model: SentenceTransformer) -> str:
    """The model's similarity of vectors.

    Raises:
        TriternError: faiss has no index for it.
    """
    name = model.similarity_fn_name
    if name not in ("cosine", "dot", "euclidean"):
        raise TriternError(
            f"model.similarity_fn_name must be 'cosine', 'dot' or 'euclidean'; received {name!r}, and "
            "faiss has no index for it"
        )
    return name


def probes(model: SentenceTransformer) -> np.ndarray:
    """Vectors of the probes as queries and as documents: [2 * len(PROBES), width], float32."""
    both = [embed(model, PROBES, task=task).cpu().numpy() for task in ("query", "document")]
    return np.concatenate(both)


def name_of(model: SentenceTransformer) -> str:
    """The path or name that the model was loaded from."""
    data, inner = model.model_card_data, getattr(model[0], "auto_model", None)
    return str(getattr(inner, "name_or_path", None) or data.base_model or type(model[0]).__name__)
