"""Bars where somebody looks, whole lines elsewhere, and nothing on standard output."""

import io
import re
import sys

import numpy as np
import pytest

import tritern
from tritern import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def every_step(monkeypatch):
    """A line for every step."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(sys.modules["tqdm.std"], "time", lambda: now[0])
    return now


def test_lines_about_every_15_seconds_with_share_and_time_left(clock, capsys):
    for _ in progress.bar(range(40), "Calibrating", unit="step", delay=2, leave=False):
        clock[0] += 4
    assert capsys.readouterr().err.splitlines() == [
        "Calibrating: 4 of 40 steps (10%), 00:16 passed, about 02:24 left",
        *[
            f"Calibrating: {n} of 40 steps ({n / 40:.0%}), {m:02}:{s:02} passed, about {a:02}:{b:02} left"
            for n in range(8, 41, 4)
            for (m, s), (a, b) in [(divmod(4 * n, 60), divmod(4 * (40 - n), 60))]
        ],
        "Calibrating: 40 of 40 steps (100%), 02:40 passed",
    ]


def test_short_work_prints_nothing(clock, capsys):
    for _ in progress.bar(range(3), "Calibrating", unit="step"):
        clock[0] += 4
    assert capsys.readouterr().err == ""


def test_work_that_goes_on_and_work_without_an_end(clock, capsys):
    with progress.bar(desc="Embedding", total=100, initial=60, unit=" texts") as bar:
        clock[0] += 20
        bar.update(10)
    with progress.bar(desc="Reading", unit="text") as bar:
        clock[0] += 20
        bar.update(5000)
    assert capsys.readouterr().err.splitlines() == [
        "Embedding: 70 of 100 texts (70%), 00:20 passed, about 01:00 left",
        "Embedding: 70 of 100 texts (70%), 00:20 passed",
        "Reading: 5,000 texts, 00:20 passed",
        "Reading: 5,000 texts, 00:20 passed",
    ]


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in progress.bar(range(3), "Calibrating", unit="step"):
        pass
    assert "\r" in sys.stderr.getvalue() and "100%|" in sys.stderr.getvalue()


@pytest.mark.parametrize("place", [None, io.StringIO()])
def test_nothing_where_it_is_disabled_or_has_no_place(monkeypatch, place):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", place)
    assert list(progress.bar(range(3), disable=place is not None)) == [0, 1, 2]
    assert place is None or place.getvalue() == ""


def test_patch_and_calibration_speak(every_step, tiny, sentences, capsys):
    capsys.readouterr()
    tritern.patch(tiny, calibration_texts=sentences[:20])
    out, log = capsys.readouterr()
    assert "Calibrating: 1 of " in log and "Ternarizing: 12 of 12 layers (100%)" in log
    assert "\r" not in log and log.endswith("\n") and out == ""


def test_encode_counts_its_texts_and_its_vectors_stay(every_step, tiny, sentences, capsys):
    model = tritern.patch(tiny)
    expected = model.encode(sentences, show_progress_bar=False)
    capsys.readouterr()
    assert np.array_equal(model.encode(sentences, show_progress_bar=True), expected)
    done = re.findall(r"^Embedding: (\d+) of 400 texts", capsys.readouterr().err, re.MULTILINE)
    assert len(done) > 3 and done == sorted(done, key=int) and done[-1] == "400"
    model.encode(sentences)
    assert capsys.readouterr().err == ""
