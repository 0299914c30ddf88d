import json
import shutil
from pathlib import Path

import torch

import tritern
from tritern.nn.replace import is_ternary

from .cli import answer, error, load, run, wrong_usage

# ---------------------------------------------------------------- distill


def test_distill(tiny_path, sentences, tmp_path):
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"id": "x", "body": t}) for t in sentences))
    command = ["distill", tiny_path, tmp_path / "texts.jsonl", tmp_path / "out", "--column", "body"]
    command += ["--limit", 200, "--holdout", 20, "--joined-ratio", 0, "--prefix", "ba ", "--prefix", "da "]
    command += ["--rule", "twn", "--activation-bits", 16, "--skip", "*.layer.0.*", "--teacher", tiny_path]
    settings = ["--per-device-train-batch-size", 16, "--use_cpu", "--disable_tqdm", "True"]
    settings += ["--no-group-by-length", "--logging_steps", 1, "--save_strategy", "no"]
    (found,) = answer(*command, "--steps", 2, *settings)
    record = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert found["steps"] == record["steps"] == 2
    assert found["fidelity"]["ternary, distilled"]["texts"] == 20
    assert record["data"] | {"source": ""} == {
        "texts": 180, "source": "", "column": "body", "limit": 200, "holdout": 20,
        "prefixes": ["ba ", "da "], "joined_ratio": 0,
    }  # fmt: skip
    config = {"rule": "twn", "activation_bits": 16, "embedding_bits": 8, "skip": ["*.layer.0.*"]}
    config["weight_bits"] = 2
    assert record["config"] == config and len(found["summary"]["layers"]) == 6
    assert record["settings"]["group_by_length"] is False
    assert is_ternary(load(tmp_path / "out"))
    assert "or go on with --resume" in error(*command)


def test_distill_goes_on_and_reads_standard_input(tiny_path, sentences, tmp_path):
    teacher = tmp_path / "e5-tiny"
    shutil.copytree(tiny_path, teacher)
    command = ["distill", teacher, "-", tmp_path / "out", "--steps", 2, "--embedding-bits", 16]
    command += ["--holdout", 0, "--use_cpu", "--per_device_train_batch_size", 16, "--save_steps", 1]
    result = run(*command, input="\n".join(sentences[:100]))
    assert f"Saved in {tmp_path / 'out'}" in result.stdout and "whole model" in result.stdout
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    result = run(*command, "--resume", input="\n".join(sentences[:100]))
    record = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert record["resumed_from"] == "checkpoint-1" and record["config"]["embedding_bits"] == 16
    assert record["data"]["prefixes"] == ["query: ", "passage: "]


def test_distill_refuses_unknown_settings(tiny_path, texts_file, tmp_path):
    command = ["distill", tiny_path, texts_file, tmp_path / "out"]
    assert "unknown options: --stepz 3 (--help-all" in wrong_usage(*command, "--stepz", 3)
    assert "did you mean --num_train_epochs? --help-all" in wrong_usage(*command, "--epochs", 3)
    assert "steps (3) and max_steps (4) are the same setting: pass one" in error(
        *command, "--steps", 3, "--max_steps", 4, "--use_cpu"
    )
    assert "invalid float value: 'many'" in wrong_usage(*command, "--save_steps", "many")
    assert "--output_dir: the folder is OUTPUT" in wrong_usage(*command, "--output_dir", "b")
    assert "--max_steps: no such option here" in wrong_usage("distill", "--max_steps", 3, *command[1:])
    assert "needs at least 288 different texts" in error(*command, "--use_cpu")
    assert not (tmp_path / "out").exists()
    settings = run("distill", "--help-all").stdout
    assert settings.count("--blend_ratio") == 1 and "MODEL TEXTS OUTPUT [--SETTING VALUE]..." in settings


# ---------------------------------------------------------------- bench, tune


def test_bench(tiny_path, ternary_path, texts_file):
    command = ["bench", ternary_path, "--against", tiny_path, "--texts", texts_file, "--count", 70]
    command += ["--rounds", 2]
    (found,) = answer(*command, "--queries", 3, "--batch-size", 8, "--device", "cpu")
    ours, theirs = found["results"]
    assert (ours["model"], ours["ternary"]) == (str(ternary_path), True)
    assert (theirs["model"], theirs["ternary"]) == (tiny_path, False)
    assert ours["weights_mb"] < theirs["weights_mb"] and ours["device"] == "cpu"
    for arm in (ours, theirs):
        assert len(arm["texts_per_second_rounds"]) == 2 and min(arm["texts_per_second_rounds"]) > 0
        assert 0 < arm["query_p50_ms"] <= arm["query_p99_ms"] and arm["held_mb"] > 0
    assert found["count"] == 70 and found["queries"] == 6 and found["environment"]["torch"]
    text = run("bench", ternary_path, "--count", 4, "--rounds", 1, "--queries", 1).stdout
    assert "4 texts of 39 words" in text and "held" in text
    assert "there is no folder './nope'" in wrong_usage("bench", "./nope")


def test_tune(monkeypatch, ternary_path, tmp_path):
    from tritern_kernels import tune

    if not torch.cuda.is_available():
        assert "needs a CUDA GPU, and torch sees none here" in error("tune", "bge-base")
    assert "--shape is like 4096x1024; received 40" in wrong_usage("tune", "--shape", "40")
    assert "name models, or weights with --shape" in wrong_usage("tune")
    calls = []

    def main(arguments):
        print("progress")
        calls.append(arguments)
        Path(arguments[1]).write_text('{"entries": [1, 2]}')

    monkeypatch.setattr(tune, "main", main)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    table = tmp_path / "t.json"
    options = ["--shape", "64x128", "--tokens", 16, "--tokens", 64, "--mode", "int8", "--seconds", 9]
    (found,) = answer("tune", "bge-base", ternary_path, *options, "--output", table)
    assert found == {"gpu": "a GPU", "table": str(table), "entries": 2}
    assert calls == [
        ["--json", str(table), "--models", "bge-base", "--shapes", "64x128", "32x32", "64x32", "32x64",
         "--tokens", "16", "64", "--modes", "int8", "--seconds", "9.0"]
    ]  # fmt: skip


def test_closeness_that_is_not_defined_is_told_too(tiny, tmp_path):
    """A teacher of another width gives no cosine: null in the record."""
    from tritern_cli.distill import _result

    fidelity = {"ternary, distilled": {"cosine": None, "overlap": 0.5, "k": 10}}
    record = dict.fromkeys(("model", "teacher", "data", "steps", "seconds")) | {"fidelity": fidelity}
    (tmp_path / "distillation.json").write_text(json.dumps(record))
    result = _result(tmp_path, tritern.summary(tritern.patch(tiny)))
    assert "ternary, distilled: cosine nan, top-10 overlap 50.0%" in result.text
