"""What users pass in is checked by the same rules everywhere."""

import numpy as np
import pytest

from tritern import TriternError
from tritern.inputs import check_texts, many, whole_number


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
        ("a\ud800", "number 6 holds what is no character"),
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
