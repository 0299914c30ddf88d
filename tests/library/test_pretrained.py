"""The models that come with the package, and how they are made."""

import gzip
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import tritern
from tritern import CheckpointError, TriternError
from tritern.pretrained import model_of, resolve, shipped

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from quality import eval_sets, release
from quality.encoder import Encoder

from .cli import answer, error  # noqa: E402

NAME = "minilm-l6-ternary"
FOLDER = ROOT / "tritern" / "models" / NAME


@pytest.fixture(scope="module")
def model():
    return tritern.load(NAME, device="cpu")


def test_it_loads_by_name_and_is_close_to_its_original(model, minilm, texts):
    assert shipped() == [NAME] and resolve(NAME) == str(FOLDER)
    layers = [m for m in model.modules() if isinstance(m, tritern.TernaryLinear)]
    assert len(layers) == 36 and {m.activation_bits for m in layers} == {8}
    assert sum(isinstance(m, tritern.Int4Embedding) for m in model.modules()) == 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.max_seq_length == minilm.max_seq_length == 256
    cosines = (model.encode(texts) * minilm.encode(texts)).sum(1)
    assert cosines.min() > 0.85 and cosines.mean() > 0.9


def test_it_is_small_and_whole():
    files = [f for f in FOLDER.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= release.MOST_BYTES
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["tritern"]
    assert patterns[0] == "py.typed" and (ROOT / "tritern" / "py.typed").is_file()
    assert set(files) == {f for p in patterns[1:] for f in (ROOT / "tritern").glob(p) if f.is_file()}


def test_its_card_names_its_sources_and_scores():
    card = (FOLDER / "README.md").read_text()
    for source in release.SOURCES.values():
        assert (source.repository in card) == bool(source.licence)
    assert not release.SOURCES["F"].licence  # which has none
    assert "license: apache-2.0" in card and f'tritern.load("{NAME}")' in card
    for name in eval_sets.SETS:
        assert f"| {name} |" in card


def test_an_altered_copy_is_refused(tmp_path):
    for file in ("model.safetensors", "tokenizer.json"):
        copy = tmp_path / file.partition(".")[0]
        shutil.copytree(FOLDER, copy)
        content = bytearray((copy / file).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / file).write_bytes(content)
        with pytest.raises(CheckpointError, match="sha256 differs"):
            tritern.load(copy, device="cpu")


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    tritern.patch(tiny).save_pretrained(NAME)
    assert resolve(NAME) == NAME
    assert tritern.load(NAME, device="cpu").get_embedding_dimension() == 32


def test_the_command_line_knows_it(tmp_path, sentences, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "t.txt").write_text("\n".join(sentences[:20]))
    (shown,) = answer("info", NAME)
    assert "minilm-l6-ternary" in json.dumps(shown) and "36" in json.dumps(shown)
    message = error("eval", NAME, tmp_path / "t.txt")  # the teacher is that of the card, from the hub
    assert "cannot load model sentence-transformers/all-MiniLM-L6-v2" in message


def test_what_is_no_ternary_model_is_refused(tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TriternError, match=r"is not a ternary model; tritern.patch\(SentenceTransformer"):
        tritern.load(tiny_path, device="cpu")
    missing = str(tmp_path / "missing")
    with pytest.raises(TriternError, match=rf"cannot load '.*missing'.*comes with tritern \({NAME}\)"):
        tritern.load(missing, device="cpu")


@pytest.mark.parametrize(
    "name", ["minilm-l6-ternery", "MiniLM-L6-Ternary", "minilm_l6_ternary", "minilm-ternary"]
)
def test_a_misspelt_name_is_answered_before_the_hub_is_asked(name, tmp_path, monkeypatch):
    import sentence_transformers

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", None)
    message = rf"there is no model '{name}': tritern comes with {NAME}; did you mean '{NAME}'\?"
    for load in (tritern.load, partial(model_of, argument="teacher")):
        with pytest.raises(TriternError, match=message):
            load(name)
    assert f"there is no model '{name}'" in error("info", name)
    (tmp_path / name).mkdir()
    assert resolve(name) == name and resolve(f"owner/{name}") == f"owner/{name}"


@pytest.mark.parametrize("name", ["", None, 3, torch.nn.Linear(2, 2)])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(TriternError, match="name must be the name or folder of a model; received"):
        tritern.load(name)


def test_the_known_names_come_before_what_the_hub_says(monkeypatch):
    import sentence_transformers

    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection, or see how ...")

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", offline)
    said = rf"comes with tritern \({NAME}\): We couldn't connect to the hub.$"
    with pytest.raises(TriternError, match=f"cannot load 'no-such-model': it must be the folder or.*{said}"):
        tritern.load("no-such-model", device="cpu")
    said = f"so a name on the hub; tritern comes with {NAME}) on cpu: We couldn't connect to the hub."
    assert said in error("info", "no-such-model")


@pytest.fixture
def source_files(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)

    def write(letters, lines):
        with gzip.open(folder / "sources.txt.gz", "wt") as file:
            file.writelines(f"{letter}\n" for letter in letters)
        text = "".join(f"{line}\n" for line in lines).encode()
        (folder / "sentences.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(text))
        return folder.parent

    return write


def test_texts_without_a_licence_are_left_out(source_files, tmp_path, capsys, monkeypatch):
    data, out = source_files("WFNF", ["a\u2028b", "caption", "novel", "caption"]), tmp_path / "out.txt"
    monkeypatch.setattr(sys, "argv", ["release.py", "texts", str(data), str(out)])
    release.main()
    assert out.read_text(encoding="utf-8") == "a\u2028b\nnovel\n"
    assert "       0 Flickr30k captions: left out, no licence" in capsys.readouterr().out
    for letters, message in (("WF?N", "a text of source '\\?'; known are W, F"), ("WF", "shorter|longer")):
        source_files(letters, "abcd")
        with pytest.raises(SystemExit, match=message):
            release.main()


def test_a_run_is_packed_in_16_bits_with_its_card(tiny_path, sentences, tmp_path, monkeypatch):
    settings = {"max_steps": 2, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}
    made = tritern.distill(
        SentenceTransformer(tiny_path, device="cpu"), sentences, tmp_path / "run", holdout=64, **settings
    )
    made = tritern.distill(  # a second run
        SentenceTransformer(str(tmp_path / "run"), device="cpu"), sentences, tmp_path / "second", holdout=64,
        teacher=SentenceTransformer(tiny_path, device="cpu"), **settings,
    )  # fmt: skip
    command = ["release.py", "pack", tmp_path / "run", tmp_path / "second", "--to", tmp_path / "to"]
    command += ["--record", tmp_path / "r.json", "--figure", tmp_path / "curve.png"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    for _ in range(2):  # over what is there
        release.main()
    packed = tritern.load(tmp_path / "to", device="cpu")
    assert {p.dtype for p in packed.parameters()} == {torch.float32}
    ours, theirs = (m.encode(sentences[:9], normalize_embeddings=True) for m in (packed, made))
    assert np.sum(ours * theirs, 1) == pytest.approx(1, abs=0.01)
    sizes = [(tmp_path / f / "model.safetensors").stat().st_size for f in ("second", "to")]
    assert sizes[1] < sizes[0]
    (tmp_path / "to" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="sha256 differs"):
        tritern.load(tmp_path / "to", device="cpu")
    card = (tmp_path / "to" / "README.md").read_text()
    assert "## Trained on" in card and card.count("| max_steps | 2 |") == 2
    assert card.index("| ternary, not trained |") < card.index("| ternary, distilled |")
    assert card.index("## Training, run 1 of 2") < card.index("## Training, run 2 of 2") < len(card)
    records = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert [(r["steps"], r["texts_per_step"]) for r in records] == [(2, 64)] * 2
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    options = ["--embedding-bits", "4", "--source", "the first lines"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), *options])
    release.main()
    assert tritern.summary(tritern.load(tmp_path / "to", device="cpu")).tables[0].bits == 4
    card = (tmp_path / "to" / "README.md").read_text()
    assert "texts from the first lines, 2 steps" in card and "word embeddings in int8 per row, which" in card
    assert "were then rounded to 4 bits in groups of 32." in card
    monkeypatch.setattr(release, "MOST_BYTES", 1000)
    with pytest.raises(SystemExit, match="at most 1,000 are shipped"):
        release.main()


DATA = os.environ.get("TRITERN_DATA")


@pytest.mark.skipif(not DATA, reason="TRITERN_DATA does not name the folder of evaluation data")
def test_it_keeps_99_percent_of_stsb(model):
    (stsb,), _ = eval_sets.load(Path(DATA), ["STS-B"])
    assert stsb.score(Encoder(model)) >= 0.99 * 0.8203


@pytest.mark.parametrize("name", ["./none", "../none", "~/none", "/none", "none/", "https://hub/owner/name"])
def test_paths_where_nothing_is_are_not_asked_of_the_hub(name):
    with pytest.raises(TriternError, match=f"cannot load '{name}'.*: there is no folder '{name}'$"):
        tritern.load(name)
