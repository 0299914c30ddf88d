"""A sample of texts is one of all of them, whatever their order."""

from tritern.texts.sample import drawn

SORTED = [f"news {i}" for i in range(500)] + [f"law {i}" for i in range(500)]


def chosen(texts, count, seed=0):
    return [texts[i] for i in drawn(texts, count, seed)]


def test_both_sources_of_a_sorted_file_are_drawn():
    numbers = drawn(SORTED, 100)
    assert numbers == sorted(numbers) and len(set(numbers)) == 100
    assert 35 < sum(number < 500 for number in numbers) < 65


def test_the_seed_chooses():
    assert drawn(SORTED, 50) == drawn(SORTED, 50)
    assert len({*drawn(SORTED, 50), *drawn(SORTED, 50, seed=1)}) > 80


def test_order_and_further_texts_do_not_change_what_is_drawn():
    assert set(chosen(SORTED[::-1], 50)) == set(chosen(SORTED, 50))
    some = SORTED[::3]
    assert {text for text in chosen(SORTED, 50) if text in some} <= set(chosen(some, 50))


def test_equal_texts_are_drawn_once_and_no_more_than_there_are():
    assert drawn(["a", "b", "a", "a"], 2) == [0, 1]
    assert drawn(["a", "a"], 5) == [0] and drawn([], 5) == [] and drawn(["a"], 0) == []
