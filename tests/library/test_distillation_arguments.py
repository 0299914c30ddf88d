"""What distill takes and refuses, before anything is changed or written."""

import json
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from sentence_transformers import SentenceTransformer

import tritern
from tritern import TernaryConfig, TriternError
from tritern.distillation import FidelityEvaluator, TernaryDistillationArguments, TernaryDistiller
from tritern.distillation.layers import TrainableTernaryLinear
from tritern.engine.encoder import encode
from tritern.texts.sample import drawn

SMALL = {"per_device_train_batch_size": 16, "max_steps": 2, "disable_tqdm": True, "save_strategy": "no"}
SMALL |= {"use_cpu": True, "gradient_accumulation_steps": 1, "logging_steps": 1}


class Seen(Exception):
    """Carries what a run would train on and judge by."""


@pytest.fixture
def stopped(monkeypatch):
    """Runs end where training would begin: ``raises(Seen)`` with the data set, the evaluator, the options."""

    def stop(model, args, train_dataset, *, evaluator, **options):
        raise Seen(train_dataset, evaluator, {**options, "args": args})

    monkeypatch.setattr("tritern.distillation.job.TernaryDistiller", stop)


def begun(model, texts, folder, **options):
    with pytest.raises(Seen) as seen:
        tritern.distill(model, texts, folder, **{**SMALL, "joined_ratio": 0, **options})
    return seen.value.args


def record(folder):
    return json.loads((Path(folder) / "distillation.json").read_text())


@pytest.mark.parametrize(
    "form",
    [lambda x: (t for t in x), tuple, np.array, pandas.Series, lambda x: pandas.Series(x, range(7, 407))],
)
def test_texts_of_any_iterable(tiny, sentences, tmp_path, stopped, form):
    data, judge, _ = begun(tiny, form(sentences), tmp_path, holdout=40)
    assert sorted([*data["text"], *judge.texts]) == sorted(sentences)


@pytest.mark.parametrize(
    "texts, message",
    [
        (b"bytes", "texts must be a list or another iterable; received one bytes"),
        (dict.fromkeys("abc"), "texts must be a list .*; received a dict"),
        (pandas.DataFrame({"text": ["a"]}), "received a DataFrame: pass one of its columns"),
        (None, "received NoneType"),
        ([*["fine"] * 5, None], "texts must be strings; number 5 is NoneType"),
        ([*["fine"] * 5, b"x"], "texts must be strings; number 5 is bytes .decode it"),
        ([*["fine"] * 5, float("nan")], "texts must be strings; number 5 is float"),
        ([*["fine"] * 5, {"text": "x"}], "texts must be strings; number 5 is dict"),
        ([*["fine"] * 5, "x\ud800y"], "texts: number 5 holds an invalid character .*read the file as UTF-8"),
    ],
)
def test_texts_that_are_none(tiny, tmp_path, texts, message):
    for options in ({}, {"teacher": np.ones((6, 32)), "hidden_weight": 0.0}):
        with pytest.raises(TriternError, match=message):
            tritern.distill(tiny, texts, tmp_path / "out", **SMALL, **options)
    assert not any(isinstance(m, TrainableTernaryLinear) for m in tiny.modules()), "left as it was"
    assert not (tmp_path / "out").exists()


def test_an_empty_text_has_no_vector(tiny, sentences, tmp_path):
    texts = [*sentences[:50], " "]
    with pytest.raises(TriternError, match="texts: number 50 is empty"):
        tritern.distill(tiny, texts, tmp_path, teacher=np.ones((51, 32)), hidden_weight=0.0, **SMALL)


# ---------------------------------------------------------------- holdout


def test_the_holdout_is_drawn_from_all_texts(tiny, sentences, tmp_path, stopped):
    """A file sorted by source: its head, its middle and its end are all held out in part."""
    data, judge, _ = begun(tiny, sentences, tmp_path, holdout=80)
    places = [sentences.index(text) for text in judge.texts]
    assert len(judge.texts) == 80 and not set(judge.texts) & set(data["text"])
    assert all(12 <= sum(start <= p < start + 100 for p in places) <= 28 for start in range(0, 400, 100))
    assert data["text"] == [text for text in sentences if text not in set(judge.texts)], "in their order"


def test_the_seed_chooses_the_holdout_and_the_order_does_not(tiny, sentences, tmp_path, stopped):
    def held(texts=sentences, **options):
        return set(begun(tiny, texts, tmp_path, holdout=40, **options)[1].texts)

    assert held() == held() == held(sentences[::-1]) == held(seed=1, data_seed=42)
    assert len(held() & held(seed=1)) < 20
    assert held(seed=1) == held(data_seed=1)
    fewer = sentences[:200]  # what was held out of more texts is not trained on with fewer, nor the reverse
    assert held() & set(fewer) <= held(fewer)


def test_a_limit_takes_the_first_texts_and_the_holdout_is_of_those(tiny, sentences, tmp_path, stopped):
    file = tmp_path / "t.txt"
    file.write_text("\n".join(sentences))
    data, judge, _ = begun(tiny, file, tmp_path / "out", holdout=40, limit=200)
    assert sorted([*data["text"], *judge.texts]) == sorted(sentences[:200])
    assert max(sentences.index(text) for text in judge.texts) > 150


def test_vectors_are_held_out_with_their_texts(tiny, sentences, tmp_path, stopped):
    texts = [*sentences[:100], *sentences[:100]]  # each twice: neither of a text held out is trained on
    vectors = np.random.default_rng(0).normal(size=(200, 32)).astype(np.float32)
    data, judge, _ = begun(tiny, texts, tmp_path, teacher=vectors, holdout=20, hidden_weight=0.0)
    assert len(judge.texts) == 20 and len(data) == 160 and not set(judge.texts) & set(data["text"])
    for text, vector in zip(judge.texts, judge.teacher):
        assert np.array_equal(vectors[texts.index(text)], vector)
    of_texts = {}
    for text, vector in zip(texts, vectors):
        of_texts.setdefault(text, []).append(vector.tolist())
    assert all(vector in of_texts[text] for text, vector in zip(data["text"], data["label"]))
    with pytest.raises(TriternError, match="holdout must be at most the number of different texts, 100"):
        begun(tiny, texts, tmp_path, teacher=vectors, holdout=150, hidden_weight=0.0)


def test_a_resumed_run_holds_out_the_same(tiny_path, sentences, tmp_path):
    settings = {**SMALL, "save_strategy": "steps", "save_steps": 1, "holdout": 40}
    tritern.distill(SentenceTransformer(tiny_path, device="cpu"), sentences, tmp_path, **settings)
    whole = record(tmp_path)
    (tmp_path / "checkpoint-2").rename(tmp_path / "last")
    model = SentenceTransformer(tiny_path, device="cpu")
    tritern.distill(model, sentences, tmp_path, resume=tmp_path / "checkpoint-1", **settings)
    again = record(tmp_path)
    assert again["resumed_from"] == "checkpoint-1" and again["fidelity"] == whole["fidelity"]
    held = [sentences[i] for i in drawn(sentences, 40, 42)]
    teacher = SentenceTransformer(tiny_path, device="cpu")
    found = tritern.evaluate(model, teacher, held)
    assert again["fidelity"]["ternary, distilled"]["overlap"] == pytest.approx(found.overlap)


# ---------------------------------------------------------------- models and settings


def test_models_and_teachers_by_name(tiny_path, sentences, tmp_path, monkeypatch, stopped):
    monkeypatch.chdir(Path(tiny_path).parent)
    for name in ("model", Path("model"), tiny_path):
        data, judge, options = begun(name, sentences, tmp_path, teacher=name, holdout=40)
        assert isinstance(options["teacher"], SentenceTransformer) and judge.teacher.shape == (40, 32)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for argument in ("teacher", "model"):
        options = {"model": "model", "teacher": None, argument: "./missing"}
        with pytest.raises(TriternError, match=f"{argument}: cannot load './missing'; it must be the folder"):
            tritern.distill(texts=sentences, output_dir=tmp_path, **options, **SMALL)


@pytest.mark.parametrize(
    "other", [3, [[1.0]], torch.ones(400, 32), torch.nn.Linear(2, 2), SentenceTransformer]
)
def test_other_types_are_no_teachers(tiny, sentences, tmp_path, other):
    with pytest.raises(TriternError, match="teacher must be a SentenceTransformer, or the name or folder"):
        tritern.distill(tiny, sentences, tmp_path, teacher=other, **SMALL)
    with pytest.raises(TriternError, match="model must be a SentenceTransformer, or the name or folder"):
        tritern.distill(other, sentences, tmp_path, **SMALL)


def test_vectors_that_teach_nothing(tiny, sentences, tmp_path):
    vectors = np.ones((400, 32), np.float32)
    vectors[7] = 0
    with pytest.raises(TriternError, match="teacher vectors: the vector number 7 is all zeros"):
        tritern.distill(tiny, sentences, tmp_path, teacher=vectors, hidden_weight=0.0, **SMALL)
    with pytest.raises(TriternError, match="teacher vectors must be a NumPy array of numbers; .* of object"):
        tritern.distill(tiny, sentences, tmp_path, teacher=vectors.astype(object), **SMALL)


def test_steps_are_max_steps(tiny, sentences, tmp_path, stopped):
    settings = {name: value for name, value in SMALL.items() if name != "max_steps"}
    for steps in (10, np.int64(10)):
        with pytest.raises(Seen) as seen:
            tritern.distill(tiny, sentences, tmp_path, holdout=0, steps=steps, **settings)
        assert seen.value.args[2]["args"].max_steps == 10
    with pytest.raises(TriternError, match=r"steps .10. and max_steps .2. are the same setting: pass one"):
        tritern.distill(tiny, sentences, tmp_path, steps=10, **SMALL)
    with pytest.raises(TriternError, match="steps must be at least 1; received 0"):
        tritern.distill(tiny, sentences, tmp_path, steps=0, **settings)
    with pytest.raises(TriternError, match="steps must be a whole number"):
        tritern.distill(tiny, sentences, tmp_path, steps=1.5, **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 3}, r"batch_size .did you mean .*per_device_train_batch_size"),
        ({"epochs": 3}, r"epochs .did you mean num_train_epochs\?"),
        ({"learnin_rate": 3}, r"learnin_rate .did you mean .*learning_rate"),
        ({"zzz": 3}, "unknown settings: zzz; see tritern.distillation.TernaryDistillationArguments"),
        ({"learning_rate": "fast"}, "learning_rate must be a number; received 'fast' .str."),
        ({"learning_rate": -1e-3}, "learning_rate must not be negative; received -0.001"),
        ({"temperature": "hot"}, "temperature must be a number; received 'hot'"),
        (
            {"matryoshka_dims": "64"},
            "matryoshka_dims must be a list or another iterable; received one string",
        ),
        ({"matryoshka_dims": 8}, "matryoshka_dims must be a list or another iterable; received int"),
        ({"matryoshka_dims": [8, 0]}, "matryoshka_dims must be at least 1; received 0"),
        ({"max_steps": "3"}, "max_steps must be a whole number, at least -1; received '3'"),
        ({"max_steps": 2.5}, "max_steps must be a whole number, at least -1; received 2.5"),
        ({"num_train_epochs": "3"}, "num_train_epochs must be a number; received '3'"),
        ({"seed": "x"}, "seed must be a whole number, at least 0; received 'x'"),
        ({"max_length": 0}, "max_length must be at least 1; received 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1; received 0"),
        ({"per_device_train_batch_size": "8"}, "per_device_train_batch_size must be a whole number"),
        ({"gradient_accumulation_steps": None}, "gradient_accumulation_steps must be a whole number"),
        ({"bf16": "no"}, "bf16 must be True or False; received 'no'"),
        ({"use_cpu": "no"}, "use_cpu must be True or False; received 'no'"),
    ],
)
def test_settings_that_are_unknown_or_of_another_type(tiny, sentences, tmp_path, settings, message):
    with pytest.raises(TriternError, match=message):
        tritern.distill(tiny, sentences, tmp_path / "out", **{**SMALL, **settings})
    assert not tritern.nn.replace.is_ternary(tiny) and not (tmp_path / "out").exists()
    assert not any(isinstance(m, TrainableTernaryLinear) for m in tiny.modules()), "left as it was"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prefixes": "query: "}, "prefixes must be a list or another iterable; received one string"),
        ({"prefixes": [None]}, "prefixes must be strings; number 0 is NoneType"),
        ({"holdout": 64.0}, "holdout must be a whole number, at least 0; received 64.0"),
        ({"holdout": True}, "holdout must be a whole number, at least 0; received True"),
        ({"holdout": -1}, "holdout must be at least 0; received -1"),
        ({"joined_ratio": "0.1"}, "joined_ratio is a share of the texts, from 0 to 1; received 0.1"),
        ({"joined_ratio": True}, "joined_ratio is a share of the texts, from 0 to 1; received True"),
        ({"config": {"rule": "mse"}}, "config must be a tritern.TernaryConfig; received dict"),
        ({"callbacks": 3}, "callbacks must be a list or another iterable; received int"),
        ({"callbacks": [3]}, "callbacks must be transformers' TrainerCallbacks; received 3"),
        ({"resume": "missing"}, "missing has no training_state.safetensors: it is not a checkpoint"),
        ({"evaluator": print}, "evaluator must be a sentence-transformers evaluator, .*; received builtin"),
        ({"resume": 3}, "resume must be True, False or the folder of a checkpoint; received 3"),
        ({"resume": None}, "resume must be True, False or the folder of a checkpoint; received None"),
        ({"column": "text"}, "column and limit go with a file or data set"),
    ],
)
def test_other_arguments_of_other_types(tiny, sentences, tmp_path, options, message):
    with pytest.raises(TriternError, match=message):
        tritern.distill(tiny, sentences, tmp_path / "out", **SMALL, **options)
    assert not any(isinstance(m, TrainableTernaryLinear) for m in tiny.modules()), "left as it was"
    assert not (tmp_path / "out").exists()


def test_the_trainer_takes_models_by_name(tiny_path, tmp_path):
    args = TernaryDistillationArguments(output_dir=str(tmp_path / "out"), report_to="none", **SMALL)
    distiller = TernaryDistiller(tiny_path, args, teacher=Path(tiny_path))
    assert len(list(distiller.layers())) == 12
    assert distiller.objective._teacher[0] is not distiller.model
    args.blend_ratio = 0.0
    packaged = TernaryDistiller("minilm-l6-ternary", args, teacher="minilm-l6-ternary")
    assert len(list(packaged.layers())) == 36


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("model", 3, "must be a SentenceTransformer, or the name or folder of one; received int"),
        ("teacher", "./missing", "cannot load './missing'; it must be the folder or hub name"),
        ("args", None, "must be TernaryDistillationArguments; received NoneType"),
        ("args", SMALL, "must be TernaryDistillationArguments; received dict"),
        ("teacher", np.ones((4, 32)), "must be a SentenceTransformer, .*; received ndarray"),
        ("config", "mse", "must be a tritern.TernaryConfig or None; received str"),
    ],
)
def test_the_trainer_checks_what_it_is_given(tiny, tmp_path, name, value, message):
    args = TernaryDistillationArguments(output_dir=str(tmp_path / "out"), **SMALL)
    with pytest.raises(TriternError, match=f"{name}:? {message}"):
        TernaryDistiller(**{"model": tiny, "args": args, name: value})
    assert not any(isinstance(m, TrainableTernaryLinear) for m in tiny.modules()), "left as it was"


def test_a_folder_that_cannot_be_written_is_refused_at_once(sentences, tmp_path, monkeypatch):
    """Before the model is loaded, which does not exist here."""
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TriternError, match="output_dir must be a folder; .*file is a file: name another"):
            tritern.distill("./none", sentences, folder, **SMALL)
    for wrong in (None, 3, ""):
        with pytest.raises(TriternError, match="output_dir must be the name of a folder; received"):
            tritern.distill("./none", sentences, wrong, **SMALL)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(TriternError, match="output_dir: no permission to write"):
        tritern.distill("./none", sentences, tmp_path / "new", **SMALL)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- the evaluator


def test_the_evaluator_checks_what_it_is_given(tiny, tiny_path, sentences):
    assert np.array_equal(
        FidelityEvaluator(iter(sentences[:20]), tiny_path).teacher, encode(tiny, sentences[:20], prompt="")
    )
    for texts, teacher, message in (
        ("abcdefghijklmnop", tiny, "texts must be many strings; received one"),
        (sentences[:11], tiny, "texts must hold at least 12 strings; received 11"),
        ([*sentences[:12], None], tiny, "number 12 is NoneType"),
        (sentences[:12], np.zeros((12, 32)), "teacher: the vector number 0 is all zeros"),
        (sentences[:12], np.ones((11, 32)), r"teacher must have shape \[12, width\]"),
        (sentences[:12], None, "teacher must be a SentenceTransformer"),
    ):
        with pytest.raises(TriternError, match=message):
            FidelityEvaluator(texts, teacher)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_student_that_says_nothing_does_not_end_the_run(sentences, caplog, value):
    class Nothing:
        def encode(self, texts, **_):
            return np.full((len(texts), 32), value)

    judge = FidelityEvaluator(sentences[:12], np.random.default_rng(0).normal(size=(12, 32)))
    assert all(np.isnan(v) for v in judge(Nothing()).values())
    assert "closeness is not defined: vectors of the student: the vector number 0" in caplog.text


def test_a_config_is_kept(tiny, sentences, tmp_path, stopped):
    config = TernaryConfig(rule="twn")
    assert begun(tiny, sentences, tmp_path, holdout=0, config=config)[2]["config"] is config
