import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

import tritern
from tritern_cli import common
from tritern_cli.app import app

ROOT = Path(__file__).parents[2]
VERBS = ("convert", "distill", "eval", "info", "bench", "tune", "search")


def run(*arguments, input=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=input, catch_exceptions=False)


def answer(*arguments, input=None):
    """The JSON objects on standard output, which holds nothing else."""
    result = run(*arguments, "--json", input=input)
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def error(*arguments, input=None):
    """The one line of an error."""
    result = run(*arguments, input=input)
    assert result.exit_code == 1 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def wrong_usage(*arguments):
    """The message, without its frame."""
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    return " ".join(result.stderr.replace("│", " ").split())


def load(path):
    return SentenceTransformer(str(path), device="cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory, sentences):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n\n".join(sentences[:60]))
    return path


@pytest.fixture(scope="module")
def ternary(tmp_path_factory, tiny_path):
    path = tmp_path_factory.mktemp("ternary") / "model"
    assert run("convert", tiny_path, path).exit_code == 0
    return path


# ---------------------------------------------------------------- the command itself


def test_help_answers_before_torch_is_imported():
    code = """
import sys
from tritern_cli.app import app
try:
    app(["--help"])
except SystemExit as done:
    assert done.code == 0
assert not {"torch", "tritern", "transformers", "numpy"} & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(verb in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_examples(verb):
    result = run(verb, "--help")
    assert result.exit_code == 0 and f"tritern {verb} " in result.stdout.partition("Examples")[2]


def test_version():
    assert run("--version").stdout == f"tritern {tritern.__version__}\n"
    assert run().exit_code == 2 and "convert" in run().output
    assert "No such command 'patch'" in wrong_usage("patch")


def test_the_installed_command_and_a_reader_that_stops(ternary, file):
    script = Path(sys.executable).with_name("tritern")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "tritern_cli"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    process = subprocess.Popen(
        [*command, "search", str(ternary), str(file), "-k", "1"],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write("ba da\n")
    process.stdin.flush()
    assert process.stdout.readline() == "ba da\n"  # answered at once
    process.stdout.close()
    process.stdin.write("fa ga\n" * 3)
    process.stdin.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert "Traceback" not in errors and "BrokenPipe" not in errors and "error:" not in errors


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, ""),
        (torch.OutOfMemoryError("no\nmemory"), 1, "error: no memory (lower the batch size)\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
    ],
)
def test_what_ends_a_verb(monkeypatch, ternary, file, raised, code, message):
    def evaluate(*args, **kwargs):
        print("a note")
        raise raised

    monkeypatch.setattr(tritern, "evaluate", evaluate)
    result = run("eval", ternary, "--teacher", ternary, "--texts", file)
    assert result.exit_code == code and result.stdout == ""
    assert result.stderr.endswith(f"a note\n{message}")


def test_a_bug_keeps_its_traceback(monkeypatch, ternary, file):
    monkeypatch.setattr(tritern, "evaluate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("eval", ternary, "--teacher", ternary, "--texts", file)


# ---------------------------------------------------------------- convert


def test_convert_is_patch_and_save(tiny, tiny_path, texts, tmp_path):
    settings = ["--rule", "twn", "--activation-bits", 16, "--embedding-bits", 8]
    skip = ["--skip", "*.layer.0.*", "--skip", "*.layer.1.output.*"]
    (found,) = answer("convert", tiny_path, tmp_path / "a" / "out", *settings, *skip)
    patched = tritern.patch(
        tiny, rule="twn", activation_bits=16, embedding_bits=8, skip=["*.layer.0.*", "*.layer.1.output.*"]
    )
    loaded = load(tmp_path / "a" / "out")
    assert np.array_equal(loaded.encode(texts), patched.encode(texts))
    assert len(found["summary"]["layers"]) == 5 and found["format"] == "tritern"
    assert found["bytes_on_disk"] == sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())


def test_convert_says_what_it_made(tiny_path, tmp_path):
    result = run("convert", tiny_path, tmp_path / "out", "--dtype", "float16")
    assert "all ternary layers" in result.stdout and "of float16" in result.stdout
    assert f"Saved in {tmp_path / 'out'}, 0." in result.stdout
    assert load(tmp_path / "out").dtype == torch.float16


def test_convert_with_calibration(tiny, tiny_path, file, tmp_path, sentences):
    texts = "\n".join(sentences[:40])
    answer("convert", tiny_path, tmp_path / "a", "--calibrate", "-", "--calibrate-texts", 20, input=texts)
    fitted = tritern.patch(tiny, calibration_texts=sentences[:20])
    assert np.array_equal(load(tmp_path / "a").encode(sentences[:5]), fitted.encode(sentences[:5]))
    few = error("convert", tiny_path, tmp_path / "b", "--calibrate", file, "--calibrate-texts", 15)
    assert "at least 16 texts" in few


def test_convert_to_an_ordinary_checkpoint(tiny_path, ternary, texts, tmp_path):
    (found,) = answer("convert", ternary, tmp_path / "dense", "--format", "dense")
    dense = load(tmp_path / "dense")
    assert not common.is_ternary(dense) and len(found["summary"]["layers"]) == 12
    original = load(tiny_path).encode(texts, normalize_embeddings=True)
    vectors = dense.encode(texts, normalize_embeddings=True)
    packed = load(ternary).encode(texts, normalize_embeddings=True)
    assert (vectors * packed).sum(1).min() > 0.995 > (vectors * original).sum(1).min()
    assert "already ternary" in error(
        "convert", ternary, tmp_path / "a", "--format", "dense", "--rule", "twn"
    )
    assert "already ternary" in error("convert", ternary, tmp_path / "b")


def test_convert_to_gguf(tiny_path, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "new" / "tiny.gguf"
    (found,) = answer("convert", tiny_path, path, "--format", "gguf")
    assert path.read_bytes()[:4] == b"GGUF" and found["bytes_on_disk"] == path.stat().st_size
    again = error("convert", tiny_path, path, "--format", "gguf")
    assert "is there already: name another file, or write over it with --force" in again
    answer("convert", tiny_path, path, "--format", "gguf", "--force")
    assert "is a folder" in error("convert", tiny_path, tmp_path, "--format", "gguf")


def test_convert_overwrites_only_by_force(tiny_path, ternary, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    assert "out is not empty: name another, or write into it with --force" in error("convert", tiny_path, out)
    answer("convert", tiny_path, out, "--force")
    assert (out / "thesis.tex").read_text() == "years" and common.is_ternary(load(out))
    assert "is there already" in error("convert", tiny_path, out / "thesis.tex")
    assert "is a file; name a folder" in error("convert", tiny_path, out / "thesis.tex", "--force")
    assert "Not a directory" in error("convert", tiny_path, out / "thesis.tex" / "x")


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
    assert record["config"] == config and len(found["summary"]["layers"]) == 6
    assert record["settings"]["group_by_length"] is False
    assert common.is_ternary(load(tmp_path / "out"))
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


def test_distill_refuses_unknown_settings(tiny_path, file, tmp_path):
    command = ["distill", tiny_path, file, tmp_path / "out"]
    assert "unknown options: --stepz 3 (--help-all" in wrong_usage(*command, "--stepz", 3)
    assert "invalid float value: 'many'" in wrong_usage(*command, "--save_steps", "many")
    assert "--output_dir: the folder is OUTPUT" in wrong_usage(*command, "--output_dir", "b")
    assert "--max_steps: no such option here" in wrong_usage("distill", "--max_steps", 3, *command[1:])
    assert "needs at least 288 different texts" in error(*command, "--use_cpu")
    assert "--blend_ratio" in run("distill", "--help-all").stdout


# ---------------------------------------------------------------- eval, info, search


def test_eval_is_evaluate(tiny_path, ternary, file, sentences):
    (found,) = answer("eval", ternary, "--teacher", tiny_path, "--texts", file, "--limit", 40, "-k", 5)
    expected = tritern.evaluate(load(ternary), load(tiny_path), sentences[:20], k=5)  # every other is empty
    assert found == {"model": str(ternary), "teacher": tiny_path, **vars(expected)}
    result = run("eval", tiny_path, "--teacher", tiny_path, "--texts", "-", input="\n".join(sentences[:30]))
    assert result.stdout.startswith("cosine 1.0000") and "on 30 texts" in result.stdout


def test_eval_finds_the_teacher_in_the_model_card(tiny_path, ternary, file, tmp_path):
    assert "name the original with --teacher" in error("eval", ternary, "--texts", file)
    patched = tritern.patch(load(tiny_path))
    card = tmp_path / "own"
    patched.save_pretrained(str(card))
    assert "base_model" not in (card / "README.md").read_text()
    model = load(tiny_path)
    model.model_card_data.base_model = tiny_path
    tritern.patch(model).save_pretrained(str(tmp_path / "named"))
    (found,) = answer("eval", tmp_path / "named", "--texts", file)
    assert found["teacher"] == tiny_path and found["cosine"] < 1


def test_eval_of_different_widths_is_json(monkeypatch, ternary, file):
    fidelity = tritern.Fidelity(float("nan"), float("nan"), 0.5, 0.5, 10, 60)
    monkeypatch.setattr(tritern, "evaluate", lambda *args, **kwargs: fidelity)
    result = run("eval", ternary, "--teacher", ternary, "--texts", file, "--json")
    assert json.loads(result.stdout, parse_constant=pytest.fail)["cosine"] is None


def test_info(tiny_path, ternary):
    (plain,), (packed,) = answer("info", tiny_path), answer("info", ternary)
    assert (plain["ternary"], packed["ternary"]) == (False, True)
    assert plain["summary"] == packed["summary"] and len(plain["summary"]["layers"]) == 12
    assert packed["environment"]["torch"] == torch.__version__
    assert f"{tiny_path} is not ternary" in run("info", tiny_path).stdout
    text = run("info", ternary).stdout
    assert "is not ternary" not in text and "pooler" in text and "cpu" in text.splitlines()[-1]
    assert answer("info") == [{"environment": packed["environment"]}]


def test_search_ranks_texts(ternary, tmp_path):
    corpus = ["ba da fa", "ga ka la ma", "ba da fa ga", "na pa ra"]
    (tmp_path / "c.csv").write_text("id,said\n" + "\n".join(f"{i}x,{t}" for i, t in enumerate(corpus)))
    command = ["search", ternary, tmp_path / "c.csv", "--column", "said", "-k", 3]
    first, second = answer(*command, "ba da fa", "na pa ra")
    assert first["query"] == "ba da fa" and second["hits"][0]["text"] == "na pa ra"
    scores = [hit["score"] for hit in first["hits"]]
    assert first["hits"][0]["text"] == "ba da fa" and len(scores) == 3 and scores == sorted(scores)[::-1]
    assert scores[0] == pytest.approx(1, abs=1e-5) and scores[1] < 0.99
    assert answer(*command, input="ba da fa\n\nna pa ra\n") == [first, second]
    lines = run("search", ternary, "-", "ba da fa", "-k", 2, input="\n".join(corpus)).stdout.splitlines()
    assert lines[0] == "ba da fa" and lines[1].split() == ["1.000", "ba", "da", "fa"] and len(lines) == 3
    assert "name queries as arguments" in wrong_usage("search", ternary, "-")


# ---------------------------------------------------------------- bench, tune


def test_bench(tiny_path, ternary, file):
    command = ["bench", ternary, "--against", tiny_path, "--texts", file, "--count", 70, "--rounds", 2]
    (found,) = answer(*command, "--queries", 3, "--batch-size", 8, "--device", "cpu")
    ours, theirs = found["results"]
    assert (ours["model"], ours["ternary"]) == (str(ternary), True)
    assert (theirs["model"], theirs["ternary"]) == (tiny_path, False)
    assert ours["weights_mb"] < theirs["weights_mb"] and ours["device"] == "cpu"
    for arm in (ours, theirs):
        assert len(arm["texts_per_second_rounds"]) == 2 and min(arm["texts_per_second_rounds"]) > 0
        assert 0 < arm["query_p50_ms"] <= arm["query_p99_ms"] and arm["held_mb"] > 0
    assert found["count"] == 70 and found["queries"] == 6 and found["environment"]["torch"]
    text = run("bench", ternary, "--count", 4, "--rounds", 1, "--queries", 1).stdout
    assert "4 texts of 39 words" in text and "held" in text
    assert "there is no such folder" in error("bench", "./nope")


def test_tune(monkeypatch, ternary, tmp_path):
    from tritern_kernels import tune

    if not torch.cuda.is_available():
        assert "a CUDA GPU, and torch sees none here" in error("tune", "bge-base")
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
    (found,) = answer("tune", "bge-base", ternary, *options, "--output", table)
    assert found == {"gpu": "a GPU", "table": str(table), "entries": 2}
    assert calls == [
        ["--json", str(table), "--models", "bge-base", "--shapes", "64x128", "32x32", "64x32", "32x64",
         "--tokens", "16", "64", "--modes", "int8", "--seconds", "9.0"]
    ]  # fmt: skip


# ---------------------------------------------------------------- errors


def test_models_that_cannot_be_loaded(ternary, tmp_path):
    assert "model ./nope: there is no such folder" in error("info", "./nope")
    (tmp_path / "empty").mkdir()
    assert f"cannot load model {tmp_path / 'empty'} on cpu: Unrecog" in error("info", tmp_path / "empty")
    shutil.copytree(ternary, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated or damaged. Copy it again." in error("info", tmp_path / "cut")
    if not torch.cuda.is_available():
        failed = error("search", ternary, "-", "q", "--device", "cuda", input="ba")
        assert f"cannot load model {ternary} on cuda: " in failed


def test_texts_that_cannot_be_read(ternary, file, tmp_path, monkeypatch):
    command = ["eval", ternary, "--teacher", ternary, "--texts"]
    assert "nope.txt is not there" in error(*command, tmp_path / "nope.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt is empty" in error(*command, tmp_path / "empty.txt")
    assert "standard input is empty" in error(*command, "-", input="\n \n")
    assert "standard input is not UTF-8" in error(*command, "-", input=b"a\n\xff\n")
    assert "has no text column 'body'" in error(*command, file, "--column", "body")
    assert "k + 2 = 12" in error(*command, "-", input="one\ntwo")
    for name in [n for n in sys.modules if n.startswith("tritern.distillation")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'tritern[train]'" in error(*command, file)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--rule", "best"), ("--activation-bits", "4"), ("--embedding-bits", "x"), ("--calibrate-texts", "0"),
     ("--dtype", "int8"), ("--format", "onnx"), ("--colour", "red")],
)  # fmt: skip
def test_wrong_options(tiny_path, tmp_path, option, value):
    assert option in wrong_usage("convert", tiny_path, tmp_path / "out", option, value)
    assert not (tmp_path / "out").exists()
