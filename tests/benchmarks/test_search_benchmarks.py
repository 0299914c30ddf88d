"""The search benchmarks: measures by hand, then whole runs with a tiny model."""

import argparse
import json
import os
import sys
from itertools import islice
from math import log2
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from quality import eval_sets
from search import ann, embed_search, inputs, report_tables, speed
from search.inputs import SearchSet

from .test_quality import TEXTS, WORDS, retrieval

pytest.importorskip("faiss", reason="search needs faiss")

DATA = os.environ.get("TRITERN_DATA")


@pytest.fixture
def one():
    """Two queries, three documents; the first query has grades 3 and 1."""
    grades = np.array([[0, 3, 1], [0, 0, 2]], np.float32)
    return SearchSet("hand", ["q", "r"], ["a", "b", "c"], grades, np.array([3 + 1 / log2(3), 2]))


def test_measures_by_hand(one):
    found = np.array([[0, 1, -1], [2, 1, 0]])
    first = (3 / log2(3)) / (3 + 1 / log2(3))
    assert inputs.ndcg(found, one) == pytest.approx((first + 1) / 2)
    assert inputs.precision(found, one) == pytest.approx((1 / 3 + 1 / 3) / 2)
    assert inputs.best_precision(one) == pytest.approx((0.2 + 0.1) / 2)
    assert np.isnan(inputs.ndcg(found, SearchSet("none", ["q"], ["a"])))
    assert inputs.overlap(found, np.array([[1, 2, 0], [2, 1, 0]]), 2) == pytest.approx((0.5 + 1) / 2)
    assert inputs.overlap(found, np.array([[1, 0, -1], [-1, -1, -1]]), 3) == pytest.approx(0.5)


def test_losses_by_model_and_index_add_up(one):
    teacher, exact, near = (np.array([row] * 2) for row in ([1, 2, 0], [2, 1, 0], [0, 1, 2]))
    found = embed_search.measures(near, near, exact, teacher, one)
    lost = 100 * inputs.ndcg(teacher, one) - found["ndcg10"]
    assert found["loss_by_model"] + found["loss_by_index"] == pytest.approx(lost)
    by_model = inputs.ndcg(teacher, one) - inputs.ndcg(exact, one)
    assert found["loss_by_model"] == pytest.approx(100 * by_model)


def test_exact_search_has_the_ndcg_of_the_quality_benchmark(tmp_path):
    generator = np.random.default_rng(0)
    documents = {f"d{i}": f"document {i}" for i in range(40)}
    queries = {f"q{i}": f"query {i}" for i in range(6)}
    grades = [(q, d, int(g)) for q in queries for d in documents if (g := generator.integers(-20, 4)) > 0]
    retrieval(tmp_path / "retrieval/scifact", queries, documents, grades)
    vectors = {t: generator.standard_normal(8) for t in [*queries.values(), *documents.values()]}
    vectors = {t: (v / np.linalg.norm(v)).astype(np.float32) for t, v in vectors.items()}

    class Vectors:
        def encode(self, texts, kind="", **_):
            return np.stack([vectors[t] for t in texts])

    loaded = inputs.load_set(tmp_path, "scifact")
    scores = Vectors().encode(loaded.queries) @ Vectors().encode(loaded.documents).T
    (wanted,), _ = eval_sets.load(tmp_path, ["scifact"])
    assert inputs.ndcg(np.argsort(-scores), loaded) == pytest.approx(wanted.score(Vectors()))


def test_documents_without_text_are_left_out_and_still_wanted(tmp_path):
    retrieval(
        tmp_path / "retrieval/scifact", {"q": "ask"}, {"d": "", "e": "other"}, [("q", "d", 1), ("q", "e", 1)]
    )
    loaded = inputs.load_set(tmp_path, "scifact")
    assert loaded.documents == ["other"]
    assert inputs.ndcg(np.array([[0]]), loaded) == pytest.approx(1 / (1 + 1 / log2(3)))


def test_a_shortened_set_keeps_judged_documents(one):
    short = inputs.shortened(one, 2)
    assert short.documents == ["b", "c"] and short.queries == ["q", "r"]
    assert short.grades is not None and short.grades.tolist() == [[3, 1], [0, 2]]
    assert inputs.shortened(one, 3) is one


def test_varied_texts_are_different_and_come_one_by_one():
    texts = list(inputs.varied(["a", "b", "c"], 100))
    assert texts[:3] == ["a", "b", "c"] and len(set(texts)) == 100
    assert all(any(t in text for t in "abc") for text in texts)
    assert len(list(islice(inputs.varied(["a"], 10**15), 5))) == 5


def test_arms(tmp_path):
    options = argparse.Namespace(arms=None, device="cpu", ternary=[("x", "folder")], model="m")
    assert [a.label for a in inputs.wanted_arms(options, tmp_path)] == ["fp32", "x 16-bit", "x int8"]
    options = argparse.Namespace(
        arms=["fp16", "ternary int8"], device="cpu", ternary=[("x", "f"), ("y", "g")], model="m"
    )
    arms = inputs.wanted_arms(options, tmp_path)
    assert [(a.label, a.folder) for a in arms] == [
        ("fp32", ""),
        ("fp16", ""),
        ("x int8", "f"),
        ("y int8", "g"),
    ]
    options.ternary *= 2
    with pytest.raises(ValueError, match="same NAME"):
        inputs.wanted_arms(options, tmp_path)


def test_agreement():
    vectors = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    same = speed.agreement(vectors, 2 * vectors)  # lengths are no difference
    assert same["same_top10"] == 1 and same["smallest_cosine"] == pytest.approx(1)
    other = vectors.copy()
    other[3] = -other[3]
    found = speed.agreement(vectors, other)
    assert found["smallest_cosine"] == pytest.approx(-1) and found["same_top10"] < 1
    assert found["largest_difference"] == pytest.approx(2 * np.abs(vectors[3]).max())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search-data")
    documents = {f"d{i}": t for i, t in enumerate(TEXTS)}
    queries = {f"q{i}": f"{a} {b}" for i, (a, b) in enumerate(zip(WORDS, WORDS[3:]))}
    grades = [(q, f"d{(5 * n + i) % len(TEXTS)}", i) for n, q in enumerate(queries) for i in (1, 2, 3)]
    retrieval(folder / "retrieval/cranfield", queries, documents, grades)
    return folder


def start(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_embed_search_runs_whole(data, tiny_path, tmp_path, monkeypatch, capsys):
    files = ["--json", tmp_path / "a.json", "--plot", tmp_path / "a.png"]
    small = [
        "--repeat",
        1,
        "--texts",
        20,
        "--batches",
        1,
        128,
        "--keep",
        tmp_path / "kept",
        "--device",
        "cpu",
    ]
    start(embed_search, monkeypatch, "--data", data, "--model", tiny_path, *files, *small)
    found = json.loads((tmp_path / "a.json").read_text())
    arms = ["fp32", "patched 16-bit", "patched int8"]
    assert [r["arm"] for r in found["throughput"]] == arms
    assert all(r["same_top10"] > 0.99 and r["smallest_cosine"] > 0.999 for r in found["throughput"])
    for row in found["throughput"]:
        assert row["baseline"] == "fp32 by hand" and row["rounds"] == 1 and row["by_hand_batch_size"] == 32
        expected = row["texts_per_second"]["median"] / found["throughput"][0]["by_hand"]["median"]
        assert row["over_baseline"]["median"] == pytest.approx(expected)
    assert [(r["batch"], r["arm"]) for r in found["latency"]] == [(b, a) for b in (1, 128) for a in arms]
    assert {r["kind"] for r in found["quality"]} == set(embed_search.KINDS)
    for row in found["quality"]:
        assert row["faiss"].startswith("faiss") and row["torch"] and row["date"] and row["device"]
        assert row["recall10"] == 100 if row["kind"] == "flat" else 0 < row["recall10"] <= 100
        assert row["loss_by_model"] == 0 if row["arm"] == "fp32" else row["fidelity10"] < 100
    (exact,) = (r for r in found["quality"] if r["arm"] == "fp32" and r["kind"] == "flat")
    assert exact["fidelity10"] == 100 and exact["loss_by_index"] == pytest.approx(0, abs=1e-9)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("| patched int8 |") == 1 + 2 + len(embed_search.KINDS)
    vectors = next((tmp_path / "kept").glob("*fp32/vectors*"))
    assert vectors.stat().st_size == len(TEXTS) * 32 * 4


def test_a_run_of_a_minute_says_its_pace(data, tiny_path, tmp_path, monkeypatch):
    arguments = ["--data", data, "--model", tiny_path, "--device", "cpu", "--repeat", 1, "--minutes", 1]
    arguments += ["--arms", "ternary int8", "--kinds", "flat", "--batches", 2, "--json", tmp_path / "a.json"]
    start(embed_search, monkeypatch, *arguments)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["environment"]["left_out"] == [] and found["environment"]["minutes"] == 1
    assert all(one["tritern"] > 0 and one["batch"] == 32 for one in found["environment"]["pace"].values())
    assert len(found["latency"]) == 2 and len(found["quality"]) == 2


def test_search_parameters_are_swept(tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr("tritern.search.kinds.MIN_ROWS", 500)
    documents = {f"{a}{b}{c}": f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS}
    retrieval(
        tmp_path / "retrieval/medquad",
        {"q": "ba de", "r": "go fi"},
        documents,
        [("q", "bafifi", 1), ("r", "gogogo", 1)],
    )
    arguments = [
        "--model",
        tiny_path,
        "--data",
        tmp_path,
        "--repeat",
        1,
        "--parts",
        "quality",
        "--device",
        "cpu",
    ]
    arguments += ["--arms", "fp32", "--kinds", "ivf-flat", "hnsw", "--json", tmp_path / "a.json"]
    start(embed_search, monkeypatch, *arguments)
    rows = json.loads((tmp_path / "a.json").read_text())["quality"]
    probes = {r["parameters"]: r["recall10"] for r in rows if r["kind"] == "ivf-flat"}
    assert list(probes) == ["default", *(f"nprobe={2**i}" for i in range(5))]  # of 16 lists
    assert probes["nprobe=1"] < probes["nprobe=16"] == 100
    assert "efSearch=512" in [r["parameters"] for r in rows if r["kind"] == "hnsw"]


def test_scale_streams_and_says_what_it_is(tiny_path, data, tmp_path, monkeypatch, capsys):
    arguments = ["--model", tiny_path, "--data", data, "--scale", 3000, "--arms", "ternary int8", "--quick"]
    start(
        embed_search,
        monkeypatch,
        *arguments,
        "--kinds",
        "flat",
        "--sets",
        "cranfield",
        "--json",
        tmp_path / "a.json",
    )
    found = json.loads((tmp_path / "a.json").read_text())
    assert [r["arm"] for r in found["scale"]] == ["fp32", "patched int8"] and "quality" not in found
    assert all(r["rows"] == 3000 and r["bytes"]["vectors"] == 3000 * 32 * 4 for r in found["scale"])
    assert all(r["resident"]["peak_mb"] > 0 and "27 real texts" in r["texts"] for r in found["scale"])
    assert "varied by templates: speed and memory alone" in capsys.readouterr().out


def test_the_experiment_runs_whole(data, tiny_path, tmp_path, monkeypatch, capsys):
    arguments = [
        "--data",
        data,
        "--model",
        tiny_path,
        "--repeat",
        2,
        "--arms",
        "ternary int8",
        "--device",
        "cpu",
    ]
    start(ann, monkeypatch, *arguments, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(r["arm"], r["index"]) for r in rows] == [
        (a, i) for a in ("fp32", "patched int8") for i in ann.INDEXES
    ]
    flat = rows[0]
    assert flat["same10"] == 100 and 0 < flat["precision10"] <= flat["precision10_best"] == 30
    assert rows[1]["same10"] < 100  # one list of a document or so
    assert flat["ms_per_query"]["median"] >= max(
        flat[f"ms_{s}"]["median"] for s in ("embedding", "searching")
    )
    assert (tmp_path / "a.png").exists() and "| patched int8 | HNSW |" in capsys.readouterr().out


def test_tables_have_a_cell_for_every_title():
    assert inputs.markdown(["a", "b"], [[1, 2.5], [float("nan"), None]]).splitlines()[2:] == [
        "| 1 | 2.50 |",
        "| - | - |",
    ]
    for table in (report_tables.quality_table, report_tables.throughput_table, report_tables.latency_table):
        assert table([]).count("\n") == 1


@pytest.mark.parametrize("module", [embed_search, ann])
def test_bad_input_is_one_line(module, tiny_path, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="holds none of the sets scifact") as error:
        start(module, monkeypatch, "--data", tmp_path, "--sets", "scifact", "--model", tiny_path)
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(SystemExit, match="pip install faiss-cpu"):
        start(module, monkeypatch, "--model", tiny_path)


def test_all_kinds_are_measured():
    from tritern.search import KINDS

    assert embed_search.KINDS == tuple(KINDS)


def test_bad_numbers_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        start(embed_search, monkeypatch, "--batches", "0")
    assert "whole number of at least 1; received '0'" in capsys.readouterr().err


@pytest.mark.skipif(not DATA, reason="TRITERN_DATA names the folder of labelled sets")
def test_sets_of_the_folder_are_read_whole():
    loaded = inputs.load_set(Path(DATA or ""), "cranfield")
    assert len(loaded.queries) == 225 and len(loaded.documents) == 1398  # two have no text
    assert (
        loaded.grades is not None and loaded.grades.shape == (225, 1398) and (loaded.grades > 0).sum() == 1611
    )
