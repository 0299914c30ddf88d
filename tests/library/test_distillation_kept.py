"""A run changes the model that it makes ternary, and nothing else of its caller's."""

import copy
import dataclasses
import os
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import nn

import tritern
from tritern.distillation import FidelityEvaluator, TernaryDistillationArguments, TernaryDistiller
from tritern.distillation.arguments import suggested_learning_rate
from tritern.distillation.kept import cuts_and_padding, device_kept, without_dropout

SMALL = {"per_device_train_batch_size": 16, "max_steps": 2, "disable_tqdm": True, "save_strategy": "no"}
SMALL |= {"use_cpu": True, "gradient_accumulation_steps": 1}


def dropout(model):
    return {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}


def modes(model):
    return {name: m.training for name, m in model.named_modules()}


def gradients(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("holdout", [0, 40])
def test_dropout_and_mode_of_the_student(tiny, sentences, tmp_path, holdout, training):
    tiny.train(training)
    before, seen = dropout(tiny), []

    class Watch(FidelityEvaluator):
        def __call__(self, model, *args, **kwargs):
            seen.append({*dropout(model).values()})
            return super().__call__(model, *args, **kwargs)

    judge = Watch(sentences[:12], tiny.encode(sentences[:12]))
    tiny.train(training)
    model = tritern.distill(
        tiny, sentences, tmp_path, holdout=holdout, evaluator=judge, eval_steps=1, train_embeddings=False,
        config=tritern.TernaryConfig(), **SMALL,
    )  # fmt: skip
    assert seen == [{0.0}, {0.0}], "none in training"
    assert dropout(model) == before and {*before.values()} == {0.1}
    assert {*modes(model).values()} == {training}
    assert all(gradients(model).values())


def test_dropout_and_modes_also_after_a_failure(tiny, sentences, tmp_path, monkeypatch):
    before = dropout(tiny)
    tiny.eval()

    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(TernaryDistiller, "compute_loss", fail)
    with pytest.raises(RuntimeError, match="broken"):
        tritern.distill(tiny, sentences, tmp_path, holdout=0, train_embeddings=False, **SMALL)
    assert dropout(tiny) == before and not any(modes(tiny).values())
    assert all(gradients(tiny).values())


def test_dropout_of_attention_is_a_number():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_dropout, self.heads, self.drop = 0.3, 0.5, nn.Dropout(1)

    module = Attention()
    with pytest.raises(KeyError), without_dropout(module):
        assert (module.attention_dropout, module.heads, module.drop.p) == (0, 0.5, 0)
        raise KeyError
    assert (module.attention_dropout, module.heads, module.drop.p) == (0.3, 0.5, 1)


def test_arguments_serve_another_run(tiny_path, sentences, tmp_path):
    """The second model is larger by its embeddings, and so gets a smaller learning rate of its own."""
    args = TernaryDistillationArguments(output_dir=str(tmp_path), report_to="none", **SMALL)
    before = copy.deepcopy(dataclasses.asdict(args))
    rates = []
    for rows in (0, 50_000):
        model = SentenceTransformer(tiny_path, device="cpu")
        if rows:
            model[0].auto_model.embeddings.position_embeddings = nn.Embedding(rows, 32)
        distiller = TernaryDistiller(model, args, Dataset.from_dict({"text": sentences}))
        rates.append(distiller.args.learning_rate)
        size = sum(p.numel() for p in model.parameters())
        assert rates[-1] == pytest.approx(suggested_learning_rate(size))
        distiller.train()
        assert dataclasses.asdict(args) == before and args.learning_rate is None
    assert rates[1] < 0.5 * rates[0]
    args.temperature = 0.5
    assert distiller.objective.args.temperature == distiller.args.temperature == 0.05


@pytest.mark.parametrize("holdout", [0, 40])
def test_the_teacher_stays_as_it_is(tiny, tiny_path, sentences, tmp_path, holdout):
    teacher = SentenceTransformer(tiny_path, device="cpu").train()
    teacher[0].auto_model.embeddings.requires_grad_(False)
    was = modes(teacher), gradients(teacher), dropout(teacher), copy.deepcopy(teacher.state_dict())
    tritern.distill(tiny, sentences, tmp_path, teacher=teacher, holdout=holdout, **SMALL)
    assert (modes(teacher), gradients(teacher), dropout(teacher)) == was[:3]
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in was[3].items())


def test_a_teacher_in_training_mode_teaches_without_dropout(tiny_path, sentences, tmp_path):
    losses = []
    for training in (False, True):
        teacher = SentenceTransformer(tiny_path, device="cpu").train(training)
        student, found = SentenceTransformer(tiny_path, device="cpu"), tmp_path / str(training)
        args = TernaryDistillationArguments(
            output_dir=str(found), report_to="none", logging_steps=1, blend_ratio=0, learning_rate=1e-3,
            **SMALL,
        )  # fmt: skip
        distiller = TernaryDistiller(student, args, Dataset.from_dict({"text": sentences}), teacher=teacher)
        distiller.train()
        losses.append([entry["loss"] for entry in distiller.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def test_a_model_is_back_on_its_device():
    class Moved:
        device, moves = torch.device("cpu"), ()

        def parameters(self):
            yield self

        def to(self, device):
            self.device, self.moves = device, (*self.moves, device)

    model = Moved()
    with pytest.raises(KeyError), device_kept(model):
        model.device = torch.device("cuda:0")
        raise KeyError
    assert model.moves == (torch.device("cpu"),)
    with device_kept(model), device_kept(None):
        pass
    assert len(model.moves) == 1


def test_the_tokenizer_is_saved_as_it_was(tiny, tiny_path, sentences, tmp_path):
    """It cuts to ``max_length`` in training; other programs would cut so by the file it is saved in."""

    def settings(model):
        inner = model.tokenizer.backend_tokenizer
        return inner.truncation, inner.padding, model.max_seq_length, model.tokenizer.model_max_length

    before = settings(tiny)
    training = {**SMALL, "save_strategy": "steps", "save_steps": 1, "max_length": 16}
    tritern.distill(tiny, sentences, tmp_path, holdout=0, **training)
    assert settings(tiny) == before
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert settings(SentenceTransformer(str(folder), device="cpu")) == before


def test_cutting_that_was_on_is_on_again(tiny):
    inner = tiny.tokenizer.backend_tokenizer
    inner.enable_truncation(7)
    inner.enable_padding(length=9)
    was, put_back = (inner.truncation, inner.padding), cuts_and_padding(tiny.tokenizer)
    inner.no_truncation()
    inner.no_padding()
    put_back()
    assert (inner.truncation, inner.padding) == was
    cuts_and_padding(None)()


def test_random_generators_and_the_environment(tiny, sentences, tmp_path):
    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = drawn()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    environment, texts = dict(os.environ), list(sentences)
    tritern.distill(tiny, texts, tmp_path, holdout=40, seed=3, **SMALL)
    assert drawn() == expected
    assert dict(os.environ) == environment and texts == sentences
    with pytest.raises(tritern.TriternError):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(5)
        tritern.distill(tiny, texts, tmp_path, holdout=40, **SMALL)  # ternary already
    assert drawn() == expected
