"""Compiled, exported and captured models give the vectors of the eager one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tritern

ROOT = Path(__file__).parents[2]


@pytest.fixture
def inputs(minilm, texts):
    return dict(minilm.tokenizer(texts, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_minilm_equals_eager(minilm, inputs, backend):
    model = tritern.patch(minilm, embedding_bits=16)[0].auto_model.eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        got = compiled(**inputs).last_hidden_state
        if backend == "aot_eager":
            assert torch.equal(got, expected)
            return
        # inductor orders LayerNorm's sums otherwise; int8 rounding turns a last-bit difference into a step.
        # A last-bit change of the embeddings does the same to the eager model: that is the scale.
        distance = [1 - worst_cosine(got, expected)]
        weight = model.embeddings.word_embeddings.weight
        original = weight.clone()
        for _ in range(4):
            weight.copy_(original * (1 + torch.finfo(torch.float32).eps * torch.randint(-1, 2, weight.shape)))
            distance.append(1 - worst_cosine(model(**inputs).last_hidden_state, expected))
    assert distance[0] <= 3 * max(distance[1:]) < 0.03


def worst_cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).min())


@pytest.fixture(params=[8, 4])
def tiny_ternary(tiny, request):
    return tritern.patch(tiny, embedding_bits=request.param)[0].auto_model.eval()


def batch(texts, length):
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(5, 1000, (texts, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


SIZES = [(3, 17), (5, 30), (2, 9), (8, 64), (4, 33)]


def test_compiled_once_for_all_sizes(tiny_ternary):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    model = tiny_ternary
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.inference_mode():
        compiled(**batch(6, 12))
        frames = counter.frame_count
        for size in SIZES:
            inputs = batch(*size)
            assert torch.equal(compiled(**inputs)[0], model(**inputs)[0]), size
    assert counter.frame_count == frames > 0


class Hidden(torch.nn.Module):
    """Gives the tensor alone: transformers' output classes would have to be imported to load the program."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask)[0]


RUN_EXPORTED = """
import sys, torch, tritern_kernels
program = torch.export.load(sys.argv[1]).module()
inputs, expected = torch.load(sys.argv[2])
with torch.inference_mode():
    assert torch.equal(program(**inputs), expected)
assert "tritern" not in sys.modules and "transformers" not in sys.modules
"""


def test_exported_and_run_without_the_library(tiny_ternary, tmp_path):
    model = Hidden(tiny_ternary)
    texts, length = torch.export.Dim("texts", min=2, max=64), torch.export.Dim("length", min=2, max=64)
    dynamic = {name: {0: texts, 1: length} for name in batch(2, 3)}
    with torch.no_grad():
        program = torch.export.export(model, (), batch(3, 17), dynamic_shapes=dynamic)
        for size in SIZES:
            inputs = batch(*size)
            assert torch.equal(program.module()(**inputs), model(**inputs)), size
        torch.save((inputs, model(**inputs)), tmp_path / "expected.pt")
    torch.export.save(program, tmp_path / "program.pt2")
    paths = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    command = [
        sys.executable,
        "-c",
        RUN_EXPORTED,
        str(tmp_path / "program.pt2"),
        str(tmp_path / "expected.pt"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, env=paths, cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.gpu
def test_captured_in_a_cuda_graph(tiny_ternary):
    model = tiny_ternary.half().cuda()
    inputs = {k: v.cuda() for k, v in batch(4, 33).items()}
    with torch.inference_mode():
        for _ in range(2):  # compiles the kernels, which a capture cannot
            model(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(**inputs)[0]
        inputs["input_ids"].copy_(inputs["input_ids"].flip(1))
        graph.replay()
        assert torch.equal(captured, model(**inputs)[0])
