"""The retention table: measures by hand, then whole runs with a tiny model on a tiny folder."""

import gzip
import json
import os
import re
import shutil
import sys
from math import log2
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from torch import nn

import tritern
from tritern.engine.padded import Padded
from tritern.engine.runner import Packed

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from quality import eval_sets, retention, rounding, scores
from quality.encoder import Encoder

WORDS = "ba de fi go ki lu mon nin per".split()  # which the tiny model knows
TEXTS = [f"{a} {b} {c}" for a in WORDS[:3] for b in WORDS[3:6] for c in WORDS[6:9]]
LABELS = [text.split()[1] for text in TEXTS]


class Vectors:
    """Stands for an Encoder: text t has the vector at t degrees."""

    model_card_data = SimpleNamespace(set_evaluation_metrics=lambda *_: None)

    def encode(self, texts, kind="", **_):
        angles = np.deg2rad([float(t) for t in texts])
        return np.stack([np.cos(angles), np.sin(angles)], 1)


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def labelled(texts, labels):
    return [{"text": str(t), "label": label} for t, label in zip(texts, labels, strict=True)]


def retrieval(folder, queries, documents, grades):
    write(folder / "queries.jsonl.gz", [{"_id": i, "text": str(t)} for i, t in queries.items()])
    write(folder / "corpus.jsonl.gz", [{"_id": i, "title": "", "text": str(t)} for i, t in documents.items()])
    rows = [{"query-id": q, "corpus-id": d, "score": g} for q, d, g in grades]
    write(folder / "qrels_test.jsonl.gz", rows)


def score(folder, name):
    (found,), absent = eval_sets.load(folder, [name])
    assert not absent
    return found.score(Vectors())


def test_ndcg_has_graded_linear_gains_and_stops_at_10(tmp_path):
    documents = {f"d{i}": 5 * i for i in range(1, 13)}  # by angle, so d1 is nearest to 0 degrees
    grades = [("q1", "d1", 1), ("q1", "d3", 3), ("q2", "d11", 4)]
    retrieval(tmp_path / "retrieval/cranfield", {"q1": 0, "q2": 0, "unjudged": 60}, documents, grades)
    by_hand = (1 / log2(2) + 3 / log2(4)) / (3 / log2(2) + 1 / log2(3))
    assert score(tmp_path, "cranfield") == pytest.approx((by_hand + 0) / 2)


def test_spearman_accuracy_and_v_measure_by_hand(tmp_path):
    gold = {1: 4, 2: 5, 3: 2, 4: 1}  # of four pairs, the two nearest are in the wrong order
    pairs = [{"sentence1": "0", "sentence2": str(10 * i), "score": g} for i, g in gold.items()]
    write(tmp_path / "sts/stsb/test.jsonl.gz", pairs)
    assert score(tmp_path, "STS-B") == pytest.approx(0.8)
    folder = tmp_path / "classification"
    write(folder / "trec/train.jsonl.gz", labelled(range(0, 180, 9), ["east"] * 10 + ["west"] * 10))
    write(folder / "trec/test.jsonl.gz", labelled([1, 20, 170, 5], ["east", "east", "west", "west"]))
    assert score(tmp_path, "trec") == 0.75
    write(folder / "stackoverflow20/test.jsonl.gz", labelled([1, 2, 3, 91, 92, 93], "aaabbb"))
    assert score(tmp_path, "stackoverflow20") == pytest.approx(1.0)


def test_development_splits_are_others(tmp_path):
    pair = {"sentence1": "0", "sentence2": "10", "score": 1}
    for split, second in (("test", "test"), ("dev", "dev")):
        write(tmp_path / f"sts/stsb/{split}.jsonl.gz", [pair | {"sentence2": second}] * 2)
    folder = tmp_path / "retrieval/scifact"
    retrieval(folder, {"q": "tested", "r": "trained"}, {"d": "text"}, [("q", "d", 1)])
    write(folder / "qrels_train.jsonl.gz", [{"query-id": "r", "corpus-id": "d", "score": 1}])
    found, absent = eval_sets.load(tmp_path, ["STS-B", "STS12", "scifact", "perspectrum"], development=True)
    assert [one.texts for one in found] == [["0", "0", "dev", "dev"], ["trained", "text"]]
    assert absent == ["perspectrum (retrieval/perspectrum/corpus.jsonl.gz)"]


def test_title_and_text_are_one_document(tmp_path):
    retrieval(tmp_path / "retrieval/scifact", {"q": "a"}, {"d": "text", "e": "other"}, [("q", "d", 1)])
    rows = [{"_id": "d", "title": "Title", "text": "text"}, {"_id": "e", "title": "", "text": "other"}]
    write(tmp_path / "retrieval/scifact/corpus.jsonl.gz", rows)
    assert eval_sets.load(tmp_path, ["scifact"])[0][0].texts == ["a", "Title text", "other"]


def test_means_weigh_tasks_alike():
    figures = retention.means({"a": 10.0, "b": 30.0, "c": 50.0}, {"a": "x", "b": "x", "c": "y"})
    assert figures == {"x": 20.0, "y": 50.0, "overall": 35.0, "all sets": 30.0}
    kept = retention.retention({"a": 10.0, "b": 3.0}, {"a": 40.0, "b": 0.0})
    assert kept["a"] == 25.0 and np.isnan(kept["b"])


def test_intervals_hold_what_the_draws_say():
    """One student always does half as well as the teacher, the other differs by chance."""
    right = np.arange(400) % 2 == 0.0
    teacher = {"a": eval_sets.Items(400, lambda i: float(right[i].mean() + 0.5))}
    half = {"a": eval_sets.Items(400, lambda i: float(right[i].mean() / 2 + 0.25))}
    other = {"a": eval_sets.Items(400, lambda i: float(right[i].mean()))}
    tasks = {"a": "sts"}
    drawn = [retention.draws(items) for items in (teacher, half, other)]
    assert drawn[0]["a"].shape == (retention.DRAWS,) and drawn[0]["a"].std() == pytest.approx(0.025, rel=0.1)
    same = retention.intervals(drawn[1], drawn[0], tasks)  # the same items are drawn for both
    assert same.keys() == {"a", "sts", "overall", "all sets"}
    assert same["a"] == pytest.approx((50, 50)) and same["overall"] == same["a"]
    low, high = retention.intervals(drawn[2], drawn[0], tasks)["a"]
    share = lambda p: 100 * p / (p + 0.5)  # noqa: E731
    assert low == pytest.approx(share(0.5 - 1.96 * 0.025), abs=0.4)
    assert high == pytest.approx(share(0.5 + 1.96 * 0.025), abs=0.4)


def test_intervals_of_means_are_narrower_than_those_of_their_sets():
    generator = np.random.default_rng(0)
    sets = {name: generator.random(200) for name in "abcd"}
    student = {n: eval_sets.Items(200, lambda i, v=v: float(v[i].mean())) for n, v in sets.items()}
    teacher = {n: eval_sets.Items(200, lambda i: 1.0) for n in sets}
    found = retention.intervals(retention.draws(student), retention.draws(teacher), dict.fromkeys(sets, "x"))
    widths = {name: high - low for name, (low, high) in found.items()}
    assert widths["x"] == pytest.approx(np.mean([widths[n] for n in sets]) / 2, rel=0.1)


def test_rounded_models_have_the_bytes_and_values_of_their_format(tiny):
    gguf = pytest.importorskip("gguf")
    full = rounding.weight_bytes(tiny)
    assert full == 2 * sum(p.numel() for p in tiny.parameters()) + sum(b.nbytes for b in tiny.buffers())
    weight = tiny[0].auto_model.encoder.layer[0].output.dense.weight
    before = weight.detach().clone()
    kinds = nn.Linear, nn.Embedding
    count = sum(m.weight.numel() for m in tiny.modules() if isinstance(m, kinds))
    size = rounding.round_weights(tiny, "Q4_0")
    assert size == full - 2 * count + count * 4.5 / 8
    blocks = before.reshape(-1, 32)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    steps = weight.reshape(-1, 32) / (largest / -8)  # -8 stands for the largest
    assert (steps - steps.round()).abs().max() < 0.02 and len(steps.round().unique()) <= 16
    assert (weight - before).abs().max() <= largest.abs().max() / 8
    assert gguf.quants


@pytest.fixture(scope="module")
def ternary_path(tiny_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ternary")
    tritern.patch(SentenceTransformer(tiny_path, device="cpu")).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pairs = zip(TEXTS, TEXTS[5:] + TEXTS[:5], strict=True)
    rows = [
        {"sentence1": a, "sentence2": b, "score": len(set(a.split()) & set(b.split())) + len(a) / 99}
        for a, b in pairs
    ]
    write(folder / "sts/stsb/test.jsonl.gz", rows)
    documents = {f"d{i}": t for i, t in enumerate(TEXTS)}
    grades = [("q", f"d{i}", 1 + i % 4) for i in range(0, len(TEXTS), 3)]
    retrieval(folder / "retrieval/cranfield", {"q": "ba go"}, documents, grades)
    for split in ("train", "test"):
        write(folder / f"classification/trec/{split}.jsonl.gz", labelled(TEXTS, LABELS))
    write(folder / "classification/stackoverflow20/test.jsonl.gz", labelled(TEXTS, LABELS))
    return folder


@pytest.fixture
def run(data, tiny_path, tmp_path, monkeypatch):
    """``run(*arguments)`` gives the JSON of a whole run."""

    def call(*arguments, source=("--data", str(data))):
        file = tmp_path / "out.json"
        command = [*source, "--model", tiny_path, "--json", str(file), "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", ["scores.py", *map(str, command)])
        monkeypatch.setattr(retention, "DRAWS", 50)  # a thousand take most of the time
        scores.main()
        return json.loads(file.read_text())

    return call


def test_whole_table(run, ternary_path, tmp_path, capsys):
    figure = tmp_path / "figure.png"
    result = run("--rules", "mse", "absmean", "--ternary", f"saved={ternary_path}", "--figure", figure)
    rows = result["rows"]
    assert list(rows) == ["teacher", "patched, mse", "patched, absmean", "saved"]
    assert list(result["tasks"]) == ["STS-B", "cranfield", "trec", "stackoverflow20"]
    assert set(rows["teacher"]["retention"].values()) == {100.0}
    assert len(rows["teacher"]["retention"]) == 4 + 4 + 2
    assert "intervals" not in rows["teacher"]
    one_query = [rows["saved"]["retention"]["cranfield"]] * 2
    assert rows["saved"]["intervals"]["cranfield"] == pytest.approx(one_query)
    assert rows["saved"]["intervals"]["STS-B"] == [None, None]  # draws without any correlation
    assert rows["saved"]["intervals"].keys() == rows["saved"]["retention"].keys()
    assert rows["saved"]["bytes"] == rows["patched, mse"]["bytes"] < rows["teacher"]["bytes"]
    same = ("scores", "means", "retention", "fidelity")
    assert [rows["saved"][k] for k in same] == [rows["patched, mse"][k] for k in same]
    assert rows["saved"]["scores"] != rows["patched, absmean"]["scores"] != rows["teacher"]["scores"]
    assert 0 < rows["saved"]["fidelity"]["cosine"] < 99.9
    assert rows["saved"]["fidelity"]["texts"] == len(TEXTS) + 1  # the query too
    files = [f for f in Path(ternary_path).rglob("*") if f.is_file()]
    assert rows["saved"]["bytes_on_disk"] == sum(f.stat().st_size for f in files)
    assert result["environment"]["sentence_transformers"] and figure.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "SICK-R (sts/sickr/test.jsonl.gz)" in printed and "medquad" in printed
    assert "95 %, from" in printed and "retention, %" in printed and "fidelity, %" in printed


def test_scores_are_written_into_the_model_card(run, ternary_path, tmp_path):
    folder = tmp_path / "saved"
    shutil.copytree(ternary_path, folder)
    shutil.copytree(folder, folder / "checkpoint-10")  # of the run, not of the model
    (folder / "README.md").write_text("# A model\n\n## Scores\n\nold\n\n## Training\n\nlong\n")
    for _ in range(2):
        row = run("--rules", "--ternary", f"saved={folder}", "--update-cards")["rows"]["saved"]
    card = (folder / "README.md").read_text()
    assert card.startswith("# A model\n\n\n## Training\n\nlong\n\n## Scores\n") and "old" not in card
    score, kept = row["scores"]["STS-B"], row["retention"]["STS-B"]
    low, high = row["intervals"]["trec"]
    assert card.count("| STS-B |") == 1 and f"| {score:.2f} | {kept:.1f} % | - |" in card
    assert f"{row['retention']['trec']:.1f} % | {low:.1f} to {high:.1f} |" in card
    own = [f for f in folder.glob("*") if f.is_file() and f.name != "README.md"]
    assert row["bytes_on_disk"] < 1.5 * sum(f.stat().st_size for f in own) + 10_000


def test_the_cache_gives_the_same_without_the_model(run, tmp_path, monkeypatch):
    options = ("--cache", tmp_path / "vectors")
    first = run(*options)["rows"]
    assert first["teacher"]["texts_from_cache"] == 0

    def refuse(*_, **__):
        raise AssertionError("the model was called")

    with monkeypatch.context() as patch:
        for kind, name in ((SentenceTransformer, "encode"), (Padded, "vectors"), (Packed, "vectors")):
            patch.setattr(kind, name, refuse)
        second = run(*options)["rows"]
    for label, row in second.items():
        assert row["scores"] == first[label]["scores"] and row["texts_from_cache"] > len(TEXTS)
    assert second["patched, mse"]["fidelity"] == first["patched, mse"]["fidelity"]
    other = run(*options, "--activation-bits", "16")["rows"]
    assert other["teacher"]["texts_from_cache"] > 0 and other["patched, mse"]["texts_from_cache"] == 0


def test_tasks_sets_rules_and_bits_are_obeyed(run, ternary_path):
    rows = run("--rules", "--tasks", "sts", "clustering", "--sets", "STS-B", "trec")["rows"]
    assert list(rows) == ["teacher"] and list(rows["teacher"]["scores"]) == ["STS-B"]
    options = ("--rules", "mse", "--ternary", f"t={ternary_path}", "--tasks", "fidelity")
    eight, sixteen = (run(*options, "--activation-bits", bits)["rows"] for bits in (8, 16))
    assert eight["t"]["scores"] == {}
    assert eight["t"]["fidelity"] != sixteen["t"]["fidelity"] == sixteen["patched, mse"]["fidelity"]


def test_rounded_rows(run, monkeypatch):
    rows = run("--rules", "--rounded", "Q8_0", "Q4_0", "--tasks", "fidelity")["rows"]
    assert list(rows) == ["teacher", "rounded, Q8_0", "rounded, Q4_0"]
    assert rows["teacher"]["bytes"] > rows["rounded, Q8_0"]["bytes"] > rows["rounded, Q4_0"]["bytes"]
    closeness = [rows[f"rounded, {name}"]["fidelity"]["cosine"] for name in ("Q8_0", "Q4_0")]
    assert 99.9 < closeness[0] < 100 and 90 < closeness[1] < closeness[0]
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match="--rounded needs the gguf package .*pip install gguf"):
        run("--rounded", "Q8_0")


def test_calibrated_rows(run, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS * 6) + "\n")
    options = ("--calibrate", file, "--calibration-texts", 40, "--embedding-bits", 8, "--tasks", "fidelity")
    rows = run(*options)["rows"]
    assert list(rows) == ["teacher", "patched, mse", "calibrated, mse"]
    assert rows["calibrated, mse"]["fidelity"]["cosine"] > rows["patched, mse"]["fidelity"]["cosine"] + 10
    assert rows["calibrated, mse"]["calibration_texts"] == 40
    assert rows["calibrated, mse"]["calibration_seconds"] > 0
    more = ("--bits", 4, 3, "--calibration-folder", tmp_path / "kept")
    other = run(*options, *more)["rows"]
    assert list(other) == [
        "teacher",
        "patched, mse, 4 bits",
        "calibrated, mse, 4 bits",
        "calibrated, mse, 3 bits",
    ]
    sizes = [rows["patched, mse"]["bytes"], other["calibrated, mse, 3 bits"]["bytes"]]
    assert sizes[0] < sizes[1] < other["patched, mse, 4 bits"]["bytes"]
    assert {f.name for f in (tmp_path / "kept").iterdir()} == {"mse-4", "mse-3"}
    assert other["calibrated, mse, 4 bits"]["process_peak_bytes"] > 1e8
    with pytest.raises(SystemExit, match="2"):
        run("--bits", 2.5, "--tasks", "fidelity")
    plain = run("--embedding-bits", 16, "--tasks", "fidelity")["rows"]["patched, mse"]
    assert plain["fidelity"] != rows["patched, mse"]["fidelity"]  # tables of 16 bits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ternary", "no-label"], r"must be LABEL=PATH with a saved model's folder; received 'no-label'"),
        (["--ternary", "teacher=."], "two rows would be called 'teacher'"),
        (["--calibrate", "nowhere.txt"], "nowhere.txt is not there; name a file"),
        (["--rules", "best"], "invalid choice: 'best'"),
        (["--sets", "STS-C"], "invalid choice: 'STS-C'"),
        (["--sets", "STS12"], "holds none of the sets STS12"),
        (["--sets", "trec", "--tasks", "sts"], r"holds none of the sets \(no set has these --tasks\)"),
        (["--mteb", "STS12"], "not allowed with argument --data"),
    ],
)
def test_bad_arguments(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code not in (0, None)
    assert re.search(message, f"{stopped.value.code} {capsys.readouterr().err}")


def test_bad_files(tmp_path):
    file = tmp_path / "sts/stsb/test.jsonl.gz"
    write(file, [{"sentence1": "a", "sentence2": "b", "score": 1}, {"sentence1": "a"}])
    with pytest.raises(
        ValueError, match="line 2: every line must be a JSON object with sentence1, .*received"
    ):
        eval_sets.load(tmp_path, ["STS-B"])
    write(file, [])
    with pytest.raises(ValueError, match="is empty"):
        eval_sets.load(tmp_path, ["STS-B"])
    file.write_text("not gzip")
    with pytest.raises(ValueError, match="no readable gzip file"):
        eval_sets.load(tmp_path, ["STS-B"])
    retrieval(tmp_path / "retrieval/scifact", {"q": 1}, {"d": 1}, [("q", "lost", 1)])
    with pytest.raises(ValueError, match="names query 'q' with document 'lost'"):
        eval_sets.load(tmp_path, ["scifact"])


def test_mteb(run, monkeypatch):
    """With a stand-in for the package: the real one needs the hub."""
    calls = []

    def evaluate(model, task, *, encode_kwargs, cache, show_progress_bar):
        calls.append((cache, encode_kwargs["batch_size"]))
        ternary = any(isinstance(m, tritern.TernaryLinear) for m in model.modules())
        return SimpleNamespace(task_results=[SimpleNamespace(get_score=lambda: 0.6 if ternary else 0.8)])

    def get_task(name, languages):
        if name != "STSBenchmark":
            raise KeyError(f"{name} not found")
        return SimpleNamespace(metadata=SimpleNamespace(name=name, type="STS"))

    source = ("--mteb", "STSBenchmark")
    monkeypatch.setattr(scores, "version", lambda _: "2.0")
    monkeypatch.setitem(sys.modules, "mteb", SimpleNamespace(evaluate=evaluate, get_task=get_task))
    rows = run(source=source)["rows"]
    names = ("STSBenchmark", "sts", "overall", "all sets")
    assert rows["patched, mse"]["retention"] == pytest.approx(dict.fromkeys(names, 75))
    assert "intervals" not in rows["patched, mse"]
    assert calls == [(None, 64)] * 2
    with pytest.raises(SystemExit, match="mteb knows: 'Nothing not found'"):
        run(source=("--mteb", "Nothing"))
    with pytest.raises(SystemExit):
        run("--sets", "trec", source=source)
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(SystemExit, match="pip install mteb"):
        run(source=source)


DATA = os.environ.get("TRITERN_DATA")


@pytest.mark.skipif(not DATA, reason="TRITERN_DATA does not name the folder of evaluation data")
def test_patched_minilm_keeps_75_points_of_stsb(minilm):
    (stsb,), _ = eval_sets.load(Path(DATA), ["STS-B"])
    original = stsb.score(Encoder(minilm))
    ternary = stsb.score(Encoder(tritern.patch(minilm)))
    assert original == pytest.approx(0.8203, abs=0.001)
    assert 0.75 <= ternary < original
