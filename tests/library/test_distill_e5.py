import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from tritern import TernaryLinear

PATH = Path(__file__).parents[2] / "examples" / "distill_e5.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("distill_e5", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["distill_e5.py", *map(str, arguments)])
    return script.main()


def test_a_file_in_a_ternary_model_out(script, monkeypatch, tiny_path, sentences, tmp_path, capsys):
    texts, output = tmp_path / "texts.txt", tmp_path / "out"
    texts.write_text("\n".join(sentences))
    run(
        script, monkeypatch, "--model", tiny_path, "--texts", texts, "--output", output, "--steps", 2,
        "--limit", 200, "--holdout", 20, "--joined-ratio", 0, "--activation-bits", 16,
        "--prefixes", "ba ", "da ",
        "--per-device-train-batch-size", 16, "--use_cpu", "--disable_tqdm", "True", "--no-group-by-length",
    )  # fmt: skip
    record = json.loads((output / "distillation.json").read_text())
    assert record["steps"] == 2 and record["data"]["source"] == str(texts)
    assert record["data"]["texts"] == 180 and record["data"]["prefixes"] == ["ba ", "da "]
    assert record["config"]["activation_bits"] == 16 and record["config"]["embedding_bits"] == 8
    assert record["settings"]["group_by_length"] is False
    assert record["settings"]["per_device_train_batch_size"] == 16
    model = SentenceTransformer(str(output), device="cpu")
    assert sum(isinstance(m, TernaryLinear) for m in model.modules()) == 12
    assert "whole model" in capsys.readouterr().out


def test_e5_gets_its_prefixes_and_a_run_is_resumed(script, monkeypatch, tiny_path, sentences, tmp_path):
    model = tmp_path / "instructor" / "e5-tiny"
    shutil.copytree(tiny_path, model)
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"id": "x", "body": t}) for t in sentences))
    command = ["--model", model, "--teacher", model, "--texts", tmp_path / "texts.jsonl", "--column", "body"]
    command += ["--output", tmp_path / "out", "--holdout", 0, "--use_cpu", "--disable_tqdm", "True"]
    command += ["--per_device_train_batch_size", 16, "--save_steps", 2, "--rule", "twn"]
    run(script, monkeypatch, *command, "--steps", 4, "--embedding-bits", 16)
    record = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert record["data"]["prefixes"] == ["query: ", "passage: "] and record["data"]["column"] == "body"
    assert record["config"]["rule"] == "twn" and record["config"]["embedding_bits"] == 16
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    run(script, monkeypatch, *command, "--steps", 4, "--embedding-bits", 16, "--resume")
    again = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert again["resumed_from"] == "checkpoint-2"
    assert [e["loss"] for e in again["log"] if "loss" in e] == [
        e["loss"] for e in record["log"] if "loss" in e
    ]


def test_wrong_options(script, monkeypatch, tiny_path, sentences, tmp_path, capsys):
    required = ["--model", tiny_path, "--output", tmp_path / "out"]
    with pytest.raises(SystemExit):
        run(script, monkeypatch, *required, "--texts", "a.txt", "--batchsize", "3")
    assert "unknown options: --batchsize 3 (--help-all lists every setting)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(script, monkeypatch, *required, "--texts", "a.txt", "--learning_rat", "1e-4")
    assert "unknown options: --learning_rat 1e-4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(script, monkeypatch, *required, "--texts", "a.txt", "--output_dir", "b")
    assert "--output_dir: use --output DIR" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="distill_e5.py: texts: .*a.txt is not there"):
        run(script, monkeypatch, *required, "--texts", tmp_path / "a.txt")
    (tmp_path / "few.txt").write_text("\n".join(sentences[:30]))
    with pytest.raises(SystemExit, match="needs at least 288 different texts .* received 30"):
        run(script, monkeypatch, *required, "--texts", tmp_path / "few.txt", "--use_cpu")
    with pytest.raises(SystemExit):
        run(script, monkeypatch, "--help-all")
    assert "--blend_ratio" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(script, monkeypatch, "--help")
    assert "torchrun" in capsys.readouterr().out
