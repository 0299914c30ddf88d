import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tritern
from tritern import progress
from tritern.nn.replace import is_ternary
from tritern.search import KINDS, SearchIndex
from tritern_cli import loading
from tritern_cli import search as search_verb

from .cli import answer, error, load, run, wrong_usage

ROOT = Path(__file__).parents[2]
VERBS = ("convert", "distill", "eval", "info", "bench", "tune", "search")


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


def test_the_installed_command_and_a_reader_that_stops(ternary_path, texts_file):
    script = Path(sys.executable).with_name("tritern")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "tritern_cli"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    process = subprocess.Popen(
        [*command, "search", str(ternary_path), str(texts_file), "-k", "1"],
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
def test_what_ends_a_verb(monkeypatch, ternary_path, texts_file, raised, code, message):
    def evaluate(*args, **kwargs):
        print("a note")
        raise raised

    monkeypatch.setattr(tritern, "evaluate", evaluate)
    result = run("eval", ternary_path, texts_file, "--teacher", ternary_path)
    assert result.exit_code == code and result.stdout == ""
    assert result.stderr.endswith(f"a note\n{message}")


def test_a_terminal_without_the_characters(ternary_path, texts_file):
    command = [sys.executable, "-m", "tritern_cli", "search", str(ternary_path), str(texts_file), "-k", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        command,
        input="ba caf\u00e9\n".encode(),
        capture_output=True,
        env={**environment, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0 and done.stdout.startswith(b"ba caf\\xe9\n"), done.stderr
    assert b"it/s" not in done.stderr  # no progress bars where nobody looks


def test_long_verbs_say_how_far_they_are_without_a_terminal(
    monkeypatch, tiny_path, ternary_path, texts_file, tmp_path
):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    for command, line in [
        (["search", ternary_path, texts_file, "q"], "Embedding: 60 of 60 texts (100%), "),
        (["eval", ternary_path, texts_file, "--teacher", tiny_path],
         "Embedding: 60 of 60 texts (100%), "),
        (["bench", ternary_path, "--count", 4, "--rounds", 1, "--queries", 1],
         "Measuring: 3 of 3 steps (100%), "),
        (["convert", tiny_path, tmp_path / "out", "--calibrate", texts_file], "Calibrating: 4 of "),
    ]:  # fmt: skip
        result = run(*command, "--json")
        assert line in result.stderr and "\r" not in result.stderr
        assert json.loads(result.stdout)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("tritern_cli.app", "info /nowhere"), ("semantic_search", "search /nowhere query")],
)
def test_memory_stays_whole_with_many_shapes(module, arguments):
    """What oneDNN keeps of each shape stands between the buffers that are freed: no larger one fits there."""
    code = f"""
import sys
from {module} import main
sys.argv[1:] = {arguments.split()}
try:
    main()
except SystemExit as done:
    assert done.code
import psutil, torch
values = torch.randn(300, 1536)
torch.nn.functional.gelu(values)
before = psutil.Process().memory_full_info().uss
for rows in range(1, 301):
    torch.nn.functional.gelu(values[:rows])
print((psutil.Process().memory_full_info().uss - before) / values.nbytes)
"""
    paths = [ROOT, ROOT / "kernels", ROOT / "examples"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    environment.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.splitlines()[-1]) < 75  # buffers of the last size; 150 with torch's default


def test_a_bug_keeps_its_traceback(monkeypatch, ternary_path, texts_file):
    monkeypatch.setattr(tritern, "evaluate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("eval", ternary_path, texts_file, "--teacher", ternary_path)


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
    assert len(found["summary"]["layers"]) == 5 and found["format"] == "tritern" and found["preview"]
    assert found["bytes_on_disk"] == sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())


def test_convert_says_what_it_made(tiny_path, tmp_path):
    result = run("convert", tiny_path, tmp_path / "out", "--dtype", "float16")
    assert "all ternary layers" in result.stdout and "of float16" in result.stdout
    assert f"Saved in {tmp_path / 'out'}, 0." in result.stdout
    note, measure, train = result.stdout.splitlines()[-3:]
    assert note.startswith("This is a preview of size and speed, not a model to serve")
    assert measure == f"Measure it: tritern eval {tmp_path / 'out'} FILE --teacher {tiny_path}"
    assert train == f"Train one to serve: tritern distill {tiny_path} FILE FOLDER"
    stored = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert stored == {torch.float16, torch.float32, torch.int8, torch.uint8}


def test_convert_with_calibration(tiny, tiny_path, texts_file, tmp_path, sentences):
    texts = "\n".join(sentences[:40])
    answer("convert", tiny_path, tmp_path / "a", "--calibrate", "-", "--calibrate-texts", 20, input=texts)
    fitted = tritern.patch(tiny, calibration_texts=sentences[:20])
    assert np.array_equal(load(tmp_path / "a").encode(sentences[:5]), fitted.encode(sentences[:5]))
    assert (
        "Measure it on texts that it was not calibrated on"
        in run("convert", tiny_path, tmp_path / "c", "--calibrate", "-", input=texts).stdout
    )
    calibrated = run("convert", tiny_path, tmp_path / "e", "--calibrate", "-", input=texts).stdout
    again = run("convert", tmp_path / "e", tmp_path / "f", "--format", "dense").stdout
    assert "preview" not in calibrated + again
    alone = wrong_usage("convert", tiny_path, tmp_path / "d", "--calibrate-texts", 20)
    assert "say how to read the file of --calibrate" in alone
    few = error("convert", tiny_path, tmp_path / "b", "--calibrate", texts_file, "--calibrate-texts", 15)
    assert "at least 16" in few


def test_convert_with_other_bits(tiny_path, tmp_path, sentences):
    (four,) = answer("convert", tiny_path, tmp_path / "four", "--bits", 4)
    assert {layer["bits"] for layer in four["summary"]["layers"]} == {4} and not four["preview"]
    text = "\n".join(sentences[:40])
    (mixed,) = answer("convert", tiny_path, tmp_path / "mixed", "--bits", 2.5, "--calibrate", "-", input=text)
    assert {layer["bits"] for layer in mixed["summary"]["layers"]} == {2, 4}
    assert "--bits between 2 and 4" in wrong_usage("convert", tiny_path, tmp_path / "a", "--bits", 2.5)
    assert "less than or equal to 4" in wrong_usage("convert", tiny_path, tmp_path / "a", "--bits", 5)


def test_convert_to_an_ordinary_checkpoint(tiny_path, ternary_path, texts, tmp_path):
    (found,) = answer("convert", ternary_path, tmp_path / "dense", "--format", "dense")
    dense = load(tmp_path / "dense")
    assert not is_ternary(dense) and len(found["summary"]["layers"]) == 12
    original = load(tiny_path).encode(texts, normalize_embeddings=True)
    vectors = dense.encode(texts, normalize_embeddings=True)
    packed = load(ternary_path).encode(texts, normalize_embeddings=True)
    assert (vectors * packed).sum(1).min() > 0.995 > (vectors * original).sum(1).min()
    assert "is ternary already" in error(
        "convert", ternary_path, tmp_path / "a", "--format", "dense", "--rule", "twn"
    )
    assert "save it with --format dense or gguf" in error("convert", ternary_path, tmp_path / "b")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_convert_changes_the_tables_of_a_ternary_model(ternary_path, texts, tmp_path):
    (found,) = answer("convert", ternary_path, tmp_path / "four", "--embedding-bits", 4)
    assert [table["bits"] for table in found["summary"]["tables"]] == [4]
    expected = tritern.patch(load(ternary_path), embedding_bits=4).encode(texts)
    assert np.array_equal(load(tmp_path / "four").encode(texts), expected)
    answer("convert", ternary_path, tmp_path / "dense", "--embedding-bits", 4, "--format", "dense")
    table = load(tmp_path / "dense")[0].auto_model.embeddings.word_embeddings
    assert all(len(group.unique()) <= 16 for group in table.weight[:50].view(-1, 32))


def test_convert_to_gguf(tiny_path, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "new" / "tiny.gguf"
    (found,) = answer("convert", tiny_path, path, "--format", "gguf")
    assert path.read_bytes()[:4] == b"GGUF" and found["bytes_on_disk"] == path.stat().st_size
    again = error("convert", tiny_path, path, "--format", "gguf")
    assert "is there already: name another file, or write over it with --force" in again
    answer("convert", tiny_path, path, "--format", "gguf", "--force")
    assert "is a folder" in error("convert", tiny_path, tmp_path, "--format", "gguf")


def test_convert_overwrites_only_by_force(tiny_path, ternary_path, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    assert "out is not empty: name another, or write into it with --force" in error("convert", tiny_path, out)
    answer("convert", tiny_path, out, "--force")
    assert (out / "thesis.tex").read_text() == "years" and is_ternary(load(out))
    assert "is there already" in error("convert", tiny_path, out / "thesis.tex")
    assert "is a file; name a folder" in error("convert", tiny_path, out / "thesis.tex", "--force")
    assert "thesis.tex is a file" in error("convert", tiny_path, out / "thesis.tex" / "x")


@pytest.mark.parametrize("name", ["x", "new/x"])
def test_convert_where_nothing_can_be_written(monkeypatch, tiny_path, tmp_path, name):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or Path(path) != tmp_path)
    assert f"no permission to write {tmp_path}" in error("convert", tiny_path, tmp_path / name)
    gguf = error("convert", tiny_path, tmp_path / f"{name}.gguf", "--format", "gguf")
    assert f"no permission to write {tmp_path}" in gguf


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux")
def test_outputs_are_checked_before_work_is_done(monkeypatch, tiny_path, ternary_path, texts_file):
    monkeypatch.setattr(loading, "load", lambda *args, **settings: pytest.fail("a model was loaded"))
    for command in (
        ["convert", tiny_path, "/proc/none/model"],
        ["convert", tiny_path, "/proc/none.gguf", "--format", "gguf"],
        ["distill", tiny_path, texts_file, "/proc/none/model"],
        ["search", ternary_path, texts_file, "q", "--index", "/proc/none"],
    ):
        assert re.search(
            "error: cannot write /proc/none.*: No such file or directory in /proc", error(*command)
        )


# ---------------------------------------------------------------- eval, info, search


def test_eval_is_evaluate(tiny_path, ternary_path, texts_file, sentences):
    (found,) = answer("eval", ternary_path, texts_file, "--teacher", tiny_path, "--limit", 40, "-k", 5)
    expected = tritern.evaluate(
        load(ternary_path), load(tiny_path), sentences[:20], k=5
    )  # every other is empty
    assert found == {"model": str(ternary_path), "teacher": tiny_path, **vars(expected)}
    result = run("eval", tiny_path, "-", "--teacher", tiny_path, input="\n".join(sentences[:30]))
    assert result.stdout.startswith("cosine 1.0000") and "on 30 texts" in result.stdout


def test_a_sample_is_drawn_from_all_unless_the_first_are_asked_for(
    tiny_path, ternary_path, tmp_path, monkeypatch
):
    """A file sorted by source has texts of one source at its head."""
    texts = [f"news {i}" for i in range(2000)] + [f"law {i}" for i in range(2000)]
    file = tmp_path / "sorted.txt"
    file.write_text("\n".join(texts))
    seen = []

    def evaluate(model, teacher, texts, **_):
        seen.append(texts)
        return tritern.Fidelity(1.0, 1.0, 1.0, 1.0, 10, len(texts))

    monkeypatch.setattr(tritern, "evaluate", evaluate)
    monkeypatch.setattr(tritern, "patch", lambda model, calibration_texts: seen.append(calibration_texts))
    monkeypatch.setattr("tritern_cli.convert._save", lambda model, output, format: output.mkdir())
    compare = "eval", ternary_path, file, "--teacher", tiny_path
    fit = "convert", tiny_path, tmp_path / "out", "--force", "--calibrate", file
    for command, count, option in ((compare, 1000, "--limit"), (fit, 1024, "--calibrate-texts")):
        seen.clear()
        for arguments in ((), (), (option, 30)):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            run(*command, *arguments)
        drawn, again, first = seen
        assert len(drawn) == count and drawn == again and set(drawn) < set(texts)
        assert 0.4 < sum(text.startswith("law") for text in drawn) / count < 0.6
        assert first == texts[:30]
    assert loading.sample(str(file), 5, first=3) == texts[:3]
    monkeypatch.setattr("tritern.texts.sample.POOL", 10)
    assert set(loading.sample(str(file), 5, first=None)) < set(texts[:10])


def test_eval_finds_the_teacher_in_the_model_card(tiny_path, ternary_path, texts_file, tmp_path):
    assert "name it with --teacher" in error("eval", ternary_path, texts_file)
    patched = tritern.patch(load(tiny_path))
    card = tmp_path / "own"
    patched.save_pretrained(str(card))
    assert "base_model" not in (card / "README.md").read_text()
    model = load(tiny_path)
    model.model_card_data.base_model = tiny_path
    tritern.patch(model).save_pretrained(str(tmp_path / "named"))
    (found,) = answer("eval", tmp_path / "named", texts_file)
    assert found["teacher"] == tiny_path and found["cosine"] < 1


def test_eval_of_different_widths_is_json(monkeypatch, ternary_path, texts_file):
    fidelity = tritern.Fidelity(float("nan"), float("nan"), 0.5, 0.5, 10, 60)
    monkeypatch.setattr(tritern, "evaluate", lambda *args, **kwargs: fidelity)
    result = run("eval", ternary_path, texts_file, "--teacher", ternary_path, "--json")
    assert json.loads(result.stdout, parse_constant=pytest.fail)["cosine"] is None


def test_info(tiny_path, ternary_path):
    (plain,), (packed,) = answer("info", tiny_path), answer("info", ternary_path)
    assert (plain["ternary"], packed["ternary"]) == (False, True)
    assert plain["summary"] == packed["summary"] and len(plain["summary"]["layers"]) == 12
    assert packed["environment"]["torch"] == torch.__version__
    assert f"{tiny_path} is not ternary" in run("info", tiny_path).stdout
    text = run("info", ternary_path).stdout
    assert "is not ternary" not in text and "pooler" in text and "cpu" in text.splitlines()[-1]
    assert answer("info") == [{"environment": packed["environment"]}]


def test_info_seals_what_was_changed_on_purpose(tiny_path, ternary_path, tmp_path):
    folder = shutil.copytree(ternary_path, tmp_path / "copy")
    config = folder / "sentence_bert_config.json"
    good = config.read_text()
    assert run("info", folder, "--seal").stdout.startswith("Sealed again: no file had changed.\n")
    config.write_text(json.dumps({**json.loads(good), "max_seq_length": 32}))
    assert f"{config} is not the file that was saved" in error("info", folder)
    (found,) = answer("info", folder, "--seal")
    assert found["sealed"] == ["sentence_bert_config.json"] and load(folder).max_seq_length == 32
    assert "sealed" not in answer("info", folder)[0]
    config = folder / "config.json"
    config.write_text(config.read_text().replace("encoder.layer.0.attention.self.query", "nowhere"))
    assert "names the ternary layer 'nowhere'" in error("info", folder, "--seal")
    assert f"{config} is not the file that was saved" in error("info", folder)
    assert "holds no tritern_manifest.json: none of its files is sealed" in error("info", tiny_path, "--seal")
    assert "--seal goes with the folder of a ternary model" in wrong_usage("info", "a/name", "--seal")


def test_search_ranks_texts(ternary_path, tmp_path):
    corpus = ["ba da fa", "ga ka la ma", "ba da fa ga", "na pa ra"]
    (tmp_path / "c.csv").write_text("id,said\n" + "\n".join(f"{i}x,{t}" for i, t in enumerate(corpus)))
    command = ["search", ternary_path, tmp_path / "c.csv", "--column", "said", "-k", 3]
    first, second = answer(*command, "ba da fa", "na pa ra")
    assert first["query"] == "ba da fa" and second["hits"][0]["text"] == "na pa ra"
    scores = [hit["score"] for hit in first["hits"]]
    assert first["hits"][0]["text"] == "ba da fa" and len(scores) == 3 and scores == sorted(scores)[::-1]
    assert scores[0] == pytest.approx(1, abs=1e-5) and scores[1] < 0.99
    assert answer(*command, input="ba da fa\n\nna pa ra\n") == [first, second]
    lines = run("search", ternary_path, "-", "ba da fa", "-k", 2, input="\n".join(corpus)).stdout.splitlines()
    assert lines[0] == "ba da fa" and lines[1].split() == ["1.000", "ba", "da", "fa"] and len(lines) == 3
    assert "name queries as arguments" in wrong_usage("search", ternary_path, "-")
    assert "not text in this terminal's encoding" in wrong_usage("search", ternary_path, "-", "caf\udce9")
    assert "standard input, line 1: not UTF-8" in error(*command, input=b"caf\xe9\n")


def test_search_keeps_an_index(ternary_path, texts_file, tmp_path, sentences):
    folder = tmp_path / "new" / "index"
    command = ["search", ternary_path, texts_file, sentences[7], "-k", 2]
    (plain,) = answer(*command)
    (kept,) = answer(*command, "--index", folder)
    assert kept == plain and plain["hits"][0]["text"] == sentences[7] and plain["hits"][0]["id"] == 7
    assert SearchIndex.open(folder, load(ternary_path)).kind == "flat"
    written = [file.stat().st_mtime_ns for file in folder.glob("vectors*")]
    assert answer(*command, "--index", folder) == answer(
        "search", ternary_path, folder, sentences[7], "-k", 2
    )
    assert written == [file.stat().st_mtime_ns for file in folder.glob("vectors*")] != []
    assert "holds another corpus" in error(*command, "--index", folder, "--limit", 5)
    assert "was built with kind 'flat'" in error(*command, "--index", folder, "--kind", "hnsw")
    given = wrong_usage("search", ternary_path, folder, "q", "--kind", "flat", "--limit", 3)
    assert "is an existing index: leave out --kind, --limit" in given


def test_search_by_kind(ternary_path, texts_file, tmp_path, sentences):
    assert search_verb.KINDS == tuple(KINDS)
    command = ["search", ternary_path, texts_file, sentences[7], "-k", 3]
    (exact,) = answer(*command)
    (found,) = answer(*command, "--kind", "int8", "--index", tmp_path / "index", "--tokens-per-batch", 64)
    assert [h["id"] for h in found["hits"]] == [h["id"] for h in exact["hits"]]
    assert SearchIndex.open(tmp_path / "index", load(ternary_path)).kind == "int8"
    assert "kind must be one of flat, ivf-flat" in error(*command, "--kind", "best")


def test_search_where_it_cannot(ternary_path, tiny_path, texts_file, tmp_path, monkeypatch):
    command = ["search", ternary_path, texts_file, "q"]
    answer(*command, "--index", tmp_path / "index")
    assert "was built with another model" in error("search", tiny_path, tmp_path / "index", "q")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("years")
    assert "thesis exists and is not an index" in error(*command, "--index", tmp_path / "thesis")
    assert "exists and is not an index" in error(*command, "--index", tmp_path / "thesis" / "a.tex")
    assert "is a folder" in error("search", ternary_path, tmp_path / "thesis", "q")
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "faiss is missing: pip install 'tritern[search]'" in error(*command)


def test_search_shows_a_hit_on_one_line(ternary_path, tmp_path):
    long = "ba\n" + "da " * 200
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": long}))
    command = ["search", ternary_path, tmp_path / "c.jsonl", "ba"]
    (found,) = answer(*command)
    assert found["hits"][0]["text"] == long.strip()
    _, line = run(*command).stdout.splitlines()
    assert "ba da da" in line and line.endswith(" ...") and len(line) < 330


# ---------------------------------------------------------------- errors


def test_models_that_cannot_be_loaded(ternary_path, tmp_path):
    assert "there is no folder './nope'" in wrong_usage("info", "./nope")
    assert "there is no folder ''" in wrong_usage("info", "")
    (tmp_path / "empty").mkdir()
    assert "holds no model" in wrong_usage("info", tmp_path / "empty")
    file = tmp_path / "texts.txt"
    file.write_text("{}")
    for swapped in (["distill", file, ternary_path, "out"], ["bench", ternary_path, "--against", file]):
        assert "is a file; name the folder of a model" in wrong_usage(*swapped)
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert f"cannot load model {tmp_path / 'empty'} on cpu: Unrecog" in error("info", tmp_path / "empty")
    shutil.copytree(ternary_path, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated or damaged. Copy it again." in error("info", tmp_path / "cut")
    if not torch.cuda.is_available():
        failed = error("search", ternary_path, "-", "q", "--device", "cuda", input="ba")
        assert "device='cuda': cannot compute on cuda: torch" in failed and "sees 0 CUDA GPUs" in failed


def test_texts_that_cannot_be_read(ternary_path, texts_file, tmp_path, monkeypatch):
    command = ["eval", "--teacher", ternary_path, ternary_path]
    assert "nope.txt is not there" in error(*command, tmp_path / "nope.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt is empty" in error(*command, tmp_path / "empty.txt")
    assert "standard input is empty" in error(*command, "-", input="\n \n")
    assert "standard input, line 2: not UTF-8" in error(*command, "-", input=b"a\n\xff\n")
    assert "has no text column 'body'" in error(*command, texts_file, "--column", "body")
    assert "k + 2 = 12" in error(*command, "-", input="one\ntwo")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "'a-data-set' is not a file, and a data set needs more packages" in error(*command, "a-data-set")
    plain = tmp_path / "plain.txt"
    plain.write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\nthree\n")
    assert loading.read(str(plain), limit=3) == ["one", "two"]
    plain.write_bytes(b"one\ncaf\xe9\n")
    assert "plain.txt, line 2: not UTF-8" in error(*command, plain)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--rule", "best"), ("--activation-bits", "4"), ("--embedding-bits", "x"), ("--calibrate-texts", "0"),
     ("--dtype", "int8"), ("--format", "onnx"), ("--colour", "red")],
)  # fmt: skip
def test_wrong_options(tiny_path, tmp_path, option, value):
    assert option in wrong_usage("convert", tiny_path, tmp_path / "out", option, value)
    assert not (tmp_path / "out").exists()
