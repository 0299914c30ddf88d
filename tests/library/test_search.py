"""Indexes: what is found, what is refused, and what a crash leaves."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, util

import tritern
from tritern.search import KINDS, Hit, SearchIndex, adding, embed, faiss_index, kinds, store

from .forks import run_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tiny_path):
    return tritern.patch(SentenceTransformer(tiny_path, device="cpu"), embedding_bits=16)


@pytest.fixture(scope="module")
def corpus(sentences):
    """1,200 different texts: enough to train on."""
    return [f"{text} {word}" for word in ("lo", "vu", "bal") for text in sentences]


@pytest.fixture(scope="module")
def built(model, corpus, tmp_path_factory):
    """Folder of a flat index; not to be written to."""
    folder = tmp_path_factory.mktemp("built") / "index"
    SearchIndex.build(folder, model, corpus).close()
    return folder


@pytest.fixture
def folder(built, tmp_path):
    """A copy that may be written to."""
    import shutil

    return Path(shutil.copytree(built, tmp_path / "index"))


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setitem(adding.WINDOW, "cpu", 64)


def test_finds_what_semantic_search_finds(built, model, corpus):
    queries = corpus[::100]
    with SearchIndex.open(built, model) as index:
        found = index.search(queries, k=7)
        wanted = util.semantic_search(embed(model, queries), embed(model, corpus), top_k=7)
        for hits, others in zip(found, wanted):
            assert [h.score for h in hits] == pytest.approx([o["score"] for o in others], abs=1e-5)
            assert hits[0] == Hit(hits[0].id, hits[0].score, corpus[hits[0].id])
        assert [h[0].text for h in found] == queries and len(index) == len(corpus)
        assert np.array_equal(index.vectors, embed(model, corpus).numpy())
        assert index.kind == "flat" and index.factory == "Flat" and index.gpus == 0


@pytest.mark.parametrize("kind", [*KINDS, "IVF16,PQ8", "SQ4"])
def test_every_kind_finds_exact_scores_and_is_the_same_when_opened_again(kind, folder, model, corpus):
    with SearchIndex.open(folder, model) as index:
        queries = embed(model, corpus[:60])
        exact, rows = index.search_vectors(queries, 10)
        index.reindex(kind)
        scores, found = index.search_vectors(queries, 10)
        recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(rows, found)])
        assert recall >= (0.9 if kind in KINDS and kind != "binary" else 0.6), recall
        assert np.array_equal(index.search_vectors(queries, 10, exact=True)[1], rows)
        there = found >= 0
        products = np.einsum("mkd,md->mk", index.vectors[found], queries.numpy())
        assert np.allclose(scores[there], products[there], atol=1e-6)
        assert (np.diff(scores, axis=1)[there[:, 1:]] <= 1e-6).all()
    with SearchIndex.open(folder, model) as again:
        assert again.kind == kind and (kind == "flat") == (again.bytes["faiss"] == 0)
        assert np.array_equal(again.search_vectors(queries, 10)[1], found)


def test_search_parameters_trade_recall(folder, model, corpus):
    with SearchIndex.open(folder, model) as index:
        with pytest.raises(tritern.TriternError, match="nothing to set"):
            index.set_search_parameters("nprobe=1")
        index.reindex("IVF32,Flat", rescore=1)
        queries = embed(model, corpus[:100])
        exact = index.search_vectors(queries, 10, exact=True)[1]

        def recall(parameters):
            index.set_search_parameters(parameters)
            found = index.search_vectors(queries, 10)[1]
            return np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(exact, found)])

        assert recall("nprobe=1") < recall("nprobe=32") == 1
        with pytest.raises(tritern.TriternError, match=r"no parameters 'efSearch=3' \(.*nprobe=N"):
            index.set_search_parameters("efSearch=3")


def test_by_default_lists_are_looked_into_that_find_nearly_all():
    probed = {
        n: kinds.ivf(kinds.new_index(f"IVF{n},Flat", 8, "cosine")).nprobe for n in (1, 4, 16, 128, 2048)
    }
    assert probed == {1: 1, 4: 4, 16: 16, 128: 45, 2048: 181}


def test_few_texts_are_searched_exactly(model, corpus):
    with SearchIndex.build(None, model, corpus[:50], kind="ivf-pq") as index:
        assert index.factory == "Flat"
        assert [h.id for h in index.search([corpus[7]], k=100)[0]][0] == 7
        assert len(index.search([corpus[7]], k=100)[0]) == 50
        index.add(corpus[50:])
        assert index.factory.startswith("IVF") and index.search([corpus[1100]], 1)[0][0].id == 1100
        folder = index.folder
    assert not folder.exists()


def test_trained_indexes_are_trained_anew_when_outgrown(model, corpus, monkeypatch):
    monkeypatch.setattr(kinds, "MIN_ROWS", 100)
    with SearchIndex.build(None, model, corpus[:200], kind="ivf-flat") as index:
        assert index.factory == "IVF4,Flat"
        index.add(corpus[200:700])
        assert index.factory == "IVF4,Flat"
        index.add(corpus[700:])
        assert index.factory == "IVF16,Flat"
        assert [h[0].text for h in index.search(corpus[::50], 1)] == corpus[::50]


def test_dot_products_and_distances(tiny_path, corpus):
    for name in ("dot", "euclidean"):
        model = SentenceTransformer(tiny_path, device="cpu", similarity_fn_name=name)
        vectors = embed(model, corpus)
        exact = vectors[:20].double() @ vectors.double().T
        exact = exact if name == "dot" else -torch.cdist(vectors[:20].double(), vectors.double())
        wanted = exact.topk(5)
        for kind in ("flat", "hnsw", "int8"):
            with SearchIndex.build(None, model, corpus, kind=kind) as index:
                scores, rows = index.search_vectors(vectors[:20], 5)
                assert np.mean(rows == wanted.indices.numpy()) > 0.95
                assert scores == pytest.approx(wanted.values.numpy(), abs=2e-3, rel=1e-3)
        if name == "dot":
            with pytest.raises(tritern.TriternError, match="received 'LSH' for vectors of width 32"):
                SearchIndex.build(None, model, corpus, kind="binary")
    model.similarity_fn_name = "manhattan"
    with pytest.raises(tritern.TriternError, match="received 'manhattan'"):
        SearchIndex.build(None, model, corpus)


@pytest.mark.parametrize("kind", ["flat", "ivf-pq", "hnsw", "binary"])
def test_removed_texts_are_not_found(kind, folder, model, corpus):
    with SearchIndex.open(folder, model) as index:
        index.reindex(kind)
        near = [h.id for h in index.search([corpus[5]], k=30, exact=True)[0]]
        index.remove(near[:20])
        found = [h.id for h in index.search([corpus[5]], k=10)[0]]
        assert len(found) == 10 and not set(found) & set(near[:20])
        assert index.search([corpus[5]], k=10, exact=True)[0][0].id == near[20]
        with pytest.raises(tritern.TriternError, match="1 of the ids are not in the index, such as 5"):
            index.remove([near[25], 5])
        assert len(index) == len(corpus) - 20
        assert near[25] in [h.id for h in index.search([corpus[5]], 10, exact=True)[0]]
    with SearchIndex.open(folder, model) as index:
        before = index.search([corpus[5]], k=2000, exact=True)[0]
        assert len(before) == len(corpus) - 20
        size = index.bytes["vectors"]
        index.compact()
        index.verify()
        assert index.bytes["vectors"] == size - 20 * 32 * 4 and len(list(folder.glob("vectors*"))) == 1
        assert index.search([corpus[5]], k=2000, exact=True)[0] == before
        index.add(["zal ter mon"])
        assert index.search(["zal ter mon"], 1)[0][0].id == len(corpus)  # numbers are not used again
        index.add([corpus[5]], ids=[5])  # free again
        assert index.search([corpus[5]], k=1)[0][0].id == 5
        index.remove([id for id, _ in index.items()])
        assert index.search([corpus[5]], k=3) == [[]]


def test_ids_are_ints_or_strings_and_unique(folder, model, corpus, small_windows):
    with SearchIndex.open(folder, model) as index:
        index.add(["lo vu", "bal zal", "mon"], ids=["a/b.md:3", np.int64(2**40), "7"])
        index.add(["von ter"], ids=[-1])
        assert [h[0].id for h in index.search(["lo vu", "bal zal", "mon", "von ter"], 1)] == [
            *("a/b.md:3", 2**40, "7", -1)
        ]
        rows = len(index)
        for ids, message in (
            ([0, 1], "id 0 is in the index already"),
            (["x", "x"], "ids must be unique; 'x' occurs twice"),
            ([1.5, 2], "ids must be 64-bit ints or strings without NUL; received 1.5, float"),
            ([True, 2], "received True, bool"),
            ([2**63, 1], "ids must be 64-bit ints"),
            (["\udcff", 1], "ids must be 64-bit ints or strings"),
            (["a\0b", 1], "ids must be 64-bit ints or strings without NUL"),
            (["x", "y", "z"], "after 2 texts there are more ids"),
            (["x"], "after 1 ids there are more texts"),
        ):
            with pytest.raises(tritern.TriternError, match=message):
                index.add(["one", "two"], ids)
            assert len(index) == rows
        with pytest.raises(tritern.TriternError, match="'n0' occurs twice"):  # in a window before
            index.add(corpus[:200], ids=[f"n{i % 190}" for i in range(197)] + ["n3", "o", "p"])


def test_vectors_made_before(folder, model, corpus):
    with SearchIndex.open(folder, model) as index:
        texts = [f"{text} zal" for text in corpus[:100]]
        vectors = embed(model, texts, task="document").numpy()
        index.add(texts[:50], vectors=vectors[:50])
        index.add(texts[50:], vectors=3 * vectors[50:])  # compared by cosine: lengths do not count
        assert [h[0].text for h in index.search(texts, 1)] == texts
        for wrong, message in (
            (vectors[:4], r"vectors must have shape \[5, width\], one row per text; received \[4, 32\]"),
            (vectors[:6], r"vectors must have shape \[5, width\], one row per text; received \[6, 32\]"),
            (vectors[0], r"vectors must have shape \[5, width\], one row per text; received \[32\]"),
            (vectors[:5] * np.nan, "vectors: the vector number 0 holds NaN"),
            (vectors[:5] * np.arange(5)[:, None], "vectors: the vector number 0 is all zeros"),
            (vectors[:5].astype(str), "vectors must be a NumPy array of numbers; received an array of <U"),
            (vectors[:5].tolist(), "vectors must be a NumPy array of numbers; received list"),
            ({"a": vectors[:5]}, "vectors must be a NumPy array of numbers; received dict"),
            (vectors[:5, :8], r"vectors must be \[5, 32\]; received \[5, 8\]"),
        ):
            with pytest.raises(tritern.TriternError, match=message):
                index.add([f"{t} x" for t in texts[:5]], vectors=wrong)
        assert len(index) == len(corpus) + 100


def test_another_models_index_is_refused(built, tiny_path, model):
    full = SentenceTransformer(tiny_path, device="cpu")
    with pytest.raises(tritern.TriternError, match=r"was built with another model \(.*mean cosine 0"):
        SearchIndex.open(built, full)
    with pytest.raises(tritern.TriternError, match="vectors of another width"):
        SearchIndex.open(built, SentenceTransformer(tiny_path, device="cpu", truncate_dim=8))
    other = tritern.patch(
        SentenceTransformer(tiny_path, device="cpu", prompts={"query": "lo vu bal zal mon"})
    )
    with pytest.raises(tritern.TriternError, match="another model"):  # of the same weights, with a prompt
        SearchIndex.open(built, other)
    half = tritern.patch(SentenceTransformer(tiny_path, device="cpu")).bfloat16()
    SearchIndex.open(built, half).close()  # in 16 bits it is the same model


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "texts is empty"),
        ("one text", "received one string"),
        (["good", b"bytes"], "number 1 is bytes"),
        (["good", ""], "texts: number 1 is empty"),
        (["\ud800"], "an invalid character"),
    ],
)
def test_bad_texts(model, tmp_path, texts, message):
    with pytest.raises(tritern.TriternError, match=message):
        SearchIndex.build(tmp_path / "new", model, texts)
    assert texts or not (tmp_path / "new").exists()


def test_other_bad_input(built, model, corpus, tmp_path):
    for settings, message in (
        ({"kind": "flatt"}, "kind must be one of flat, .*received 'flatt'"),
        ({"kind": "PQ7"}, "received 'PQ7' for vectors of width 32"),
        ({"rescore": 0}, "rescore must be from 1 to 1000000; received 0"),
        ({"gpus": 1}, "gpus must be 0 to 0, all that faiss sees; received 1"),
    ):
        with pytest.raises(tritern.TriternError, match=message):
            SearchIndex.build(tmp_path / "new", model, corpus[:3], **settings)
    (tmp_path / "file").write_text("")
    with pytest.raises(tritern.TriternError, match="cannot be made"):
        SearchIndex.build(tmp_path / "file", model, corpus[:3])
    with pytest.raises(tritern.TriternError, match="holds no index"):
        SearchIndex.open(tmp_path, model)
    with SearchIndex.open(built, model) as index:
        for k in (0, -1):
            with pytest.raises(tritern.TriternError, match=f"k must be at least 1; received {k}"):
                index.search(["lo"], k)
        with pytest.raises(tritern.TriternError, match="queries: number 1 is empty"):
            index.search(["lo", " "])
        with pytest.raises(tritern.TriternError, match=r"\[queries, 32\]; received \[3, 8\]"):
            index.search_vectors(torch.zeros(3, 8))
        assert index.search([]) == []


def test_a_kind_that_cannot_be_trained_keeps_the_vectors(folder, model, corpus):
    with SearchIndex.open(folder, model) as index:
        with pytest.raises(tritern.TriternError, match="cannot be trained on 1,200 vectors"):
            index.reindex("IVF5000,Flat")
        assert index.search([corpus[3]], 1)[0][0].id == 3
    with SearchIndex.open(folder, model) as index:
        assert index.factory == "Flat" and index.search([corpus[3]], 1)[0][0].id == 3
        index.reindex("ivf-flat")
        with pytest.raises(tritern.TriternError, match="received 'flatt'"):
            index.reindex("flatt")
        assert index.kind == "ivf-flat" and index.search([corpus[3]], 1)[0][0].id == 3


def test_faiss_missing(built, model):
    code = f"""
        import sys; sys.modules["faiss"] = None
        import tritern
        from tritern.search import SearchIndex
        from sentence_transformers import SentenceTransformer
        try:
            SearchIndex.open({str(built)!r}, SentenceTransformer({model[0].auto_model.name_or_path!r}))
        except tritern.TriternError as error:
            print(error)
    """
    done = run_script(textwrap.dedent(code))
    assert "faiss is missing: pip install 'tritern[search]'" in done.stdout, done.stderr[-2000:]


def contents(folder):
    kept = store.Store(folder)
    kept.verify()
    files = [kept.vectors_file, folder / f"index-{kept.version}.faiss"]
    return list(kept.items()), [file.read_bytes() for file in files if file.exists()]


def test_an_interrupted_build_goes_on(model, corpus, tmp_path, small_windows):
    def broken(at):
        yield from corpus[:at]
        raise KeyError("the source is gone")

    SearchIndex.build(tmp_path / "whole", model, corpus, kind="ivf-flat").close()
    for at in (0, 10, 500, 1150):
        with pytest.raises(KeyError):
            SearchIndex.build(tmp_path / "parts", model, broken(at), kind="ivf-flat")
        if at:
            assert store.Store(tmp_path / "parts").rows == at // 64 * 64
    index = SearchIndex.build(tmp_path / "parts", model, iter(corpus), kind="ivf-flat")
    index.close()
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    SearchIndex.build(tmp_path / "parts", model, corpus, kind="ivf-flat").close()  # nothing is left to do
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    for other, message in (
        (corpus[:600] + ["other"], "its text number 600 is 600: .*, where the corpus has 600: 'other'"),
        (corpus[:1100], "its text number 1100 is 1100: .* where the corpus ends"),
    ):
        with pytest.raises(tritern.TriternError, match=message):
            SearchIndex.build(tmp_path / "parts", model, other, kind="ivf-flat")
    with pytest.raises(tritern.TriternError, match="was built with kind 'ivf-flat'.*received 'hnsw'"):
        SearchIndex.build(tmp_path / "parts", model, corpus, kind="hnsw")


KILLED = """
import os, sys, torch, tritern
from sentence_transformers import SentenceTransformer
from tritern.search import SearchIndex, adding, store
torch.set_num_threads(1)
adding.WINDOW["cpu"] = 64
corpus = open("corpus").read().splitlines()
for line in sys.stdin:  # each build in a process of its own, forked here before any other work
    where, count = line.split()
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
count, calls = int(count), 0
def killed_at(plain):
    def function(*args, **kwargs):
        global calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), 9)
        return plain(*args, **kwargs)
    return function
if where == "fsync":  # between the vectors and their row
    os.fsync = killed_at(os.fsync)
elif where == "write":  # before the vectors
    store._bytes = killed_at(store._bytes)
elif where == "commit":
    store.Store._set = killed_at(store.Store._set)
model = tritern.patch(SentenceTransformer(sys.argv[1], device="cpu"), embedding_bits=16)
SearchIndex.build("index", model, corpus, kind="hnsw").close()
"""


def test_a_killed_build_goes_on(tiny_path, model, corpus, tmp_path):
    (tmp_path / "build.py").write_text(KILLED)
    (tmp_path / "corpus").write_text("\n".join(corpus[:600]))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}

    command = [sys.executable, "build.py", tiny_path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as builder:

        def build(where, count):
            builder.stdin.write(f"{where} {count}\n")
            builder.stdin.flush()
            return int(builder.stdout.readline()), store.Store(tmp_path / "index").rows

        assert build("commit", 6) == (-signal.SIGKILL, 192)
        assert build("fsync", 3) == (-signal.SIGKILL, 256)
        assert (tmp_path / "index/vectors-0.f32").stat().st_size == 320 * 32 * 4  # the last 64 of no row yet
        assert build("write", 1) == (-signal.SIGKILL, 256)
        assert build("never", 0) == (0, 600)
    with SearchIndex.open(tmp_path / "index", model) as index:
        index.verify()
        assert np.array_equal(index.vectors, embed(model, corpus[:600]).numpy())
        assert list(index.items()) == list(enumerate(corpus[:600]))
        assert [h[0].id for h in index.search(corpus[:600:20], 1)] == list(range(0, 600, 20))


def test_a_full_disk_loses_nothing(model, corpus, folder, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    index = SearchIndex.open(folder, model)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(
            tritern.TriternError, match="No space left.*Rows written before are kept: fix this and rerun"
        ):
            index.add(["lo vu bal"])
    assert len(index) == len(corpus)
    index.add(["lo vu bal"])
    assert index.search(["lo vu bal"], 1)[0][0].id == len(corpus)
    with monkeypatch.context() as patched:
        patched.setattr(kinds.os, "fsync", full)
        with pytest.raises(tritern.TriternError, match="cannot be written.*this file is made from them"):
            index.reindex("hnsw")
    index.close()
    assert not [f for f in folder.iterdir() if "faiss." in f.name]
    with SearchIndex.open(folder, model) as again:
        again.verify()
        assert again.kind == "hnsw" and again.search(["lo vu bal"], 1)[0][0].id == len(corpus)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_faiss_meeting_a_full_disk(folder, model):
    with SearchIndex.open(folder, model) as index:
        index.reindex("hnsw")
        target = folder / f"full.faiss.{os.getpid()}"
        target.symlink_to("/dev/full")
        with pytest.raises(tritern.TriternError, match="full.faiss cannot be written"):
            kinds.save(index._faiss._index, folder / "full.faiss", on_gpu=False)
        assert not target.exists()


def test_damaged_files(folder, model, corpus):
    with SearchIndex.open(folder, model) as index:
        index.reindex("ivf-flat")
    with open(folder / "vectors-0.f32", "r+b") as file:
        file.seek(10_000)
        file.write(b"\xff")
    with SearchIndex.open(folder, model) as index:
        with pytest.raises(tritern.CheckpointError, match="rows 0 to 1199 are damaged"):
            index.verify()
    (folder / "index-1.faiss").write_bytes((folder / "index-1.faiss").read_bytes()[:1000])
    with SearchIndex.open(folder, model) as index:  # made anew from the vectors
        assert index.search([corpus[900]], 1)[0][0].id == 900
    os.truncate(folder / "vectors-0.f32", 1000)
    with pytest.raises(tritern.CheckpointError, match="holds 1,000 bytes and must hold 153,600"):
        SearchIndex.open(folder, model)
    (folder / "rows.sqlite").write_bytes(b"no database at all, but long enough to look at" * 100)
    with pytest.raises(tritern.CheckpointError, match="rows.sqlite"):
        SearchIndex.open(folder, model)


def test_a_newer_format_is_refused(folder, model):
    kept = store.Store(folder)
    kept.set(format=2)
    kept.close()
    with pytest.raises(tritern.CheckpointError, match="has format 2, and this version of tritern reads 1"):
        SearchIndex.open(folder, model)


def test_one_process_writes_at_a_time(folder, model):
    first, second = SearchIndex.open(folder, model), SearchIndex.open(folder, model)
    with first._store.writing():
        with pytest.raises(tritern.TriternError, match="another process is writing"):
            second.add(["lo"])
    rows = len(first)
    first.add(["lo vu bal"])
    second.add(["zal mon"])  # takes in what the first has added
    assert len(second) == rows + 2 and second.search(["lo vu bal"], 1)[0][0].text == "lo vu bal"
    first.remove([0])
    first.compact()
    with pytest.raises(tritern.TriternError, match="was compacted by another process: open it again"):
        second.search(["lo vu bal"], 1)
    first.close(), second.close()


@pytest.mark.parametrize("change", ["compact", "reindex"])
def test_what_another_process_changes_is_taken_in(change, folder, model, corpus):
    first = SearchIndex.open(folder, model)
    first.reindex("hnsw")
    with SearchIndex.open(folder, model) as second:
        second.remove(range(100))
        second.compact() if change == "compact" else second.reindex("ivf-flat")
    first.add([f"{text} x" for text in corpus[:300]])
    queries = embed(model, corpus[100:300:5])
    exact, found = (first.search_vectors(queries, 5, exact=e)[1] for e in (True, False))
    assert np.mean(exact == found) > 0.95 and first.kind == ("hnsw" if change == "compact" else "ivf-flat")
    first.close()
    with SearchIndex.open(folder, model) as again:
        assert np.mean(exact == again.search_vectors(queries, 5)[1]) > 0.95
        assert len(list(folder.glob("index-*"))) == 1 and len(again) == len(corpus) + 200


def test_searching_goes_on_while_the_index_changes(folder, model, corpus):
    with SearchIndex.open(folder, model) as index:
        stop, found, failures = threading.Event(), [], []

        def search():
            while not stop.is_set():
                try:
                    found.append([h.text for h in index.search([corpus[700]], 1)[0]])
                except Exception as error:
                    failures.append(error)

        threads = [threading.Thread(target=search) for _ in range(2)]
        for thread in threads:
            thread.start()
        for n, kind in enumerate(("hnsw", "ivf-flat", "binary", "flat")):
            index.remove(range(100 * n, 100 * n + 100))
            index.reindex(kind)
            index.compact()
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures and len(found) > 10
        assert all(texts == [corpus[700]] for texts in found)


def test_opening_to_search_writes_nothing_while_another_writes(folder, model, corpus):
    first = SearchIndex.open(folder, model)
    first.reindex("hnsw")
    file = folder / f"index-{first._store.version}.faiss"
    file.unlink()
    with first._store.writing():
        with SearchIndex.open(folder, model) as second:
            assert second.search([corpus[9]], 1)[0][0].id == 9 and not file.exists()
    first.close()


def test_what_killed_writers_leave_is_deleted(folder, model):
    left = [folder / "index-0.faiss.123", folder / "vectors-1.f32", folder / "index-7.faiss"]
    for file in left:
        file.write_bytes(b"left")
    SearchIndex.open(folder, model).close()
    assert not any(file.exists() for file in left) and (folder / "vectors-0.f32").exists()


def test_an_interrupted_look_up_leaves_no_transaction(folder, model, monkeypatch):
    with SearchIndex.open(folder, model) as index:
        with monkeypatch.context() as patched:
            patched.setattr(json, "dumps", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                index.search(["lo"], 1)
        index.add(["lo vu bal"])
        assert index.search(["lo vu bal"], 1)[0][0].text == "lo vu bal"
    with pytest.raises(tritern.TriternError, match="cannot be used .*closed.*open it again"):
        index.search(["lo"], 1)


def test_changed_texts_are_noticed(folder, model):
    import sqlite3

    database = sqlite3.connect(folder / "rows.sqlite")
    with database:
        database.execute("UPDATE rows SET text = text || 'x' WHERE row = 17")
    database.close()
    with SearchIndex.open(folder, model) as index:
        with pytest.raises(tritern.CheckpointError, match="1 texts are damaged, .* id 17"):
            index.verify()


def test_several_threads_search_while_one_adds(folder, model, corpus):
    with SearchIndex.open(folder, model) as index:
        index.reindex("hnsw")
        wrong = []

        def search(start):
            for i in range(start, start + 200, 20):
                if index.search([corpus[i]], 1)[0][0].id != i:
                    wrong.append(i)

        threads = [threading.Thread(target=search, args=(200 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for n in range(5):
            index.add([f"{text} {n}" for text in corpus[:40]])
        for thread in threads:
            thread.join()
        assert not wrong and len(index) == len(corpus) + 200


def test_saving_now_and_then(model, corpus, tmp_path, small_windows, monkeypatch):
    monkeypatch.setattr(faiss_index, "SAVE_SECONDS", 0)
    monkeypatch.setattr(faiss_index, "SAVING_SHARE", float("inf"))
    saved, plain = [], kinds.save
    monkeypatch.setattr(kinds, "save", lambda i, f, on_gpu: (saved.append(i.ntotal), plain(i, f, on_gpu)))
    SearchIndex.build(tmp_path / "index", model, corpus[:300], kind="hnsw").close()
    assert saved == [0, 64, 128, 192, 256, 300]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.on_gpu])
def test_kinds_on_a_gpu(kind, tiny_path, corpus):
    faiss = pytest.importorskip("faiss", reason="needs faiss-gpu")
    if not getattr(faiss, "get_num_gpus", lambda: 0)():
        pytest.skip("needs faiss-gpu")
    model = tritern.patch(SentenceTransformer(tiny_path, device="cuda"))
    queries = embed(model, corpus[:60])
    with SearchIndex.build(None, model, corpus, kind=kind) as index:
        assert index.gpus
        exact, found = (index.search_vectors(queries, 10, exact=e)[1] for e in (True, False))
        assert np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(exact, found)]) > 0.85


def test_clones_on_gpus_are_renewed(folder, model, corpus, monkeypatch):
    """faiss-cpu stands in for faiss-gpu: a clone of the index is searched, made anew after each change."""
    import faiss

    made = []
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2, raising=False)
    monkeypatch.setattr(kinds, "to_gpus", lambda i, n: (made.append(n), faiss.clone_index(i))[1])
    with SearchIndex.open(folder, model, gpus=2) as index:
        assert index.gpus == 2 and index.search([corpus[3]], 1)[0][0].id == 3
        index.search([corpus[4]], 1)
        assert made == [2]
        index.add(["lo vu"])
        assert index.search(["lo vu"], 1)[0][0].text == "lo vu" and made == [2, 2]
        with pytest.raises(tritern.TriternError, match="gpus must be 0 for kind 'hnsw'"):
            index.reindex("hnsw")
        index.reindex("ivf-flat")
        index.set_search_parameters("nprobe=1")
        assert index.search([corpus[4]], 1)[0][0].id == 4 and made == [2, 2, 2]
