from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

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
    result = tritern.evaluate(
        Vectors(circle([0, 10, 30, 90])),
        np.float32([[2, 1, 1], [1, 2, 1], [1, 1, 3], [1, 1, 1]]),
        list("abcd"),
        k=1,
    )
    assert np.isnan(result.cosine) and 0 <= result.overlap <= 1


def test_patched_minilm_is_close_but_not_equal(minilm, minilm_path, texts):
    texts = texts + [t + " And then some more happened." for t in texts]
    result = tritern.evaluate(
        tritern.patch(minilm), SentenceTransformer(minilm_path, device="cpu"), texts, k=3
    )
    assert 0.3 < result.cosine < 0.95 and 0.3 < result.overlap < 1 and 0.3 < result.rank_correlation < 0.99
    assert f"cosine {result.cosine:.4f}" in str(result) and "16 texts" in str(result)


@pytest.mark.parametrize(
    "form", [lambda x: (t for t in x), tuple, np.array, lambda x: dict.fromkeys(x).keys(), pandas.Series]
)
def test_texts_of_any_iterable(form):
    vectors = circle([0, 10, 30, 90])
    result = tritern.evaluate(Vectors(vectors), vectors, form(list("abcd")), k=1)
    assert result.overlap == 1 and result.texts == 4


@pytest.mark.parametrize(
    "texts, message",
    [
        ("file.txt", "received one, 'file.txt': read the texts of a file with tritern.distillation.read_tex"),
        (Path("file.txt"), "received one, 'file.txt': read the texts of a file with"),
        (b"abcd", "received one bytes"),
        ({"a": 1, "b": 2}, "received a dict"),
        (pandas.DataFrame({"text": list("abcd")}), "received a DataFrame: pass one of its columns"),
        (3, "received int"),
        (["a", None, "c", "d"], "number 1 is NoneType"),
        (["a", "b", float("nan"), "d"], "number 2 is float"),
        (["a", "b", b"c", "d"], "number 2 is bytes .decode it"),
        (["a", "b", "c\ud800", "d"], "number 2 holds an invalid character"),
        (["a", "b", "c", " "], "number 3 is empty"),
    ],
)
def test_texts_that_are_none(texts, message):
    vectors = circle([0, 10, 30, 90])
    with pytest.raises(TriternError, match=f"texts.*{message}"):
        tritern.evaluate(Vectors(vectors), vectors, texts, k=1)


def test_refusals():
    with pytest.raises(TriternError, match=r"at least k \+ 2 = 12 strings; received 4"):
        tritern.evaluate(Vectors(np.eye(4)), np.eye(4), list("abcd"))
    good = circle([0, 10, 30, 90])
    with pytest.raises(TriternError, match=r"shape \[4, width\], one row per text; received \[3, 3\]"):
        tritern.evaluate(Vectors(good), np.eye(3), list("abcd"), k=1)
    for k in (0, 1.0, "1", True):
        with pytest.raises(TriternError, match="k must be"):
            tritern.evaluate(Vectors(good), good, list("abcd"), k=k)
    with pytest.raises(TriternError, match="batch_size must be at least 1; received 0"):
        tritern.evaluate(Vectors(good), good, list("abcd"), k=1, batch_size=0)
    with pytest.raises(TriternError, match="prompt must be a string or None; received 3"):
        tritern.evaluate(Vectors(good), good, list("abcd"), k=1, prompt=3)
    with pytest.raises(TriternError, match="show_progress_bar must be True or False; received 'no'"):
        tritern.evaluate(Vectors(good), good, list("abcd"), k=1, show_progress_bar="no")
    with pytest.raises(TriternError, match="teacher must be .*a NumPy array of its vectors; received list"):
        tritern.evaluate(Vectors(good), good.tolist(), list("abcd"), k=1)
    with pytest.raises(TriternError, match="vectors of the model must have shape .4, width.*received .3, 2"):
        tritern.evaluate(Vectors(good[:3]), good, list("abcd"), k=1)


@pytest.mark.parametrize(
    "row, message",
    [
        ([0, 0], "the vector number 2 is all zeros"),
        ([np.nan, 1], "the vector number 2 holds NaN or infinity"),
        ([np.inf, 1], "the vector number 2 holds NaN or infinity"),
    ],
)
def test_vectors_without_direction(row, message):
    good, bad = circle([0, 10, 30, 90]), circle([0, 10, 30, 90])
    bad[2] = row
    with pytest.raises(TriternError, match=f"teacher: {message}"):
        tritern.evaluate(Vectors(good), bad, list("abcd"), k=1)
    with pytest.raises(TriternError, match=f"vectors of the model: {message}"):
        tritern.evaluate(Vectors(bad), good, list("abcd"), k=1)
    with pytest.raises(TriternError, match=f"vectors of the teacher: {message}"):
        tritern.evaluate(Vectors(good), Vectors(bad), list("abcd"), k=1)


def test_neighbours_without_order():
    good = circle([0, 10, 30, 90])
    for alike in (np.ones((4, 2)), np.eye(4), np.full((4, 300), 0.1) + np.float32(1e-9)):
        with pytest.raises(TriternError, match="teacher: text number 0 is equally similar to all other text"):
            tritern.evaluate(Vectors(good), alike, list("abcd"), k=1)
        with pytest.raises(TriternError, match="model: text number 0 is equally similar to all other texts"):
            tritern.evaluate(Vectors(alike), good, list("abcd"), k=1)


def test_tiny_and_huge_vectors_count_by_their_direction():
    """A length that float32 cannot hold neither hides a vector nor makes it infinite."""
    vectors = circle([0, 10, 30, 90])
    for scale in (1e-30, 1e30):
        result = tritern.evaluate(Vectors(vectors), vectors * scale, list("abcd"), k=1)
        assert result.cosine == pytest.approx(1, abs=1e-6)


def test_models_by_name_and_nothing_else(tiny, tiny_path, sentences, monkeypatch):
    monkeypatch.chdir(Path(tiny_path).parent)
    texts = sentences[:40]
    assert tritern.evaluate(tiny, tiny_path, texts).cosine == pytest.approx(1)
    assert tritern.evaluate(Path(tiny_path), "model", texts).overlap == 1
    for name, received in (
        (3, "int"), (None, "NoneType"), ([[1.0]] * 40, "list"), (nn.Linear(2, 2), "Linear"),
        (torch.ones(40, 2), "Tensor"), (SentenceTransformer, "the class SentenceTransformer"),
    ):  # fmt: skip
        with pytest.raises(
            TriternError, match=f"teacher must be a SentenceTransformer, .*received {received}"
        ):
            tritern.evaluate(tiny, name, texts)
    with pytest.raises(TriternError, match="model must be a SentenceTransformer, .*received ndarray"):
        tritern.evaluate(np.ones((40, 2)), tiny, texts)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        TriternError, match="teacher: cannot load './missing'; it must be the folder or hub n"
    ):
        tritern.evaluate(tiny, "./missing", texts)


def test_models_stay_in_their_mode(tiny, tiny_path, sentences):
    teacher = SentenceTransformer(tiny_path, device="cpu")
    tiny.train()
    teacher.eval()[0].train()
    tritern.evaluate(tiny, teacher, sentences[:40])
    assert all(m.training for m in tiny.modules())
    assert not teacher.training and all(m.training for m in teacher[0].modules())
