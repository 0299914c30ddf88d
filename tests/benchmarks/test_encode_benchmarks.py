"""Text to vector, tokens, attention: whole runs with a tiny model on the CPU; what a round on a GPU runs."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from models import arms, encode, encode_gpu, text_to_vector, tokens
from ops import attention


def start(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


@pytest.fixture
def texts(tmp_path, sentences):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(sentences[:30]))
    return file


@pytest.fixture
def table(tiny_path, texts, tmp_path, monkeypatch):
    """Rows of the tiny model's table in a JSON file, measured with further arguments."""
    file = tmp_path / "rows.json"
    small = ["--texts", texts, "--sentences", 30, "--seconds", 0.01, "--queries", 3, "--device", "cpu"]

    def rows(*arguments):
        start(encode, monkeypatch, "--models", tiny_path, *small, "--json", file, *arguments)
        return {row["arm"]: row for row in json.loads(file.read_text())["rows"]}

    return rows


# ---------------------------------------------------------------- text to vector


def test_arms_are_checked_and_measured(table, capsys):
    found = table("--batch-size", 4, 16)
    assert list(found) == list(arms.ON_CPU)
    for arm, row in found.items():
        assert "reason" not in row, row
        assert row["smallest_cosine"] > 0.98 and row["sentences_per_second"] > 0 and row["query_p50_ms"] > 0
        assert row["speed"] > 0 and len(row["passes"]) == text_to_vector.PASSES
        ours = arm.startswith("engine")
        assert ("stages" in row) == ours and set(row["sampled"]) == ({"32"} if ours else {"4", "16"})
    assert set(found["engine ternary"]["stages"]) == {"tokens", "packing", "model", "copy back"}
    assert all(seconds >= 0 for seconds in found["engine ternary"]["stages"].values())
    assert "it is on a CPU" in found["engine fp32"]["path"] and found["engine ternary"]["speed_of_engine"] > 0
    assert "of it unpatched" in capsys.readouterr().out


def test_a_run_goes_on_with_the_rows_that_have_no_figures(table, monkeypatch, capsys):
    late = table("--arms", "encode fp32", "engine fp32", "--minutes", 0)
    assert all("the 0 minutes were over" in row["reason"] for row in late.values()) and len(late) == 2
    first = table("--arms", "encode fp32")
    monkeypatch.setattr(
        text_to_vector, "measure", lambda *_: {"sentences_per_second": 1.0, "query_p50_ms": 1.0}
    )
    monkeypatch.setattr(text_to_vector, "line", lambda row: row["arm"])
    found = table("--arms", "encode fp32", "engine fp32")
    assert found["encode fp32"] == first["encode fp32"] and found["engine fp32"]["sentences_per_second"] == 1


def test_an_arm_that_fails_its_check_has_no_speed(table, monkeypatch):
    own = text_to_vector.own_vectors
    monkeypatch.setattr(text_to_vector, "own_vectors", lambda *a: -own(*a))
    found = table("--arms", "encode fp32", "engine ternary")
    assert all("failed its check: smallest cosine -" in row["reason"] for row in found.values())
    assert not any("sentences_per_second" in row for row in found.values())


def test_what_is_not_installed_is_a_reason(table, capsys):
    pytest.importorskip("sentence_transformers")
    if "flash_attn" in sys.modules:
        pytest.skip("flash-attn is installed")
    found = table("--arms", "encode fp16 unpadded")
    assert "FlashAttention2" in found["encode fp16 unpadded"]["reason"]
    with pytest.raises(SystemExit):
        table("--arms", "encode fp8")
    assert "--arms must be of encode fp32, " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_models_with_random_weights_are_sentence_transformers(kind, monkeypatch, minilm_path):
    small = {"type": kind, "hidden": 64, "layers": 2, "heads": 16, "intermediate": 128}
    monkeypatch.setitem(encode_gpu.MODELS, "small", small)
    monkeypatch.setattr(arms, "RANDOM", ("small",))
    dense = arms.load("small", "encode fp32", "cpu")
    assert dense.max_seq_length == arms.LONGEST
    assert dense[1].pooling_mode == ("mean" if kind == "bert" else "lasttoken")
    for arm in ("engine fp32", "engine ternary"):
        model, facts = text_to_vector.prepared("small", arm, "cpu")
        assert facts["path"].startswith("the engine")
        few = ["a word", "several words of a text", "x"]
        own = text_to_vector.own_vectors(model, few)
        assert text_to_vector.check(model, arm, few, own)["smallest_cosine"] > 0.98
        if arm == "engine fp32":
            torch.testing.assert_close(own, text_to_vector.own_vectors(dense, few))


def test_what_is_compiled_comes_last():
    found = list(text_to_vector.turns(["a", "b"], arms.ON_GPU))
    assert [arm for _, arm in found[-2:]] == ["encode fp16 compiled"] * 2
    assert len(found) == 2 * len(arms.ON_GPU)


def test_a_cpu_measures_memory_in_processes_of_their_own(tiny_path, texts, tmp_path, monkeypatch, capsys):
    small = ["--texts", texts, "--sentences", 8, "--batch-size", 4, "--queries", 2, "--rounds", 1]
    arguments = ["--model", tiny_path, "--device", "cpu", *small, "--json", tmp_path / "a.json"]
    start(encode, monkeypatch, *arguments, "--arms", "fp32", "ternary int8")
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert list(rows) == ["fp32", "ternary int8"]
    for name in (
        "sentences_per_second",
        "speed",
        "query_p50_ms",
        "query_speed",
        "peak_mb",
    ):  # of README's table
        assert all(row[name] > 0 for row in rows.values()), name
    assert "held_mb" in rows["fp32"] and "(1.00x)" in capsys.readouterr().out


# ---------------------------------------------------------------- tokens


def test_tokens_are_compared_and_timed(tiny_path, tmp_path, monkeypatch, capsys):
    small = ["--model", tiny_path, "--short", 40, "--long", 5, "--rounds", 1, "--json", tmp_path / "a.json"]
    monkeypatch.delenv("TRITERN_DATA", raising=False)
    start(tokens, monkeypatch, *small)
    short, long = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert (short["kind"], short["texts"], long["kind"], long["texts"]) == ("short", 40, "long", 5)
    assert long["median_characters"] > 4 * short["median_characters"]
    for row in (short, long):
        rates = row["texts_per_second"]
        assert list(rates) == [*(f"preprocess {n}" for n in tokens.BATCHES), "fast"]
        assert rates[row["best"]] == max(v for k, v in rates.items() if k != "fast")
        assert row["speed"] == pytest.approx(rates["fast"] / rates[row["best"]])
    assert f"x of {long['best']}" in capsys.readouterr().out


def test_other_ids_have_no_speed(tiny, monkeypatch, capsys):
    import tritern.engine.tokens as engine

    fast = engine.fast_tokenizer(tiny[0])
    assert tokens.differences(tiny, fast, ["one two", "three"]) == 0

    def wrong(texts):
        found = fast(texts)
        found.ids[-2] += texts[0].startswith(tokens.PROMPT)
        return found

    assert tokens.differences(tiny, wrong, ["one two", "three"]) == 1
    monkeypatch.setattr(engine, "fast_tokenizer", lambda *_: wrong)
    (row,) = tokens.measure_kinds(tiny, {"short": ["one two", "three"]}, 1)
    assert "speed" not in row and "the ids of 1 of 2 texts differ" in row["reason"]
    assert "not measured" in capsys.readouterr().out


# ---------------------------------------------------------------- attention


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it times the whole")
def test_attention_is_checked_text_by_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "MODELS", {"a": (2, 2, 32, False), "b": (4, 2, 32, True)})
    monkeypatch.setattr(attention, "RANGES", ((2, 70), (8, 8)))
    start(attention, monkeypatch, "--models", "a", "b", "--tokens", 80, "--json", tmp_path / "a.json")
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == 4 * len(attention.CONTESTANTS)
    for row in rows:
        if row["contestant"] == "torch varlen_attn":
            assert row["reason"]
        elif row["checked"]:
            assert 0 < row["errors"]["largest"] < 2e-3
    unchecked = [r for r in rows if not r["checked"]]
    assert [(r["model"], r["contestant"]) for r in unchecked] == [("a", attention.UNCHECKED)]
    assert "not checked" in capsys.readouterr().out


def test_wrong_attention_has_no_time(monkeypatch):
    texts = attention.make_texts("minilm", (3, 9), 20, "cpu")
    wanted = attention.exact(texts)
    assert torch.equal(texts.packed(texts.padded(texts.q)), texts.q)
    monkeypatch.setitem(attention.CONTESTANTS, "wrong", lambda texts: lambda: wanted.half() + 0.1)
    assert "failed the check against float64" in attention.measure("wrong", texts, wanted)["reason"]


def test_attention_is_compared_with_what_is_right():
    def row(median, checked=True):
        return {"us": {"median": median}, "checked": checked}

    rows = attention.with_speeds([row(10.0), row(20.0), row(5.0, False), {"reason": "none", "checked": True}])
    assert [r.get("speed") for r in rows] == [2.0, 0.5, 2.0, None]


# ---------------------------------------------------------------- a round on a GPU


@pytest.mark.skipif(os.name == "nt", reason="a bash script")
def test_a_round_runs_what_there_is(tmp_path, monkeypatch, capsys):
    """With an interpreter that only notes its arguments; the scripts' own parsers then take them."""
    log, fake = tmp_path / "log", tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n{{ printf "%s\\t" "$@"; echo; }} >> {log}\n')
    fake.chmod(0o755)
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": str(fake), "TRITERN_DATA": "sets"}
    done = subprocess.run(
        ["bash", "benchmarks/gpu_round.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    calls = [line.split("\t")[:-1] for line in log.read_text().splitlines() if line[:2] != "-c"]
    tests = [word for call in calls if "pytest" in call for word in call if word.startswith("tests/")]
    assert "tests/kernels" in tests and "tests/library/test_engine.py" in tests
    assert all((ROOT / test).exists() for test in tests)
    scripts = {
        Path(call[0]).stem: call for call in calls if call[0].endswith(".py") and "tests/" not in call[0]
    }
    assert set(scripts) == {"attention", "encode", "embed_search", "encode_gpu", "train", "gemm"}
    for name, call in scripts.items():
        monkeypatch.setattr(sys, "argv", [*call, "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / call[0]), run_name="__main__")
        assert not ended.value.code, name
        helped = capsys.readouterr().out
        options = [word for word in call if word.startswith("--")]
        assert all(option in helped for option in options), (name, options)
