"""What the search benchmarks have time for, by a clock that stands still."""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import pytest

pytest.importorskip("faiss", reason="search needs faiss")

from search import speed, time_limit
from search.inputs import SearchSet


def test_rows_of_the_throughput_come_after_every_round(tiny, sentences):
    options = argparse.Namespace(repeat=2)
    pace = {"fp16": speed.Pace(0, 0, 8), "ours": speed.Pace(0, 0, 32)}
    given = {"fp16": tiny, "ours": tiny}, sentences[:12], options, pace
    rounds = list(speed.throughput(*given, time_limit.Limit(math.inf)))
    assert [[(r["arm"], r["rounds"]) for r in rows] for rows in rounds] == [
        [("fp16", n), ("ours", n)] for n in (1, 2)
    ]
    assert all(r["baseline"] == "fp16 by hand" and r["texts"] == 12 for r in rounds[1])
    assert rounds[1][0]["by_hand_batch_size"] == 8
    assert len(list(speed.throughput(*given, time_limit.Limit(0)))) == 1


def test_a_pace_is_of_the_best_batch_size(tiny, sentences, monkeypatch):
    counts = []

    def by_hand(model, texts, batch):
        return None, {"total": {1: 3.0, 4: 1.0, 9: 2.0}[batch]}

    def with_tritern(model, texts):
        counts.append(len(texts))
        return None, {"total": 0.01 * len(texts)}

    monkeypatch.setattr(speed, "by_hand", by_hand)
    monkeypatch.setattr(speed, "with_tritern", with_tritern)
    (pace,) = speed.paces({"a": tiny}, ["12345"] * 999, (1, 4, 9)).values()
    assert pace.batch == 4 and pace.by_hand == 1 / (4 * 5) and pace.tritern == pytest.approx(0.01 / 5)
    assert counts == [4, 4, 16, 16, 64, 64]  # more would take longer than half a second
    counts.clear()
    speed.paces({"a": tiny}, ["12345"] * 6, (4,))
    assert counts == [4, 4, 6, 6]
    without = speed.pace_of({"a": tiny}, sentences, "cpu", time_limit.Limit(math.inf))
    assert without == {"a": speed.Pace(0, 0, 32)}


def test_there_is_time_for_so_many_texts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time_limit.time, "perf_counter", lambda: now[0])
    limit = time_limit.Limit(1)
    assert limit.left() == 60 and limit.left(0.5) == 30
    texts = ["x" * 10] * 9
    assert limit.affords(texts, 1, 0.5) == 3 and limit.affords(texts, 0.01, 1) == 9
    now[0] += 61
    assert limit.left() == 0 and limit.affords(texts, 1, 1) == 0
    assert time_limit.Limit(math.inf).affords(texts, 1, 1) == 9


def test_sets_are_shortened_to_the_time_and_named_when_left_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time_limit.time, "perf_counter", lambda: now[0])
    small, large = (SearchSet(name, ["q"], ["x"] * n) for name, n in (("small", 50), ("large", 3000)))

    def given(minutes, pace, taken):
        now[0], left_out, found = 0.0, [], []
        for one in time_limit.in_time([large, small], time_limit.Limit(minutes), pace, left_out):
            found.append((one.name, len(one.documents)))
            now[0] += taken
        return found, left_out

    assert given(math.inf, 1, 9) == ([("large", 3000), ("small", 50)], [])
    assert given(1, 0.001, 1) == ([("small", 50), ("large", 2458)], [])  # by what small took, and a fifth
    assert given(1, 0.001, 30) == ([("small", 50)], ["large"])
    assert given(1, 2, 1) == ([], ["small", "large"])
