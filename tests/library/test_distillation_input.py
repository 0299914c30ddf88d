"""What distillation is given, and what it says when that will not do."""

from functools import cached_property

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import TrainingArguments

import tritern
from tritern import TernaryConfig, TriternError
from tritern.distillation import TernaryDistillationArguments, TernaryDistiller
from tritern.distillation.data import LengthBatches, clean, joined, prefixed, token_counts
from tritern.distillation.layers import TrainableTernaryLinear

SMALL = {"per_device_train_batch_size": 16, "max_steps": 2, "disable_tqdm": True, "save_strategy": "no"}
SMALL |= {"use_cpu": True, "gradient_accumulation_steps": 1}


def test_clean_leaves_out_what_teaches_nothing(caplog):
    assert clean([" a text ", "", "  ", "ab", "a text", "other"], 2) == ["a text", "other"]
    assert "left out 4 texts" in caplog.text
    with pytest.raises(TriternError, match="needs at least 3 different texts .* received 2 .of 4"):
        clean(["one", "two", "two", ""], 3)
    with pytest.raises(TriternError, match="texts must be strings; number 1 is int"):
        clean(["one", 2], 1)
    with pytest.raises(TriternError, match="texts must be a list or another iterable; received one string"):
        clean("one", 1)


def test_joined_and_prefixed():
    texts = [str(i) for i in range(100)]
    assert joined(texts, 0.0) == texts
    longer = joined(texts, 0.5)
    assert " ".join(longer) == " ".join(texts) and 10 < len(longer) < 60
    with pytest.raises(TriternError, match="joined_ratio is a share of the texts, from 0 to 1; received 2"):
        joined(texts, 2)
    assert longer == joined(texts, 0.5) and longer != joined(texts, 0.5, seed=1)
    assert prefixed(["a", "b", "c"], ["query: ", "passage: "]) == ["query: a", "passage: b", "query: c"]
    assert prefixed(["a"], []) == ["a"]


def test_length_batches():
    lengths = torch.randint(1, 100, (1000,)).tolist()
    one = LengthBatches(lengths, 20, drop_last=False)
    batches = list(one)
    assert sorted(i for b in batches for i in b) == list(range(1000)) and len(batches) == len(one) == 50
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)
    assert spread < 5
    assert batches == list(LengthBatches(lengths, 20, drop_last=False))
    one.set_epoch(1)
    assert batches != list(one)
    halves = list(LengthBatches(lengths, 10, drop_last=False, processes=2))
    assert [a + b for a, b in zip(halves[::2], halves[1::2])] == batches
    for processes, size in ((1, 20), (2, 10)):
        kept = LengthBatches(lengths[:95], size, drop_last=True, processes=processes)
        left_out = []
        for epoch in range(3):
            kept.set_epoch(epoch)
            batches = list(kept)
            assert len(batches) == len(kept) == 4 * processes
            left_out.append(set(range(95)) - {i for b in batches for i in b})
        assert left_out[0] != left_out[1] != left_out[2]  # by chance, and not always the longest
        every = LengthBatches(lengths[:95], size, drop_last=False, processes=processes)
        assert len(every) == len(list(every)) == (5 if processes == 1 else 10)
        assert sorted(i for b in every for i in b) == list(range(95))


def test_batches_are_sorted_by_tokens_and_hold_little_padding(tiny, sentences, tmp_path):
    wordy = ["b " * n for n in (5, 40, 90)]  # a character that is one token
    texts = wordy + sentences[:397]
    counts = token_counts(tiny.tokenizer, texts, 50)
    assert counts[:3] == [7, 42, 50] and token_counts(tiny.tokenizer, texts, None)[2] == 92
    assert token_counts(None, texts, 50)[:3] == [10, 80, 180]
    batch = tiny.preprocess(texts[:20])
    assert counts[3:20] == batch["attention_mask"].sum(1).tolist()[3:]
    args = TernaryDistillationArguments(output_dir=str(tmp_path), report_to="none", max_length=50, **SMALL)
    data = Dataset.from_dict({"text": texts})
    masks = [b["text_attention_mask"] for b in TernaryDistiller(tiny, args, data).get_train_dataloader()]
    assert len(masks) == 25 and max(m.shape[1] for m in masks) == 50
    assert sum(m.numel() for m in masks) < 1.1 * sum(int(m.sum()) for m in masks)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(tiny, sentences, tmp_path):
    with torch.no_grad():
        tiny[0].auto_model.embeddings.LayerNorm.weight[0] = torch.inf
    with pytest.raises(TriternError, match=r"the loss is nan at step 0; the batch is kept in .*bad_batch-0"):
        tritern.distill(tiny, sentences, tmp_path, holdout=0, learning_rate=1e-3, **SMALL)
    batch = load_file(tmp_path / "bad_batch-0.safetensors")
    assert batch["text_input_ids"].shape[0] == 16


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 bytes")]
)
def test_out_of_memory_says_what_to_lower(tiny, sentences, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(TernaryDistiller, "compute_loss", fail)
    with pytest.raises(TriternError, match="per_device_train_batch_size .now 16.*max_length .now 128"):
        tritern.distill(tiny, sentences, tmp_path, holdout=0, **SMALL)
    with pytest.raises(TriternError, match="the student comes from a run that ended early: load it again"):
        tritern.distill(tiny, sentences, tmp_path, holdout=0, **SMALL)


def test_out_of_memory_in_the_optimizer_is_explained_too(tiny, sentences, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(TriternError, match="per_device_train_batch_size .now 16"):
        tritern.distill(tiny, sentences, tmp_path, holdout=0, **SMALL)


def test_no_batch_that_fits(tiny, sentences, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(TernaryDistiller, "compute_loss", fail)
    with pytest.raises(TriternError, match="No executable batch size found.*Lower per_device_train_batch_s"):
        settings = {**SMALL, "per_device_train_batch_size": 2}
        tritern.distill(tiny, sentences, tmp_path, holdout=0, auto_find_batch_size=True, **settings)


def test_students_and_teachers_that_do_not_fit(tiny, tiny_path, minilm, sentences, tmp_path):
    args = TernaryDistillationArguments(output_dir=str(tmp_path), report_to="none", **SMALL)
    with pytest.raises(TriternError, match="same tokenizer; their vocabularies differ"):
        TernaryDistiller(tiny, args, None, teacher=minilm)
    with pytest.raises(TriternError, match="teacher must be a model, None or 'labels'; received 'labls'"):
        TernaryDistiller(tiny, args, None, teacher="labls")
    shallow = SentenceTransformer(tiny_path, device="cpu")
    del shallow[0].auto_model.encoder.layer[1]
    with pytest.raises(
        TriternError, match="hidden_weight must be 0: the student has 2 blocks, the teacher 1"
    ):
        tritern.distill(
            SentenceTransformer(tiny_path, device="cpu"), sentences, tmp_path, teacher=shallow, holdout=0,
            **SMALL,
        )  # fmt: skip


def test_what_a_ternary_student_cannot_have(tiny, tiny_path, sentences, tmp_path):
    teacher, other = (SentenceTransformer(tiny_path, device="cpu") for _ in range(2))
    model = tritern.patch(tiny)
    other.tokenizer.add_tokens(["qqq"])
    for settings, message in (
        ({}, "needs its original as the teacher: pass teacher="),
        ({"teacher": teacher, "blend_ratio": 0.3}, "keeps its settings: .*received None and 0.3"),
        ({"teacher": teacher, "config": tritern.TernaryConfig("twn")}, "config must be None .*rule='twn'"),
        ({"teacher": other}, "must have the same tokenizer"),
        ({"teacher": teacher, "holdout": 395}, "needs at least 411 different texts"),
    ):
        with pytest.raises(TriternError, match=message):
            tritern.distill(model, sentences, tmp_path, **{**SMALL, **settings})
        assert sum(isinstance(m, tritern.TernaryLinear) for m in model.modules()) == 12  # as it was


def test_texts_longer_than_the_maximum_are_cut(tiny_path, sentences, tmp_path):
    args = TernaryDistillationArguments(output_dir=str(tmp_path), report_to="none", **SMALL)
    for length, expected in ((128, 64), (None, 64), (10, 10)):
        args.max_length = length
        distiller = TernaryDistiller(SentenceTransformer(tiny_path, device="cpu"), args)
        batch = distiller.data_collator([{"text": " ".join(sentences)}, {"text": sentences[0]}])
        assert batch["text_input_ids"].shape == (2, expected)


def test_a_half_precision_student_is_trained_in_float32(tiny, tmp_path, caplog):
    args = TernaryDistillationArguments(output_dir=str(tmp_path), report_to="none", **SMALL)
    TernaryDistiller(tiny.half(), args)
    assert "the student is cast to float32" in caplog.text
    assert {p.dtype for p in tiny.parameters()} == {torch.float32}


def test_prompts_and_samplers_of_the_trainer_are_heard(tiny_path, sentences, tmp_path):
    batches = []
    for extra in ({}, {"prompts": {"text": "ba da "}, "batch_sampler": "no_duplicates"}):
        args = TernaryDistillationArguments(output_dir=str(tmp_path), report_to="none", **SMALL, **extra)
        student = SentenceTransformer(tiny_path, device="cpu")
        distiller = TernaryDistiller(student, args, Dataset.from_dict({"text": sentences}))
        ids = next(iter(distiller.get_train_dataloader()))["text_input_ids"]
        batches.append(student.tokenizer.batch_decode(ids))
        spread = {row.count("[PAD]") for row in batches[-1]}
        assert (max(spread) < 5) == (not extra)  # sorted by length, or not
    assert all(row.startswith("[CLS] ba da ") for row in batches[1])
    assert not any(row.startswith("[CLS] ba da ") for row in batches[0])


def test_every_prompt_of_the_model_is_trained_with_also_an_empty_one(tiny, sentences, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def stop(model, args, train_dataset, **kwargs):
        raise Seen(train_dataset["text"][:2])

    monkeypatch.setattr("tritern.distillation.job.TernaryDistiller", stop)
    for prompts, expected in (
        ({"query": "ask ", "document": ""}, ["ask " + sentences[0], sentences[1]]),
        ({"query": "", "document": ""}, sentences[:2]),
    ):
        tiny.prompts = prompts
        with pytest.raises(Seen) as seen:
            tritern.distill(tiny, sentences, tmp_path, holdout=0, joined_ratio=0, **SMALL)
        assert seen.value.args[0] == expected


def test_several_visible_gpus_in_one_process(tmp_path, monkeypatch, caplog):
    one = TrainingArguments._setup_devices.func

    def two(self):
        device, self._n_gpu = one(self), 2
        return device

    devices = cached_property(two)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    args = TernaryDistillationArguments(output_dir=str(tmp_path), per_device_train_batch_size=16)
    assert args.n_gpu == 1 and args.train_batch_size == 16
    assert "2 GPUs are visible and one is used: start with torchrun --nproc-per-node=2" in caplog.text


def test_flattened_batches_are_refused(tiny, sentences, tmp_path, monkeypatch):
    args = TernaryDistillationArguments(output_dir=str(tmp_path), report_to="none", **SMALL)
    distiller = TernaryDistiller(tiny, args)
    features = {k: v for k, v in tiny.preprocess(sentences[:4]).items() if k != "attention_mask"}
    student = {"sentence_embedding": torch.randn(4, 32)}
    for model in (tiny, distiller.objective._teacher[0]):
        monkeypatch.setattr(model, "forward", lambda features: student)
    with pytest.raises(TriternError, match=r"hidden_weight need padded batches .*unpad_inputs = False"):
        distiller.objective([features])


def test_wrong_settings(tiny, sentences, tmp_path):
    for settings, message in (
        ({"blend_ratio": 1.5}, "blend_ratio is a share of the steps, from 0 to 1; received 1.5"),
        ({"cosine_weight": -1.0}, "cosine_weight must not be negative; received -1.0"),
        ({"temperature": 0.0}, "temperature must be positive; received 0.0"),
        ({"max_length": 0}, "max_length must be at least 1; received 0"),
        ({"matryoshka_dims": [8, -1]}, "matryoshka_dims must be at least 1; received -1"),
        ({"matryoshka_dims": [8, 33]}, r"at most 32, the width of the model's vectors; received \[8, 33\]"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "steps"},
            "settings: --load_best_model_at_end req",
        ),
        ({"resume_from_checkpoint": "x"}, "resume_from_checkpoint has no effect here: pass resume=True"),
        ({"cosine_weight": 0.0, "similarity_weight": 0.0, "hidden_weight": 0.0}, "all loss weights are 0"),
        ({"batch_size": 3}, "unknown settings: batch_size"),
    ):
        with pytest.raises(TriternError, match=message):
            tritern.distill(tiny, sentences, tmp_path, **{**SMALL, **settings})
    assert not any(isinstance(m, TrainableTernaryLinear) for m in tiny.modules()), "left as it was"
    with pytest.raises(TriternError, match="column and limit go with a file or data set"):
        tritern.distill(tiny, sentences, tmp_path, limit=50, **SMALL)
    with pytest.raises(
        TriternError, match=r"10 training texts are left after holdout .0. and joining.*takes 16"
    ):
        tritern.distill(tiny, sentences[:40], tmp_path, holdout=0, joined_ratio=1.0, **SMALL)
    with pytest.raises(TriternError, match="holdout must be 0 or at least 12; received 5"):
        tritern.distill(tiny, sentences, tmp_path, holdout=5, **SMALL)
    with pytest.raises(TriternError, match="rule must be one of"):
        tritern.distill(tiny, sentences, tmp_path, config=TernaryConfig(rule="best"), **SMALL)
