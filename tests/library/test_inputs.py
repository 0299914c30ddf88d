"""What users pass in is checked by the same rules everywhere."""

import numpy as np
import pytest

from tritern import TriternError
from tritern.inputs import (
    check_file,
    check_folder,
    check_texts,
    check_vectors,
    many,
    near,
    true_or_false,
    whole_number,
)


class Table(list):
    columns = ("text",)


@pytest.mark.parametrize(
    "values", ["pq", b"pq", bytearray(b"pq"), {"p": 1}, 3, None, np.array("pq"), Table(["text"])]
)
def test_iterables_are_of_single_things(values):
    with pytest.raises(TriternError, match="ids must be a list or another iterable; received"):
        many(values, "ids")


def test_iterables_pass():
    for values in (["a"], ("a",), {"a"}, np.array(["a"]), {"a": 1}.keys(), (x for x in "a")):
        assert list(many(values, "ids")) == ["a"]


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "number 6 is NoneType"),
        (3.5, "number 6 is float"),
        (b"x", "number 6 is bytes .decode it"),
        (" \n", "number 6 is empty"),
        ("a\ud800", "number 6 holds an invalid character"),
    ],
)
def test_texts_that_have_no_vector_are_named(text, reason):
    with pytest.raises(TriternError, match=f"queries.*{reason}"):
        check_texts(["fine", text], 5, name="queries")


def test_empty_texts_pass_where_they_are_accepted():
    check_texts(["", " "], empty=True)


def test_whole_numbers_become_ints():
    for value in (2, np.int64(2), np.uint8(2)):
        number = whole_number(value, "k", 1)
        assert number == 2 and type(number) is int


@pytest.mark.parametrize("value", [2.0, "2", True, None, np.float32(2), np.bool_(True)])
def test_other_types_are_no_whole_numbers(value):
    with pytest.raises(TriternError, match="k must be a whole number, at least 1; received"):
        whole_number(value, "k", 1)


def test_the_range_is_kept():
    with pytest.raises(TriternError, match="k must be at least 1; received 0"):
        whole_number(0, "k", 1)
    with pytest.raises(TriternError, match="k must be from 1 to 3; received 4"):
        whole_number(np.int64(4), "k", 1, 3)


@pytest.mark.parametrize("value", ["False", "", 0, 1, None, 1.0])
def test_other_types_are_not_true_or_false(value):
    with pytest.raises(TriternError, match="exact must be True or False; received"):
        true_or_false(value, "exact")


def test_true_and_false_pass():
    assert [true_or_false(v, "exact") for v in (True, False, np.True_, np.False_)] == [True, False] * 2


@pytest.mark.parametrize(
    "vectors, message",
    [
        ([[1.0]], "must be a NumPy array of numbers; received list"),
        (np.array([["a"], ["b"]]), "must be a NumPy array of numbers; received an array of <U1"),
        (np.ones(2), r"must have shape \[2, width\], one row per text; received \[2\]"),
        (np.ones((3, 4)), r"must have shape \[2, width\], one row per text; received \[3, 4\]"),
        (np.ones((2, 0)), r"must have shape .*received \[2, 0\]"),
        (np.array([[1, 2], [1, np.nan]]), "the vector number 1 holds NaN or infinity"),
        (np.array([[1, 1e300], [1, 1]]), "the vector number 0 holds NaN or infinity .in float32"),
        (np.array([[1, 2], [0, 0]]), "the vector number 1 is all zeros"),
    ],
)
def test_vectors_that_say_nothing_are_named(vectors, message):
    with pytest.raises(TriternError, match=f"teacher:? {message}"):
        check_vectors(vectors, "teacher", 2)


def test_vectors_are_numbered_from_the_first():
    with pytest.raises(TriternError, match="the vector number 7 is all zeros"):
        check_vectors(np.array([[1, 2], [0, 0]]), "vectors", 2, 6)
    check_vectors(np.array([[1, 2], [0, 0]]), "vectors", 2, zeros=True)
    with pytest.raises(TriternError, match="the vector number 1 holds NaN"):
        check_vectors(np.array([[0, 0], [0, np.nan]]), "vectors", 2, zeros=True)


def test_vectors_pass():
    for dtype in (np.float16, np.float32, np.float64, np.int8):
        check_vectors(np.ones((2, 3), dtype), "teacher", 2)


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    check_folder(tmp_path / "new" / "folder", "output_dir")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TriternError, match="output_dir must be a folder; .*file is a file"):
            check_folder(path, "output_dir")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for path in (tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(TriternError, match="output_dir must be a folder; .*link is a link to nothing"):
            check_folder(path, "output_dir")
    for path, why in (("a\0b", "null"), ("x" * 5000, "too long")):
        with pytest.raises(TriternError, match=f"output_dir must be the name of a folder; received .*{why}"):
            check_folder(path, "output_dir")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(TriternError, match="output_dir: no permission to write .*new in "):
        check_folder(tmp_path / "new", "output_dir")


def test_files_that_cannot_be_written(tmp_path):
    assert check_file(str(tmp_path / "new.gguf"), "path") == tmp_path / "new.gguf"
    for path, match in [
        (tmp_path, "path must be a file; .* is a folder: name a file in it"),
        (tmp_path / "new" / "file", "path: the folder .*new does not exist: make it, or name another"),
        ("/proc/file", "the folder of path: cannot write in /proc"),
        (None, "path must be the name of a file; received None"),
    ]:
        with pytest.raises(TriternError, match=match):
            check_file(path, "path")
    assert not list(tmp_path.iterdir())


def test_names_that_were_meant():
    known = ["max_steps", "learning_rate", "train_batch_size", "seed"]
    assert near("steps", known) == ["max_steps"]
    assert near("learnin_rate", known) == ["learning_rate"]
    assert near("batch_size", known)[0] == "train_batch_size"
    assert near("colour", known) == []
