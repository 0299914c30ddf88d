import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import TrainerCallback

import tritern
from tritern import CheckpointError, TernaryLinear, TriternError
from tritern.distillation import FidelityEvaluator, TernaryDistillationArguments, TernaryDistiller
from tritern.distillation.arguments import suggested_learning_rate
from tritern.distillation.resuming import STATE_FILE
from tritern.engine.encoder import encode
from tritern.nn.embedding import QuantizedEmbedding
from tritern.texts.sample import drawn

from .forks import run_script

ROOT = Path(__file__).parents[2]
SMALL = {"per_device_train_batch_size": 16, "max_steps": 12, "disable_tqdm": True, "learning_rate": 3e-3}
SMALL |= {"use_cpu": True, "gradient_accumulation_steps": 1}


def held_out(texts, count=64, seed=42):
    """Those that a run with the default seed keeps out of training."""
    return [texts[i] for i in drawn(texts, count, seed)]


def losses(folder):
    record = json.loads((Path(folder) / "distillation.json").read_text())
    return [entry["loss"] for entry in record["log"] if "loss" in entry]


def test_raw_text_in_a_closer_ternary_model_out(tiny, tiny_path, sentences, tmp_path):
    teacher = SentenceTransformer(tiny_path, device="cpu")
    model = tritern.distill(
        tiny, sentences, tmp_path, holdout=64, joined_ratio=0, **{**SMALL, "max_steps": 60}
    )
    assert model is tiny
    assert sum(isinstance(m, TernaryLinear) for m in model.modules()) == 12
    record = json.loads((tmp_path / "distillation.json").read_text())
    before, after = record["fidelity"]["ternary, not trained"], record["fidelity"]["ternary, distilled"]
    assert after["cosine"] > before["cosine"] + 0.02 and after["overlap"] > before["overlap"]
    again = tritern.evaluate(model, teacher, held_out(sentences))
    assert after["cosine"] == pytest.approx(again.cosine, abs=1e-6)
    assert record["data"] == {
        "source": "texts given to the call", "texts": 336, "column": None, "limit": None, "holdout": 64,
        "prefixes": [], "joined_ratio": 0,
    }  # fmt: skip
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert np.array_equal(loaded.encode(sentences[:20]), model.encode(sentences[:20]))
    card = (tmp_path / "README.md").read_text()
    assert f"{after['cosine']:.4f}" in card and "| max_steps | 60 |" in card and "12 linear layers" in card
    assert f"{record['bits_per_weight']:.2f} bits per weight" in card and "| holdout | 64 |" in card
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1}, "as it was"


FORMS = TernaryLinear, QuantizedEmbedding
FURTHER = {k: v for k, v in SMALL.items() if k != "learning_rate"} | {"save_strategy": "no"}


def codes(model):
    return {n: (m.weight, m.weight_scale) for n, m in model.named_modules() if isinstance(m, FORMS)}


@pytest.mark.parametrize("half", [False, True])
def test_a_ternary_model_opened_for_training_is_what_it_was(tiny_path, sentences, tmp_path, half):
    """What was skipped stays out, whatever the rule and the bits; codes and scales are the same."""
    teacher = SentenceTransformer(tiny_path, device="cpu")
    skip = "*.layer.0.output.dense", "*.word_embeddings"
    config = tritern.TernaryConfig("twn", activation_bits=16, skip=skip)
    model = tritern.patch(SentenceTransformer(tiny_path, device="cpu"), config)
    model = model.half() if half else model
    before = codes(model)
    assert len(before) == 11
    settings = {**FURTHER, "max_steps": 1, "learning_rate": 1e-12}
    tritern.distill(model, sentences, tmp_path, teacher=teacher, holdout=64, **settings)
    record = json.loads((tmp_path / "distillation.json").read_text())
    assert record["fidelity"].keys() == {"ternary, as given", "ternary, distilled"}
    assert record["config"]["activation_bits"] == record["config"]["embedding_bits"] == 16
    after = codes(model)
    assert after.keys() == before.keys()
    for name, (weight, scale) in before.items():
        assert torch.equal(after[name][0], weight)
        assert torch.allclose(after[name][1], scale, rtol=1e-6)


def test_a_ternary_model_is_trained_on_from_where_it_is(tiny_path, sentences, tmp_path):
    teacher = SentenceTransformer(tiny_path, device="cpu")
    patched = tritern.patch(SentenceTransformer(tiny_path, device="cpu"), embedding_bits=8)
    patched.save_pretrained(tmp_path / "t")
    start = tritern.load(tmp_path / "t", device="cpu")
    settings = {**FURTHER, "max_steps": 60, "save_strategy": "steps", "save_steps": 30, "logging_steps": 1}
    model = tritern.distill(
        str(tmp_path / "t"), sentences, tmp_path / "on", teacher=teacher, holdout=64, **settings
    )
    record = json.loads((tmp_path / "on" / "distillation.json").read_text())
    given, distilled = (f["cosine"] for f in record["fidelity"].values())
    assert given == pytest.approx(tritern.evaluate(start, teacher, held_out(sentences)).cosine, abs=1e-4)
    assert distilled > given + 0.02
    assert record["settings"]["blend_ratio"] == 0 and record["config"]["embedding_bits"] == 8
    assert record["settings"]["learning_rate"] == pytest.approx(
        0.4 * suggested_learning_rate(sum(p.numel() for p in teacher.parameters())), rel=0.01
    )
    was, now = codes(start), codes(model)
    flipped = {n: (now[n][0] != was[n][0]).float().mean() for n in was if was[n][0].dtype == torch.uint8}
    assert len(flipped) == 12 and all(0 < share < 0.9 for share in flipped.values())
    card = (tmp_path / "on" / "README.md").read_text()
    assert "# Ternary version of model" in card and "going on from t." in card
    (tmp_path / "on" / "checkpoint-60").rename(tmp_path / "last")
    tritern.distill(
        str(tmp_path / "t"), sentences, tmp_path / "on", teacher=teacher, holdout=64, resume=True, **settings
    )
    assert losses(tmp_path / "on") == [entry["loss"] for entry in record["log"] if "loss" in entry]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_ternary_model_is_trained_on_by_vectors(tiny_path, sentences, tmp_path, bits):
    teacher = SentenceTransformer(tiny_path, device="cpu")
    model = tritern.patch(SentenceTransformer(tiny_path, device="cpu"), embedding_bits=bits)
    settings = {**FURTHER, "max_steps": 60, "teacher": teacher.encode(sentences), "holdout": 64}
    with pytest.raises(TriternError, match="hidden_weight must be 0"):
        tritern.distill(model, sentences, tmp_path, **settings)
    assert len(codes(model)) == 13  # refused before anything was changed
    tritern.distill(model, sentences, tmp_path, hidden_weight=0.0, **settings)
    record = json.loads((tmp_path / "distillation.json").read_text())
    given, distilled = record["fidelity"].values()
    assert distilled["cosine"] > given["cosine"] + 0.02
    assert record["config"]["embedding_bits"] == bits == tritern.summary(model).tables[0].bits


def test_an_interrupted_run_resumed_equals_one_that_was_not(tiny_path, sentences, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == self.at

    settings = {**SMALL, "save_steps": 3, "save_strategy": "steps", "logging_steps": 1,
                "blend_ratio": 0.4}  # fmt: skip
    models = {}
    for name, stops in (("whole", []), ("parts", [3, 9])):  # 3: in the blend; 9: after it
        for at in [*stops, None]:
            stop = Stop()
            stop.at = at
            models[name] = tritern.distill(
                SentenceTransformer(tiny_path, device="cpu"), sentences, tmp_path / name, holdout=0,
                callbacks=[stop], resume=name == "parts", **settings,
            )  # fmt: skip
    assert len(losses(tmp_path / "whole")) == 12
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    ours, theirs = models["parts"].state_dict(), models["whole"].state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    record = json.loads((tmp_path / "parts" / "distillation.json").read_text())
    assert record["resumed_from"] == "checkpoint-9"
    assert "since it was resumed from checkpoint-9" in (tmp_path / "parts" / "README.md").read_text()
    other = SentenceTransformer(tiny_path, device="cpu")
    with torch.no_grad():
        other[0].auto_model.embeddings.word_embeddings.weight.mul_(1.01)
    for texts, teacher, change, message in (
        (sentences[1:], None, {"max_steps": 20}, r"max_steps \(12, now 20\), training texts \("),
        (sentences, None, {"hidden_weight": 1.0}, r"hidden_weight \(3.0, now 1.0\):"),
        (sentences, None, {"learning_rate": 1e-3}, r"learning_rate \(0.003, now 0.001\):"),
        (sentences, None, {"per_device_train_batch_size": 8}, r"texts per batch \(16, now 8\):"),
        (sentences, other, {}, r"teacher \(\w+, now \w+\):"),
    ):
        student, changed = SentenceTransformer(tiny_path, device="cpu"), {**settings, **change}
        with pytest.raises(TriternError, match=f"belongs to a run with other {message}"):
            tritern.distill(
                student, texts, tmp_path / "whole", teacher=teacher, holdout=0, resume=True, **changed
            )
    with pytest.raises(
        TriternError, match="already holds checkpoints of a run .checkpoint-12.; go on with res"
    ):
        tritern.distill(SentenceTransformer(tiny_path), sentences, tmp_path / "whole", **SMALL)


def test_a_checkpoint_whose_writing_was_interrupted_is_left_out(tiny_path, sentences, tmp_path, caplog):
    settings = {**SMALL, "max_steps": 6, "save_steps": 3, "save_strategy": "steps", "logging_steps": 1}
    for resume in (False, True):
        student = SentenceTransformer(tiny_path, device="cpu")
        tritern.distill(student, sentences, tmp_path, holdout=0, resume=resume, **settings)
        if not resume:
            whole = losses(tmp_path)
            (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    assert "checkpoint-6 is incomplete" in caplog.text and losses(tmp_path) == whole
    assert json.loads((tmp_path / "distillation.json").read_text())["resumed_from"] == "checkpoint-3"
    (tmp_path / "checkpoint-6" / STATE_FILE).write_bytes(b"cut")


def test_another_model_as_the_teacher(tiny_path, sentences, tmp_path):
    teacher = SentenceTransformer(tiny_path, device="cpu")
    with torch.no_grad():  # other vectors from the same tokenizer
        teacher[0].auto_model.embeddings.LayerNorm.bias.normal_(generator=torch.manual_seed(0))
    found = {}
    for name, given in (("itself", None), ("other", teacher)):
        student = SentenceTransformer(tiny_path, device="cpu")
        settings = {**SMALL, "max_steps": 60}
        tritern.distill(student, sentences, tmp_path / name, teacher=given, holdout=64, **settings)
        found[name] = tritern.evaluate(student, teacher, held_out(sentences)).cosine
        record = json.loads((tmp_path / name / "distillation.json").read_text())
        assert given is None or record["fidelity"]["ternary, distilled"]["cosine"] == pytest.approx(
            found[name], abs=1e-6
        )
    assert found["other"] > found["itself"] + 0.05


def test_evaluation_sets_do_not_take_the_order_of_the_training_set(tiny, sentences, tmp_path):
    args = TernaryDistillationArguments(output_dir=str(tmp_path), report_to="none", **SMALL)
    distiller = TernaryDistiller(tiny, args, dataset(sentences), eval_dataset=dataset(sentences[:32]))
    distiller.get_train_dataloader()
    distiller.get_eval_dataloader()
    assert len(distiller._batches.lengths) == len(sentences)


def test_mixed_precision_ends_with_training(tiny, sentences, tmp_path):
    model = tritern.distill(tiny, sentences, tmp_path, holdout=64, bf16=True, **SMALL)
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert np.array_equal(loaded.encode(sentences[:20]), model.encode(sentences[:20]))


def test_the_order_of_an_epoch_follows_its_number(tiny, sentences, tmp_path):
    """Also where wrappers of the sampler would not pass it on, as in a resumed run of several processes."""
    args = TernaryDistillationArguments(output_dir=str(tmp_path), report_to="none", **SMALL)
    distiller = TernaryDistiller(tiny, args, dataset(sentences))
    distiller.get_train_dataloader()
    schedule = next(c for c in distiller.callback_handler.callbacks if type(c).__name__ == "_Schedule")
    for epoch, expected in ((None, 0), (0.99999999, 1), (1.37, 1)):
        distiller.state.epoch = epoch
        schedule.on_epoch_begin(args, distiller.state, distiller.control)
        assert distiller._batches.epoch == expected


def dataset(texts):
    from datasets import Dataset

    return Dataset.from_dict({"text": texts})


def test_checkpoints_hold_the_packed_model_that_was_scored(tiny, tiny_path, sentences, tmp_path):
    scored = {}

    class Keep(FidelityEvaluator):
        def __call__(self, model, output_path=None, epoch=-1, steps=-1):
            scored[steps] = encode(model, sentences[:10])  # as the evaluator does
            return super().__call__(model, output_path, epoch, steps)

    judge = Keep(sentences[:40], tiny.encode(sentences[:40]))
    model = tritern.distill(
        tiny, sentences, tmp_path, holdout=0, evaluator=judge, eval_steps=4, save_steps=4, blend_ratio=1.0,
        load_best_model_at_end=True, metric_for_best_model="fidelity_overlap", **SMALL,
    )  # fmt: skip
    for steps in (4, 8, 12):
        folder = tmp_path / f"checkpoint-{steps}"
        loaded = SentenceTransformer(str(folder), device="cpu")
        assert sum(isinstance(m, TernaryLinear) for m in loaded.modules()) == 12
        assert np.array_equal(loaded.encode(sentences[:10]), scored[steps])
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    best = int(state["best_model_checkpoint"].rpartition("-")[2])
    assert np.array_equal(model.encode(sentences[:10]), scored[best])
    (tmp_path / "checkpoint-12" / STATE_FILE).unlink()
    student = SentenceTransformer(tiny_path, device="cpu")
    with pytest.raises(CheckpointError, match="has no training_state.safetensors"):
        checkpoint = str(tmp_path / "checkpoint-12")
        tritern.distill(student, sentences, tmp_path / "other", resume=checkpoint, **SMALL)


def test_every_setting_changes_the_run(tiny_path, sentences, tmp_path):
    """One step with each: another loss or another model than with the defaults."""
    changes = [
        {}, {"cosine_weight": 0.5}, {"similarity_weight": 0.0}, {"hidden_weight": 0.0},
        {"last_hidden_weight": 1.0},
        {"temperature": 0.5}, {"matryoshka_dims": [8, 32]}, {"joined_ratio": 0.0},
        {"layer_fade_start": 0.0}, {"learn_scale": False}, {"clip": 0.5}, {"blend_ratio": 1.0},
        {"train_embeddings": False}, {"train_rounded_embeddings": False}, {"cpu_bf16": False},
        {"cpu_bf16": True}, {"max_length": 8}, {"group_by_length": False}, {"learning_rate": 1e-4},
        {"layer_fade_start": 0.0, "layer_fade": 0.5},
        {"bf16": True},
    ]  # fmt: skip
    results = {}
    for change in changes:
        settings = {**SMALL, "max_steps": 2, "logging_steps": 1, "cpu_bf16": False, **change}
        model = SentenceTransformer(tiny_path, device="cpu")
        folder = tmp_path / str(len(results))
        tritern.distill(model, sentences, folder, holdout=0, save_strategy="no", **settings)
        state = b"".join(t.float().numpy().tobytes() for t in model.state_dict().values())
        results[json.dumps(change)] = (tuple(losses(folder)), hash(state))
    same = json.dumps({"cpu_bf16": False})
    assert results.pop(same) == results["{}"]
    assert len(set(results.values())) == len(results), [k for k, v in results.items() if v == results["{}"]]


def test_terms_are_balanced_as_without_the_blend(tiny_path, sentences, tmp_path):
    """On the first batch the blended student equals its teacher, so its gradients say nothing."""
    found, first = {}, {}
    for blend in (0.0, 0.5):
        args = TernaryDistillationArguments(
            output_dir=str(tmp_path), report_to="none", blend_ratio=blend, logging_steps=1, cpu_bf16=False,
            **{**SMALL, "max_steps": 2},
        )  # fmt: skip
        student = SentenceTransformer(tiny_path, device="cpu")
        config = tritern.TernaryConfig(embedding_bits=16)  # rounded tables alone would differ
        distiller = TernaryDistiller(student, args, dataset(sentences), config=config)
        distiller.train()
        found[blend] = distiller.objective.balance.tolist()
        first[blend] = distiller.state.log_history[0]["loss"]
    assert first[0.5] < 1e-6 < 1e-3 < first[0.0]
    assert found[0.5] == found[0.0]
    cosine, similarity, hidden, *unused = found[0.5]
    assert cosine == 1 and 0 < similarity != 1 and 0 < hidden != 1 and unused == [1]


def test_teacher_vectors_instead_of_a_teacher(tiny_path, sentences, tmp_path):
    model = SentenceTransformer(tiny_path, device="cpu")
    vectors = model.encode(sentences)
    settings = {**SMALL, "hidden_weight": 0.0, "logging_steps": 1, "cpu_bf16": False}
    tritern.distill(model, sentences, tmp_path / "a", teacher=vectors, holdout=40, **settings)
    own = SentenceTransformer(tiny_path, device="cpu")
    tritern.distill(own, sentences, tmp_path / "b", holdout=40, joined_ratio=0, **settings)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-3)
    asking = SentenceTransformer(tiny_path, device="cpu", prompts={"query": "ba ", "document": "da "})
    tritern.distill(asking, sentences, tmp_path / "e", teacher=vectors, holdout=40, **settings)
    assert losses(tmp_path / "e") == losses(tmp_path / "a"), "the vectors are of texts without prompts"
    with pytest.raises(TriternError, match="texts must be strings; number 1 is int"):
        tritern.distill(own, ["one", 2], tmp_path / "c", teacher=vectors[:2], **settings)
    student = SentenceTransformer(tiny_path, device="cpu")
    with pytest.raises(TriternError, match="hidden_weight must be 0 with precomputed teacher vectors"):
        tritern.distill(student, sentences, tmp_path / "c", teacher=vectors, **SMALL)
    for wrong, message in (
        (vectors[:5], r"shape \[400, width\], one row per text; received \[5, 32\]"),
        (vectors * np.nan, "teacher vectors: the vector number 0 holds NaN"),
    ):
        student = SentenceTransformer(tiny_path, device="cpu")
        with pytest.raises(TriternError, match=message):
            tritern.distill(student, sentences, tmp_path / "c", teacher=wrong, **settings)
    with pytest.raises(
        TriternError, match="vectors have 8 dimensions and the student's 32: set cosine_weight=0"
    ):
        student = SentenceTransformer(tiny_path, device="cpu")
        tritern.distill(student, sentences, tmp_path / "d", teacher=vectors[:, :8], holdout=0, **settings)


TORCHRUN = """
import os, sys, torch, tritern
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
torch.set_num_threads(1)
folder, batch, model = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sentences = open(sys.argv[4]).read().splitlines()
tritern.distill(
    SentenceTransformer(model, device="cpu"), sentences, folder, holdout=0, per_device_train_batch_size=batch,
    max_steps=8, logging_steps=1, use_cpu=True, disable_tqdm=True, learning_rate=1e-3,
    last_hidden_weight=0.1, gradient_accumulation_steps=1, blend_ratio=0.15, cpu_bf16=False,
)
assert PartialState().num_processes == int(os.environ["WORLD_SIZE"]), "each process would write the model"
"""


def test_two_processes_give_the_curve_of_one_with_twice_the_batch(tiny_path, sentences, tmp_path):
    script, texts = tmp_path / "train.py", tmp_path / "texts.txt"
    script.write_text(TORCHRUN)
    texts.write_text("\n".join(sentences))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += map(str, [script, tmp_path / "2", 16, tiny_path, texts])
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    done = run_script(TORCHRUN, tmp_path / "1", 32, tiny_path, texts, WORLD_SIZE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 8 and one[-1] < one[1]  # the first is still blended
    assert two == pytest.approx(one, rel=5e-4)
