"""Damaged files: whatever happens to a saved model, it is refused or gives the vectors it gave before.

`TRITERN_FUZZ=2000 pytest -s tests/library/test_fuzz.py` tries more and prints what became of them.
"""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from transformers.utils import logging

import tritern
from tritern.checkpoint.digest import MANIFEST

TRIALS = int(os.environ.get("TRITERN_FUZZ", "240"))


def flip(data, rng):
    for _ in range(rng.choice([1, 1, 1, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def truncate(data, rng):
    del data[rng.randrange(len(data)) :]


def zero(data, rng):
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice([1, 16, 4096]))
    data[start:end] = bytes(end - start)


def swap(data, rng):
    size = rng.randint(1, max(1, min(64, len(data) // 2)))
    a, b = sorted((rng.randint(0, len(data) - 2 * size), rng.randint(size, len(data) - size)))
    b = max(b, a + size)
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


@pytest.fixture(scope="module")
def folder(tiny_path, tmp_path_factory):
    """A ternary model with every kind of file: shards and their index, a Dense module, prompts."""
    model = SentenceTransformer(
        tiny_path, device="cpu", prompts={"query": "bab "}, default_prompt_name="query"
    )
    model.append(Dense(32, 16))
    model.append(Normalize())
    tritern.patch(model, embedding_bits=8)
    save = model[0].auto_model.save_pretrained
    model[0].auto_model.save_pretrained = lambda path, **_: save(path, max_shard_size="20KB")
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    model.save_pretrained(str(folder))
    return folder


def vectors(folder, texts):
    return SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False)


@pytest.fixture
def quiet():
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(level)


@pytest.mark.filterwarnings("ignore")
def test_damage_is_refused_or_harmless(folder, texts, quiet):
    expected = vectors(folder, texts)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = {str(p.relative_to(folder)) for p in files}
    assert {MANIFEST, "README.md", "2_Dense/model.safetensors", "model.safetensors.index.json"} <= names
    rng = random.Random(TRIALS)
    outcomes = Counter()
    for trial in range(TRIALS):
        chosen = rng.sample(files, rng.choice([1, 1, 1, 2]))
        before = {file: file.read_bytes() for file in chosen}
        damage = rng.choice([flip, flip, truncate, zero, swap])
        for file in chosen:
            data = bytearray(before[file])
            damage(data, rng)
            file.write_bytes(data)
        what = f"trial {trial}: {damage.__name__} in {', '.join(f.name for f in chosen)}"
        if all(file.read_bytes() == content for file, content in before.items()):
            outcomes["unchanged"] += 1
            continue
        try:
            found = vectors(folder, texts)
        except Exception as error:  # noqa: BLE001, any refusal is a good one
            outcomes[type(error).__name__] += 1
        else:
            assert found.dtype == expected.dtype and np.array_equal(found, expected), what
            outcomes["identical vectors: " + ", ".join(sorted({f.name for f in chosen}))] += 1
        finally:
            for file, content in before.items():
                file.write_bytes(content)
    print("\n" + "\n".join(f"{n:6} {what}" for what, n in outcomes.most_common()))
    assert outcomes["CheckpointError"] > TRIALS / 2
    assert np.array_equal(vectors(folder, texts), expected)  # every file is as it was


@pytest.mark.parametrize("name", ["model-00001-of-*.safetensors", "2_Dense/model.safetensors", "config.json"])
def test_a_missing_file_is_refused(folder, tmp_path, name):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    next(copy.glob(name)).unlink()
    with pytest.raises(
        (OSError, ValueError), match="(?i)no such file|does not appear|could not find|unrecogn"
    ):
        SentenceTransformer(str(copy), device="cpu")


def test_only_safetensors_are_read(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    state = SentenceTransformer(str(copy), device="cpu")[0].auto_model.state_dict()
    for file in copy.glob("model*.safetensors*"):
        file.unlink()
    torch.save(state, copy / "pytorch_model.bin")
    with pytest.raises(tritern.CheckpointError, match="read from safetensors files only"):
        SentenceTransformer(str(copy), device="cpu")


class Loud:
    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


@pytest.mark.parametrize("folder_name", [".", "2_Dense"])
def test_nothing_is_unpickled(folder, tmp_path, folder_name):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for file in (copy / folder_name).glob("model*.safetensors*"):
        file.unlink()
    torch.save({"weight": Loud()}, copy / folder_name / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights_only|safetensors files only"):
        SentenceTransformer(str(copy), device="cpu")
