import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import tritern
from tritern import TriternError


class Vectors:
    """Stands for a model: gives prepared vectors."""

    def __init__(self, vectors):
        self.vectors = np.asarray(vectors, dtype=np.float32)

    def encode(self, texts, **_):
        return self.vectors[: len(texts)]


def circle(degrees):
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def test_by_hand():
    texts = list("abcd")
    teacher, student = circle([0, 10, 30, 90]), circle([0, 10, 30, 90])
    same = tritern.evaluate(Vectors(student), Vectors(teacher), texts, k=1)
    assert (
        same.cosine == pytest.approx(1.0)
        and same.overlap == 1.0
        and same.rank_correlation == pytest.approx(1.0)
    )
    # The last text moves to the first: nearest of 0 is now 3, of 1 also 3, of 2 still 1, of 3 now 0.
    moved = tritern.evaluate(Vectors(circle([0, 10, 30, 1])), teacher * 5, texts, k=1)
    assert moved.overlap == 0.25
    assert moved.cosine == pytest.approx((3 + np.cos(np.deg2rad(89))) / 4, abs=1e-6)
    assert moved.rank_correlation < 0.5 and moved.texts == 4


def test_other_width_compares_neighbours_only():
    result = tritern.evaluate(Vectors(circle([0, 10, 30, 90])), np.eye(4, 3) + 1, list("abcd"), k=1)
    assert np.isnan(result.cosine) and 0 <= result.overlap <= 1


def test_patched_minilm_is_close_but_not_equal(minilm, minilm_path, texts):
    texts = texts + [t + " And then some more happened." for t in texts]
    result = tritern.evaluate(
        tritern.patch(minilm), SentenceTransformer(minilm_path, device="cpu"), texts, k=3
    )
    assert 0.3 < result.cosine < 0.95 and 0.3 < result.overlap < 1 and 0.3 < result.rank_correlation < 0.99
    assert f"cosine {result.cosine:.4f}" in str(result) and "16 texts" in str(result)


def test_refusals():
    with pytest.raises(TriternError, match=r"at least k \+ 2 = 12 strings; received 4"):
        tritern.evaluate(Vectors(np.eye(4)), np.eye(4), list("abcd"))
    with pytest.raises(TriternError, match="one vector per text, 4; received 3"):
        tritern.evaluate(Vectors(np.eye(4)), np.eye(3), list("abcd"), k=1)
