import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import tritern
from tritern.search import SearchIndex, embed

pytest.importorskip("ray.data")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "embed_with_ray.py"
RUNS = """
import runpy, sys
from pathlib import Path
import ray
script, folder, model, part_mb = sys.argv[1:]
sys.path.insert(0, str(Path(script).parent))
ray.init(num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, _temp_dir=folder)
command = [script, "c/*", "--model", model, "--patch", "--output", "shards", "--index", "idx"]
command += ["--actors", "2", "--part-mb", part_mb]
file = Path("c/c.jsonl")
rows = file.read_text()
file.write_text(rows + "{}")
for sys.argv in (command, [*command, "--column", "said"], command):
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        print(error)
    file.write_text(rows)
"""


@pytest.fixture(scope="module")
def script():
    """The names of the script and of its parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        parts = [importlib.import_module(f"embed_corpus.{n}") for n in ("texts", "shards", "cluster")]
        return {n: value for part in parts for n, value in vars(part).items()} | runpy.run_path(str(SCRIPT))


def test_a_corpus_on_two_actors(tiny_path, tiny, sentences, tmp_path):
    """Interrupted in its second part, and gone on with."""
    folder = tmp_path / "c"
    folder.mkdir()
    texts = [*sentences[:60], sentences[0]]  # one twice
    (folder / "a.txt").write_text("\n".join([*texts[:20], " ", *texts[20:30]]), encoding="utf-8-sig")
    pq.write_table(pa.table({"n": range(16), "text": texts[30:46]}), folder / "b.parquet", row_group_size=5)
    rows = [{"text": text, "n": n} for n, text in enumerate(texts[46:])]
    (folder / "c.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    first_part = sum((folder / name).stat().st_size for name in ("a.txt", "b.parquet"))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # sockets want a short path
        done = subprocess.run(
            [sys.executable, "-c", RUNS, str(SCRIPT), short, tiny_path, str((first_part + 1) / 1e6)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 files; 2 copies of the model on 2 CPUs" in done.stdout and "Traceback" not in done.stdout
    broken, other, whole = done.stdout.partition("begun with other column: name a new folder")
    assert "part 1 of 2 is done" in broken and "part 2 of 2 is done" not in broken
    assert f"error: {folder / 'c.jsonl'}, line 16: not a JSON object with 'text'" in broken
    assert other and "2 of the files are embedded already" in whole and "part 2 of 2 is done" in whole
    parts = sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert parts == ["_embedded.json", "_embedding.json", "part-00000", "part-00001"]

    found = pq.read_table(tmp_path / "shards")
    lines = [n for n in range(1, 32) if n != 21]
    numbers = {"a.txt": lines, "b.parquet": range(1, 17), "c.jsonl": range(1, 16)}
    ids = [f"c/{name}:{n}" for name, those in numbers.items() for n in those]
    assert found["id"].to_pylist() == ids and found["text"].to_pylist() == texts
    assert str(found.schema.field("vector").type) == "fixed_size_list<element: float>[32]"
    vectors = np.array(found["vector"].to_pylist(), np.float32)
    model = tritern.patch(tiny)
    assert np.array_equal(vectors, embed(model, texts, task="document").numpy())
    made = json.loads((tmp_path / "shards" / "_embedded.json").read_text())
    assert (made["texts"], made["patch"], len(made["files"])) == (61, True, 3)

    with SearchIndex.open(tmp_path / "idx", model) as index:
        assert np.array_equal(index.vectors, vectors) and list(index.items()) == list(zip(ids, texts))
        assert index.search([texts[50]], k=1)[0][0].id == ids[50]


def test_an_index_of_shards(script, tiny_path, tiny, sentences, tmp_path, monkeypatch, capsys):
    """Of several of them, as another kind, without Ray."""
    texts = [f"{sentences[i - n]} {sentences[i]}" for n in range(1, 5) for i in range(400)]
    vectors = embed(tiny, texts, task="document").numpy()
    (tmp_path / "shards" / "part-00000").mkdir(parents=True)
    for n, part in enumerate(np.array_split(np.arange(len(texts)), 3)):
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors[part].ravel()), 32)
        ids, chosen = [f"i{i}" for i in part], [texts[i] for i in part]
        shard = pa.table({"id": ids, "text": chosen, "vector": column})
        pq.write_table(shard, tmp_path / "shards" / "part-00000" / f"{n}.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--output", "shards", "--index", "idx", "--kind", "ivf-flat"])
    with pytest.raises(SystemExit, match="holds no complete shards"):
        script["main"]()
    made = {"model": tiny_path, "patch": False, "dtype": None, **script["description"](tiny)}
    record = tmp_path / "shards" / "_embedded.json"
    record.write_text(json.dumps(made | {"prompts": {"query": "", "document": "passage: "}}))
    with pytest.raises(SystemExit, match="has other prompts than when shards was embedded"):
        script["main"]()
    record.write_text(json.dumps(made))
    script["main"]()
    assert "1,600 texts in idx (IVF" in capsys.readouterr().out
    with SearchIndex.open("idx", SentenceTransformer(tiny_path, device="cpu")) as index:
        assert index.kind == "ivf-flat" and np.array_equal(index.vectors, vectors)
        assert index.search([texts[1500]], k=1)[0][0].id == "i1500"
    with pytest.raises(SystemExit) as wrong:
        script["main"]()
    assert wrong.value.code == 2 and "idx is there already" in capsys.readouterr().err


def test_parts_hold_the_files_in_order(script):
    sizes = dict(zip("abcdef", (3, 4, 20, 1, 9, 1)))
    parts = script["parts_of"](sizes, 10)
    assert parts == [["a", "b"], ["c"], ["d", "e"], ["f"]]


def test_files_that_are_embedded_must_stay(script, tmp_path):
    (tmp_path / "part-00000").mkdir()
    (tmp_path / "part-00000" / "_files.json").write_text('{"a.txt": 3, "b.txt": 4}')
    sizes = {"a.txt": 3, "b.txt": 4, "c.txt": 5}
    assert script["embedded"](tmp_path, sizes) == {"a.txt": 3, "b.txt": 4}
    with pytest.raises(SystemExit, match="a.txt is embedded in .* has another size now"):
        script["embedded"](tmp_path, sizes | {"a.txt": 2})
    with pytest.raises(SystemExit, match="b.txt is embedded in .* is not among the texts now"):
        script["embedded"](tmp_path, {"a.txt": 3})


def test_ids_of_a_column(script, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"said": "one", "key": 7}\n{"said": "two", "key": "b"}\n')
    (table,) = script["read"]({"name": ["a.jsonl"], "path": [str(tmp_path / "a.jsonl")]}, "said", "key")
    assert table.to_pydict() == {"id": ["7", "b"], "text": ["one", "two"]}
    pq.write_table(pa.table({"said": ["one"], "key": [7]}), tmp_path / "a.parquet")
    assert list(script["records"](str(tmp_path / "a.parquet"), "said", "key")) == [(7, "one")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one", "key": 1}\n[1]', r"line 2: not a JSON object with 'text' and 'key'"),
        ("a.jsonl", '{"text": "one"}', r"line 1: not a JSON object with 'text' and 'key'"),
        ("a.jsonl", '{"text": "one", "key": null}', "row 1: 'key' holds no id"),
        ("a.jsonl", '{"text": 3, "key": "k"}', "row 1: 'text' holds 3; it must be a string"),
        ("a.jsonl", '{"text": ', "line 1: not a JSON object"),
        ("a.jsonl", '{"text": "one", "key": 1}\n{"text": "caf\xe9"}', "line 2: not UTF-8"),
        ("a.parquet", None, r"has no column 'key'; it has text"),
    ],
)
def test_rows_that_are_refused(script, tmp_path, name, content, message):
    path = tmp_path / name
    if content is None:
        pq.write_table(pa.table({"text": ["one"]}), path)
    else:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        list(script["read"]({"name": [name], "path": [str(path)]}, "text", "key"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no*.txt", "--model", "m", "--output", "new"], "there is no file no*.txt"),
        (["a.csv", "--model", "m", "--output", "new"], "a.csv is none of .txt, .jsonl, .parquet"),
        (["a.txt", "--model", "m", "--output", "."], "holds something else"),
        (["a.txt", "--model", "a.txt", "--output", "new"], "--model a.txt: "),
        (["a.txt", "--output", "new"], "name the model to embed with"),
        (["--output", "new"], "name texts to embed, or an --index"),
        (["a.txt", "--model", "m", "--output", "new", "--actors", "0"], "must be at least 1; received 0"),
        (["a.txt", "--model", "m", "--output", "new", "--part-mb", "0"], "must be more than 0; received 0"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(script, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.csv").write_text("one")
    monkeypatch.setattr(sys, "argv", ["embed_with_ray.py", *arguments])
    with pytest.raises(SystemExit) as refused:
        script["main"]()
    told = capsys.readouterr().err if refused.value.code == 2 else str(refused.value)
    assert message in told and "\n" not in told.strip().rpartition("error: ")[2]
    assert not (tmp_path / "new").exists()
