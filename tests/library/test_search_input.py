"""What an index takes: ids, settings, models. What it refuses, it refuses before anything is written."""

import json
import logging
import os
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import tritern
from tritern import TriternError
from tritern.search import SearchIndex, adding, embed, kinds, store

ROOT = Path(__file__).parents[2]
TEXTS = ["lo vu", "bal zal", "mon ter"]


@pytest.fixture(scope="module")
def model(tiny_path):
    return SentenceTransformer(tiny_path, device="cpu")


@pytest.fixture
def folder(model, tmp_path):
    """Of three texts with the ids "1", "2" and "12"."""
    SearchIndex.build(tmp_path / "index", model, TEXTS, ids=["1", "2", "12"]).close()
    return tmp_path / "index"


@pytest.fixture
def index(model, folder):
    with SearchIndex.open(folder, model) as opened:
        yield opened


def content(folder):
    """All that is stored: settings, rows, vectors."""
    database = sqlite3.connect(folder / "rows.sqlite")
    try:
        tables = {name: database.execute(f"SELECT * FROM {name}").fetchall() for name in ("settings", "rows")}
    finally:
        database.close()
    return tables, {file.name: file.read_bytes() for file in folder.glob("vectors-*")}


# ---------------------------------------------------------------- iterables

WHOLE = ["12", b"12", bytearray(b"12"), {"1": 0, "2": 0}, 1, None, np.array("12")]
"""What must not be taken apart, and what cannot be."""


@pytest.mark.parametrize("ids", WHOLE)
def test_ids_to_remove_are_not_taken_apart(index, ids):
    with pytest.raises(TriternError, match="ids must be a list or another iterable; received"):
        index.remove(ids)
    assert [id for id, _ in index.items()] == ["1", "2", "12"]
    index.remove(["12"])
    assert [id for id, _ in index.items()] == ["1", "2"]


@pytest.mark.parametrize("ids", [x for x in WHOLE if x is not None])
def test_ids_are_not_taken_apart(index, model, tmp_path, ids):
    message = "ids must be a list or another iterable; received"
    for settings in ({}, {"vectors": np.ones((2, 32), np.float32)}):
        with pytest.raises(TriternError, match=message):
            index.add(["one", "two"], ids=ids, **settings)
    with pytest.raises(TriternError, match=message):
        SearchIndex.build(tmp_path / "new", model, ["one", "two"], ids=ids)
    assert len(index) == 3 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("texts", WHOLE)
def test_texts_are_not_taken_apart(index, model, tmp_path, texts):
    message = "texts must be a list or another iterable; received"
    for settings in ({}, {"ids": ["p", "q"]}, {"vectors": np.ones((2, 32), np.float32)}):
        with pytest.raises(TriternError, match=message):
            index.add(texts, **settings)
    with pytest.raises(TriternError, match=message):
        SearchIndex.build(tmp_path / "new", model, texts)
    assert len(index) == 3 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("queries", [x for x in WHOLE if not isinstance(x, str)])
def test_queries_are_not_taken_apart(index, model, queries):
    with pytest.raises(TriternError, match="queries must be a list or another iterable; received"):
        index.search(queries)
    with pytest.raises(TriternError, match="texts must be a list or another iterable; received"):
        embed(model, queries)


def test_one_string_is_one_query(index, model):
    assert index.search("lo vu", 2) == index.search(["lo vu"], 2)
    assert torch.equal(embed(model, "lo vu"), embed(model, ["lo vu"]))


def test_windows_are_not_taken_apart(model):
    from tritern.search.embed import embed_each

    for windows, name in (("ab", "windows"), (["ab"], "windows: number 0"), ({"ab": 1}, "windows")):
        with pytest.raises(TriternError, match=f"{name} must be a list or another iterable; received"):
            list(embed_each(model, windows))


@pytest.mark.parametrize(
    "texts, ids, message",
    [
        (["one", None], None, "texts must be strings; number 1 is NoneType"),
        (["one", " "], None, "texts: number 1 is empty"),
        (iter([None]), None, "texts must be strings; number 0 is NoneType"),
        (["one", "two"], [1, 2.0], "ids must be 64-bit ints or strings without NUL; received 2.0, float"),
        (["one", "two"], ["x", "x"], "ids must be unique; 'x' occurs twice"),
        (["one", "two"], ["x"], "after 1 ids there are more texts"),
        (["one"], ["x", "y"], "after 1 texts there are more ids"),
    ],
)
def test_a_bad_corpus_leaves_no_folder(model, tmp_path, texts, ids, message):
    with pytest.raises(TriternError, match=message):
        SearchIndex.build(tmp_path / "new", model, texts, ids)
    assert not (tmp_path / "new").exists()


def test_a_set_has_no_order_to_pair_ids_by(index):
    for texts, ids in ((["a", "b"], {"x", "y"}), ({"a", "b"}, ["x", "y"]), (["a"], frozenset("x"))):
        with pytest.raises(TriternError, match="must be in order, .*; received a set: pass a list"):
            index.add(texts, ids=ids)
    assert len(index) == 3
    index.add({"lo", "vu"})
    index.remove({"1", "2"})


def test_texts_are_numbered_as_they_were_given(index):
    with pytest.raises(TriternError, match="texts: number 1 is empty"):
        index.add(iter(["one", " "]))


# ---------------------------------------------------------------- default ids


def ids_of(index):
    return [id for id, _ in index.items()]


def test_default_ids_leave_out_those_in_use(model):
    with SearchIndex.build(None, model, ["a b", "c d"], ids=[2, 3]) as index:
        index.add(["e f"])
        index.add(["g h", "i j"])
        assert ids_of(index) == [2, 3, 4, 5, 6]
        index.remove([6])
        index.add(["k l"])  # a number is not given twice
        assert ids_of(index) == [2, 3, 4, 5, 7]
        index.add(["m n"], vectors=np.ones((1, 32), np.float32))
        index.add(["o p"], ids=[10])
        index.add(["q r", "s t", "u v"])
        assert ids_of(index)[5:] == [8, 10, 11, 12, 13]


def test_default_ids_leave_out_those_far_apart_in_many_windows(model, sentences, monkeypatch):
    monkeypatch.setitem(adding.WINDOW, "cpu", 16)
    own = [3, 20, 21, 1500, -1, 2**63 - 1, "5"]
    with SearchIndex.build(None, model, sentences[: len(own)], ids=own) as index:
        index.add(sentences[:50])
        assert ids_of(index)[len(own) :] == [n for n in range(7, 100) if n not in own][:50]
        assert index.search(sentences[49:50], 60, exact=True)[0]


def test_a_folder_whose_default_ids_were_refused_takes_texts(model, folder):
    database = sqlite3.connect(folder / "rows.sqlite")
    with database:  # as it was when ids of one's own had the next numbers
        database.execute("UPDATE rows SET id = 3 WHERE id = '1'")
        database.execute("UPDATE rows SET id = 4 WHERE id = '2'")
    database.close()
    with SearchIndex.open(folder, model) as index:
        index.add(["one"])
        assert ids_of(index) == [3, 4, "12", 5]


def test_an_interrupted_build_keeps_its_default_ids(model, sentences, tmp_path, monkeypatch):
    monkeypatch.setitem(adding.WINDOW, "cpu", 16)

    def broken():
        yield from sentences[:40]
        raise KeyError("the source is gone")

    with pytest.raises(KeyError):
        SearchIndex.build(tmp_path / "index", model, broken())
    with SearchIndex.build(tmp_path / "index", model, sentences[:60]) as index:
        assert ids_of(index) == list(range(60))
        index.add(["one"])
        assert ids_of(index)[60:] == [60]


# ---------------------------------------------------------------- settings

BAD = [
    *(({"kind": kind}, "kind must be one of flat, ") for kind in (None, 3, "", " ", b"flat", ["flat"], "é")),
    *(
        ({name: value}, f"{name} must be a whole number, .*; received")
        for name in ("rescore", "tokens_per_batch", "gpus")
        for value in (2.0, "2", True, np.float32(2), [2])
    ),
    *(
        ({"kind": kind}, f"kind must not be '{kind}'")
        for kind in ("IDMap,Flat", "IDMap2,HNSW32", "NSG32,Flat")
    ),
    ({"rescore": 0}, "rescore must be from 1 to 1000000; received 0"),
    ({"rescore": 2**70}, "rescore must be from 1 to 1000000; received 1"),
    ({"tokens_per_batch": 0}, "tokens_per_batch must be at least 1; received 0"),
    ({"gpus": -1}, "gpus must be at least 0; received -1"),
    ({"gpus": 1}, "gpus must be 0 to 0, all that faiss sees; received 1"),
    ({"show_progress_bar": "no"}, "show_progress_bar must be True or False; received 'no'"),
]


@pytest.mark.parametrize("settings, message", BAD)
def test_bad_settings_write_nothing(model, tmp_path, folder, settings, message):
    with pytest.raises(TriternError, match=message):
        SearchIndex.build(tmp_path / "new", model, TEXTS, **settings)
    assert not (tmp_path / "new").exists()
    before = content(folder)
    if settings.keys() & {"tokens_per_batch", "gpus"}:
        with pytest.raises(TriternError, match=message):
            SearchIndex.open(folder, model, **settings)
    with SearchIndex.open(folder, model) as index:
        if settings.keys() & {"kind", "rescore"}:
            with pytest.raises(TriternError, match=message):
                index.reindex(**{"kind": "hnsw", **settings})
        if "show_progress_bar" in settings:
            with pytest.raises(TriternError, match=message):
                index.add(["one"], **settings)
        assert index.kind == "flat" and index.rescore == 1
    assert content(folder) == before


def test_numpys_integers_are_stored_as_ints(model, folder, tmp_path):
    with SearchIndex.open(folder, model, gpus=np.int64(0), tokens_per_batch=np.int64(64)) as index:
        index.reindex("hnsw", rescore=np.int64(2))
        assert index.search(["lo vu"], k=np.int64(2)) == index.search(["lo vu"], k=2)
        assert index.tokens_per_batch == 64 and type(index.tokens_per_batch) is int
    with SearchIndex.open(folder, model) as index:
        assert (index.kind, index.rescore) == ("hnsw", 2) and type(index.rescore) is int
    SearchIndex.build(tmp_path / "new", model, TEXTS, kind="int8", rescore=np.uint8(3)).close()
    with SearchIndex.build(tmp_path / "new", model, TEXTS, kind="int8", rescore=3) as index:
        assert index.rescore == 3


@pytest.mark.parametrize("k", [2.0, "2", True, None, np.float32(2)])
def test_k_is_a_whole_number(index, model, k):
    for call, queries in ((index.search, TEXTS), (index.search_vectors, embed(model, TEXTS))):
        with pytest.raises(TriternError, match="k must be a whole number, at least 1; received"):
            call(queries, k)


@pytest.mark.parametrize("exact", ["False", "", 0, 1, None])
def test_exact_is_true_or_false(index, model, exact):
    for call, queries in ((index.search, TEXTS), (index.search_vectors, embed(model, TEXTS))):
        with pytest.raises(TriternError, match="exact must be True or False; received"):
            call(queries, exact=exact)


@pytest.mark.parametrize(
    "name, value", [("rescore", value) for value in (np.int64(2).tobytes(), "2", 2.5, 0)] + [("kind", 3)]
)
def test_a_bad_setting_that_is_stored_is_named_and_mended(model, folder, caplog, name, value):
    with SearchIndex.open(folder, model) as index:
        index.reindex("hnsw")
    kept = store.Store(folder)
    kept.set(**{name: value})
    kept.close()
    with pytest.raises(TriternError, match="was built with kind .*open this one and reindex it"):
        SearchIndex.build(folder, model, TEXTS, ids=["1", "2", "12"], kind="hnsw")
    with caplog.at_level(logging.WARNING), SearchIndex.open(folder, model) as index:
        assert f"wrong: {name} must be" in caplog.text and "index.reindex(kind, rescore=...)" in caplog.text
        assert index.kind == index.factory.lower() == "flat" and repr(index)
        assert index.search(["bal zal"], 1)[0][0].id == "2"
        index.reindex("hnsw", rescore=2)
    caplog.clear()
    with SearchIndex.open(folder, model) as index:
        assert (index.kind, index.rescore, caplog.text) == ("hnsw", 2, "")
        assert index.search(["bal zal"], 1)[0][0].id == "2"


@pytest.mark.parametrize(
    "name, value", [("rows", b"\3"), ("width", "32"), ("added", -1), ("probes", None), ("similarity", 1)]
)
def test_other_bad_settings_are_named(model, folder, name, value):
    database = sqlite3.connect(folder / "rows.sqlite")
    with database:
        database.execute("UPDATE settings SET value = ? WHERE name = ?", (value, name))
    database.close()
    with pytest.raises(tritern.CheckpointError, match=f"its setting '{name}' is .* and must be"):
        SearchIndex.open(folder, model)


def test_damaged_probes_are_those_of_another_model(model, folder):
    kept = store.Store(folder)
    kept.set(probes=b"12")
    kept.close()
    with pytest.raises(TriternError, match="was built with another model"):
        SearchIndex.open(folder, model)


@pytest.mark.parametrize("task", ["documents", "", 1])
def test_unknown_tasks_are_refused(model, task):
    with pytest.raises(TriternError, match="task must be None or one of 'query', 'document'; received"):
        embed(model, TEXTS, task=task)


def test_embed_checks_its_settings(model):
    for texts in ([], TEXTS, 40 * TEXTS):
        for value in (2.0, "2", True):
            with pytest.raises(TriternError, match="tokens_per_batch must be a whole number"):
                embed(model, texts, tokens_per_batch=value)
    assert torch.equal(embed(model, TEXTS, tokens_per_batch=np.int64(8)), embed(model, TEXTS))


@pytest.mark.parametrize(
    "queries, message",
    [
        ([[1.0] * 32], "queries must be an array or tensor .*received list"),
        ({"a": 1}, "queries must be an array or tensor .*received dict"),
        (np.ones(32), r"received \[32\]"),
        (np.full((1, 32), np.nan), "queries: the vector number 0 holds NaN"),
        (np.full((1, 32), "a"), "queries must be a NumPy array of numbers; received an array of <U1"),
    ],
)
def test_bad_query_vectors(index, queries, message):
    with pytest.raises(TriternError, match=message):
        index.search_vectors(queries)


def test_query_vectors_of_other_dtypes(index, model):
    queries = embed(model, TEXTS)
    rows = index.search_vectors(queries)[1]
    for other in (queries.bfloat16(), queries.double(), queries.requires_grad_(), queries.detach().numpy()):
        assert np.array_equal(index.search_vectors(other)[1], rows)


def test_vectors_made_before_keep_their_bits_whatever_torchs_default_is(index, model):
    vectors = embed(model, ["one two", "lo bal"], task="document")
    torch.set_default_dtype(torch.bfloat16)
    try:
        index.add(["one two"], vectors=vectors[:1])  # as embed gives them
        index.add(["lo bal"], vectors=vectors[1:].numpy())
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.abs(index.vectors[3:] - vectors.numpy()).max() < 1e-7


def test_parameters_are_a_string(index):
    with pytest.raises(TriternError, match="parameters must be a string such as 'nprobe=16'; received 16"):
        index.set_search_parameters(16)


@pytest.mark.parametrize("value", ["0", "-1", "", "abc", "1.5"])
def test_parameters_that_find_nothing(index, value):
    index.reindex("hnsw")
    with pytest.raises(
        TriternError, match=f"efSearch must be a whole number, at least 1; received '{value}'"
    ):
        index.set_search_parameters(f"efSearch={value}")
    assert index.search("bal zal", 1)[0][0].id == "2"
    index.set_search_parameters("efSearch=16")


def test_a_kind_that_faiss_cannot_add_to_leaves_the_index_readable(model, folder, monkeypatch, caplog):
    with SearchIndex.open(folder, model) as index:
        monkeypatch.setattr(
            kinds, "new_index", lambda *_: kinds.import_faiss().index_factory(32, "IDMap,Flat")
        )
        with pytest.raises(TriternError, match=r"faiss cannot add .*add_with_ids\).*reindex them"):
            index.reindex("SQ8")
    with SearchIndex.open(folder, model) as index:
        assert "every search compares all vectors" in caplog.text
        assert index.search("bal zal", 1)[0][0].id == "2"
        monkeypatch.undo()
        index.reindex("hnsw")


# ---------------------------------------------------------------- models and folders


def test_a_model_by_its_name(tmp_path):
    with SearchIndex.build(tmp_path / "index", "minilm-l6-ternary", TEXTS) as index:
        expected = index.search(["lo vu"], 1)
    with SearchIndex.open(tmp_path / "index", "minilm-l6-ternary") as index:
        assert index.search(["lo vu"], 1) == expected and isinstance(index.model, SentenceTransformer)
    vectors = embed(tritern.load("minilm-l6-ternary"), TEXTS)
    assert torch.equal(embed("minilm-l6-ternary", TEXTS), vectors)


def test_what_is_no_model(tiny_path, model, folder, tmp_path):
    hub = str(tmp_path / "missing")
    for wrong, message in (
        (hub, "model: cannot load .*missing"),
        (3, "model must be a SentenceTransformer, or the name or folder of one; received int"),
        (None, "received NoneType"),
        (SentenceTransformer, "received the class SentenceTransformer"),
        (model[0], "received Transformer"),
    ):
        for call in (
            lambda: SearchIndex.build(tmp_path / "new", wrong, TEXTS),  # noqa: B023
            lambda: SearchIndex.open(folder, wrong),  # noqa: B023
            lambda: embed(wrong, TEXTS),  # noqa: B023
        ):
            with pytest.raises(TriternError, match=message):
                call()
    assert not (tmp_path / "new").exists()


def test_what_is_no_folder(model):
    with pytest.raises(TriternError, match="folder must be a string or a Path; received SentenceTransformer"):
        SearchIndex.build(model, model, TEXTS)
    with pytest.raises(TriternError, match="folder must be a string or a Path; received NoneType"):
        SearchIndex.open(None, model)
    with pytest.raises(TriternError, match="folder must be the name of a folder; received ''"):
        SearchIndex.build("", model, TEXTS)


def test_an_index_says_what_it_is(folder, model, tiny_path):
    index = SearchIndex.open(folder, model)
    expected = f"SearchIndex(folder={str(folder)!r}, kind='flat', texts=3, model={tiny_path!r})"
    assert repr(index) == expected
    index.close()
    assert repr(index) == expected


# ---------------------------------------------------------------- progress


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING])
def test_a_bar_is_shown_where_encode_shows_one(model, monkeypatch, level):
    of_encode, shown = [], []
    plain = adding.bar
    monkeypatch.setattr(
        adding, "bar", lambda **settings: (shown.append(not settings["disable"]), plain(**settings))[1]
    )
    monkeypatch.setattr(
        f"{SentenceTransformer.__module__}.trange",
        lambda *args, disable, **_: (of_encode.append(not disable), range(*args))[1],
    )
    logger = logging.getLogger("sentence_transformers")
    before = logger.level
    logger.setLevel(level)
    try:
        model.encode(TEXTS)
        with SearchIndex.build(None, model, TEXTS) as index:
            index.add(["one"])
            index.add(["two"], show_progress_bar=True)
            index.add(["three"], show_progress_bar=False)
    finally:
        logger.setLevel(before)
    assert of_encode == [level < logging.WARNING] and shown == [*of_encode, *of_encode, True, False]


# ---------------------------------------------------------------- without fcntl

WINDOWS = """
import fcntl, json, sys, types
from sentence_transformers import SentenceTransformer
from tritern import TriternError

def locking(number, mode, size):
    assert size == 1
    fcntl.flock(number, fcntl.LOCK_UN if mode == 0 else fcntl.LOCK_EX | fcntl.LOCK_NB)

sys.modules["msvcrt"] = types.SimpleNamespace(LK_UNLCK=0, LK_NBLCK=2, locking=locking)
sys.modules["fcntl"] = None
assert "tritern.search" not in sys.modules
from tritern.search import SearchIndex
from tritern.search.locking import locked

model = SentenceTransformer(sys.argv[1], device="cpu")
with SearchIndex.build("index", model, ["lo vu"]) as index:
    index.add(["bal zal"])
    said = []
    with index._store.writing():
        try:
            index.add(["mon"])
        except TriternError as error:
            said.append(str(error))
    index.add(["mon"])
with open("index/lock") as one, open("index/lock") as other:
    with locked(one, shared=True), locked(other, shared=True):
        pass
    with locked(one):
        try:
            with locked(other, shared=True):
                pass
        except OSError as error:
            said.append(one.tell())
print(json.dumps([len(index), *said]))
"""


def test_the_folder_is_locked_where_there_is_no_fcntl(tiny_path, tmp_path):
    """As on Windows, with a stand-in for its msvcrt."""
    (tmp_path / "windows.py").write_text(textwrap.dedent(WINDOWS))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "windows.py", tiny_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    texts, busy, position = json.loads(done.stdout)
    assert (texts, position) == (3, 0) and "another process is writing" in busy
