"""Embedding without padding: the vectors of ``encode``, whatever the texts are embedded with."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import tritern
from tritern.engine.padded import Padded
from tritern.engine.path import way_of
from tritern.search import embed
from tritern.search.embed import embed_each


@pytest.fixture(scope="module")
def ternary(tiny_path):
    return tritern.patch(SentenceTransformer(tiny_path, device="cpu"))


@pytest.fixture(scope="module")
def mixed(sentences):
    """Texts of 1 to 60 words, in no order."""
    return [" ".join(s.split()[: 1 + i % 60]) for i, s in enumerate(sentences[:300])]


def test_vectors_are_those_of_encode(tiny_path, mixed):
    model = SentenceTransformer(tiny_path, device="cpu")
    expected = model.encode(mixed, normalize_embeddings=True, convert_to_tensor=True)
    torch.testing.assert_close(embed(model, mixed), expected, atol=2e-6, rtol=0)


def test_a_text_has_the_same_vector_alone_and_among_others(ternary, mixed):
    vectors = embed(ternary, mixed)
    for i in (0, 59, 131, 299):
        assert torch.equal(embed(ternary, [mixed[i]])[0], vectors[i])
    assert torch.equal(embed(ternary, mixed, tokens_per_batch=64), vectors)
    assert torch.equal(torch.cat(list(embed_each(ternary, [mixed[:7], mixed[7:200], mixed[200:]]))), vectors)


def masks_of(monkeypatch):
    """The attention masks of all batches from now on."""
    seen, vectors = [], Padded.vectors

    def spy(self, batch):
        seen.append(batch["attention_mask"])
        return vectors(self, batch)

    monkeypatch.setattr(Padded, "vectors", spy)
    return seen


@pytest.mark.parametrize("task", [None, "query", "document"])
def test_no_batch_is_padded(ternary, mixed, monkeypatch, task):
    seen = masks_of(monkeypatch)
    embed(ternary, mixed, task=task, tokens_per_batch=256)
    assert len(seen) > 10 and all(mask.all() for mask in seen)
    assert all(len(mask) == 1 or mask.numel() <= 256 for mask in seen)


@pytest.mark.parametrize("task", [None, "query", "document"])
@pytest.mark.parametrize("count", [60, 300])  # on the calling thread and on others
def test_texts_of_one_length_share_as_few_batches_as_hold_them(ternary, mixed, monkeypatch, task, count):
    seen = masks_of(monkeypatch)
    embed(ternary, mixed[-count:], task=task)
    texts = Counter()
    for mask in seen:
        texts[mask.shape[1]] += len(mask)
    assert texts.total() == count > 2 * len(seen)
    assert len(seen) == sum(-(-n // (1024 // length)) for length, n in texts.items())


def test_left_padding_is_cut_on_the_left(tiny_path, mixed):
    model = SentenceTransformer(tiny_path, device="cpu")
    right = embed(model, mixed)
    model.tokenizer.padding_side = "left"
    # positions count from the left in BERT: without padding nothing is moved
    torch.testing.assert_close(embed(model, mixed), right, atol=2e-6, rtol=0)


def as_on_a_gpu(model, round_to, most_padding, tokens=512, chunk=64):
    """Batches with padding, which only GPUs have."""
    way = way_of(model)
    assert isinstance(way, Padded)
    way.round_to, way.most_padding, way.tokens, way.chunk = round_to, most_padding, tokens, chunk
    return way


def test_left_padding_is_no_more_than_the_longest_needs(tiny_path, mixed):
    model = SentenceTransformer(tiny_path, device="cpu")
    model.tokenizer.padding_side = "left"
    way = as_on_a_gpu(model, 8, 20)
    masks = [features["attention_mask"] for _, features in way.batches(mixed)]
    assert all(mask[:, -1].all() and mask[:, 0].any() for mask in masks)
    assert sum(len(mask) for mask in masks) == len(mixed) > 4 * len(masks)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_hold_what_preprocess_gives(tiny_path, mixed, side):
    model = SentenceTransformer(tiny_path, device="cpu")
    model.tokenizer.padding_side = side
    for rows, features in as_on_a_gpu(model, 8, 20).batches(mixed):
        expected = model.preprocess([mixed[i] for i in rows])
        assert features.keys() == expected.keys()
        width = expected["input_ids"].shape[1]
        kept = slice(-width, None) if side == "left" else slice(width)
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert torch.equal(features[name][:, kept], expected[name])
            assert not features[name].sum() - expected[name].sum()  # what is added is padding, id 0
        vectors = model(dict(features))["sentence_embedding"]
        if side == "right":
            torch.testing.assert_close(vectors, model(expected)["sentence_embedding"], atol=2e-5, rtol=0)


def test_rounded_lengths_are_padded_little(ternary, mixed):
    found = list(as_on_a_gpu(ternary, 8, 0).batches(mixed))
    assert sorted(int(i) for rows, _ in found for i in rows) == list(range(len(mixed)))
    for _, features in found:
        mask = features["attention_mask"]
        assert mask.shape[1] % 8 == 0 and mask.shape[1] - mask.sum(1).min() < 8


def test_shorter_texts_join_a_batch_if_that_pads_them_little(ternary, mixed):
    found = list(as_on_a_gpu(ternary, 1, 20, chunk=1024).batches(mixed[:40]))
    assert sorted(int(i) for rows, _ in found for i in rows) == list(range(40))
    lengths = []
    for _, features in found:
        mask = features["attention_mask"]
        lengths.append(mask.sum(1))
        assert mask.numel() <= 512 and mask.shape[1] == lengths[-1][0]
        added = [int((mask.shape[1] - n) * (lengths[-1] == n).sum()) for n in lengths[-1].unique()]
        assert max(added) <= 20
    assert len(found) < len(torch.cat(lengths).unique()) / 3


def test_queries_have_the_vectors_they_have_alone(ternary, mixed):
    found = embed(ternary, mixed[:12], task="query")
    alone = torch.cat([embed(ternary, [text], task="query") for text in mixed[:12]])
    assert torch.equal(found, alone)
    assert torch.equal(embed(ternary, mixed, task="query")[:12], alone)
    assert torch.equal(embed(ternary, mixed, task="document")[:12], alone)


@pytest.mark.parametrize("task", ["query", "document"])
def test_prompts_are_those_of_encode_query_and_encode_document(tiny_path, mixed, task):
    prompts = {"query": "lo vu bal", "document": "zal mon von"}
    model = SentenceTransformer(tiny_path, device="cpu", prompts=prompts)
    encode = model.encode_query if task == "query" else model.encode_document
    expected = encode(mixed[:80], normalize_embeddings=True, convert_to_tensor=True)
    found = embed(model, mixed[:80], task=task)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert not torch.allclose(found, embed(model, mixed[:80]), atol=1e-3)


def test_truncated_dimensions_and_dot_products(tiny_path, mixed):
    model = SentenceTransformer(tiny_path, device="cpu", truncate_dim=8)
    expected = torch.nn.functional.normalize(model.encode(mixed[:80], convert_to_tensor=True))
    torch.testing.assert_close(embed(model, mixed[:80]), expected, atol=2e-6, rtol=0)
    model.similarity_fn_name = "dot"
    expected = model.encode(mixed[:80], convert_to_tensor=True)
    torch.testing.assert_close(embed(model, mixed[:80]), expected, atol=2e-5, rtol=0)


def test_models_whose_features_cannot_be_cut(sentences):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(sorted({w for s in sentences for w in s.split()}))}
    tokenizer = Tokenizer(models.WordLevel(words | {"[UNK]": len(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    expected = model.encode(sentences[:90], normalize_embeddings=True, convert_to_tensor=True)
    torch.testing.assert_close(embed(model, sentences[:90]), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "texts, message",
    [
        (["good", 3], "texts must be strings; number 1 is int"),
        ([b"bytes"], r"number 0 is bytes \(decode it"),
        (["good", " \n"], "texts: number 1 is empty"),
        (["\udcff"], "texts: number 0 holds an invalid character"),
    ],
)
def test_texts_without_a_meaningful_vector_are_refused(ternary, texts, message):
    with pytest.raises(tritern.TriternError, match=message):
        embed(ternary, texts)


def test_other_bad_input(ternary, mixed):
    with pytest.raises(tritern.TriternError, match="tokens_per_batch must be at least 1; received 0"):
        embed(ternary, mixed, tokens_per_batch=0)
    assert embed(ternary, []).shape == (0, 32)
    assert embed(ternary, ["lo " * 300_000]).isfinite().all()  # nearly a megabyte: truncated by the model


def test_vectors_that_are_not_finite_are_refused(tiny_path, mixed):
    model = SentenceTransformer(tiny_path, device="cpu")
    with torch.no_grad():
        model[0].auto_model.embeddings.word_embeddings.weight[:] = float("inf")
    with pytest.raises(tritern.TriternError, match="is not finite"):
        embed(model, mixed)


def test_failures_come_after_what_was_done_before_them(ternary, mixed):
    def windows():
        yield mixed[:100]
        yield mixed[100:200]
        raise OSError("the disk is gone")

    done = []
    with pytest.raises(OSError, match="the disk is gone"):
        for vectors in embed_each(ternary, windows()):
            done.append(len(vectors))
    assert done == [100, 100]


def test_failures_of_the_model_are_raised_and_end_all_threads(tiny_path, mixed, monkeypatch):
    model = SentenceTransformer(tiny_path, device="cpu")
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: 1 / 0)
    before, threads = threading.active_count(), torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        embed(model, mixed)
    assert threading.active_count() == before and torch.get_num_threads() == threads


def test_a_reader_that_stops_early_ends_all_threads(ternary, mixed):
    before, threads = threading.active_count(), torch.get_num_threads()
    windows = embed_each(ternary, [mixed] * 50)
    next(windows)
    windows.close()
    assert threading.active_count() == before and torch.get_num_threads() == threads


def test_several_threads_may_embed_with_one_model(ternary, mixed):
    """Rust tokenizers raise "Already borrowed" when two threads set their padding at once."""
    expected, found = embed(ternary, mixed), {}
    threads = [
        threading.Thread(target=lambda n=n: found.setdefault(n, embed(ternary, mixed))) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(v, expected) for v in found.values())


def test_a_model_in_training_mode_gives_the_vectors_of_evaluation(tiny_path, mixed):
    model = SentenceTransformer(tiny_path, device="cpu")
    expected = embed(model, mixed)
    model.train()
    assert torch.equal(embed(model, mixed), expected)
    model.train()
    torch.testing.assert_close(embed(model, mixed[:10]), expected[:10], atol=2e-6, rtol=0)


def test_a_failure_does_not_wait_for_further_texts(ternary, mixed):
    released = threading.Event()

    def windows():
        yield mixed[:10]
        released.wait(60)

    embedding = embed_each(ternary, windows())
    next(embedding)
    start = time.monotonic()
    embedding.close()
    assert time.monotonic() - start < 20
    released.set()


def test_other_threads_keep_torchs_number_of_threads(ternary, mixed, monkeypatch):
    """Of torch's, which the model's threads share out among them: also of a thread that starts meanwhile."""
    before, vectors = torch.get_num_threads(), Padded.vectors
    shares, others = set(), []

    def counting(*args, **kwargs):
        torch.randn(200, 200) @ torch.randn(200, 200)  # before which torch sets the number for a new thread
        shares.add(torch.get_num_threads())
        return vectors(*args, **kwargs)

    def another():
        torch.randn(200, 200) @ torch.randn(200, 200)
        others.append(torch.get_num_threads())

    def run(target):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()

    monkeypatch.setattr(Padded, "vectors", counting)
    torch.set_num_threads(3)
    try:
        embedding = embed_each(ternary, [mixed] * 3)
        next(embedding)
        run(another)
        embedding.close()
        run(another)
        assert shares == {1} and others == [3, 3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert np.isfinite(embed(ternary, mixed).numpy()).all()


@pytest.mark.parametrize("after", [1, 2])
def test_a_thread_that_cannot_be_started(ternary, mixed, monkeypatch, after):
    """As where a container allows so many processes and no more."""
    before, threads, start = threading.active_count(), torch.get_num_threads(), threading.Thread.start
    started = []

    def limited(thread):
        if len(started) == after:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    torch.set_num_threads(2)
    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        embed(ternary, mixed)
    monkeypatch.undo()
    other = []
    thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    found = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert threading.active_count() == before and found == 2 and other == [2]
