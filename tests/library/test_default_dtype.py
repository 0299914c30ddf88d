"""``torch.set_default_dtype`` changes nothing: every tensor is made with a dtype."""

import ast
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
MAKERS = ("empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")


def bits(tensor):
    tensor = torch.as_tensor(tensor).detach().contiguous().flatten()
    return f"{tensor.dtype} {hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest()}"


def state(module):
    return {name: bits(tensor) for name, tensor in module.state_dict().items()}


def given(*shape):
    return torch.randn(shape, dtype=torch.float32, generator=torch.Generator().manual_seed(0))


def kernels():
    """The reference, the operators and the product with gradients."""
    from tritern_kernels import linear, quantize_activations, reference, ternarize_weight, training

    weight, x = given(50, 130), given(7, 130)
    for rule in reference.RULES:
        codes, scale = reference.ternarize(weight, rule)
        yield [bits(codes), bits(scale)]
        packed = ternarize_weight(weight, rule)
        yield [bits(packed.packed), bits(packed.codes()), bits(packed.dequantize())]
    yield bits(reference.codes_given(weight, scale))
    for values in (x, x.where(x < 2, torch.nan)):
        yield [[bits(t) for t in f(values)] for f in (reference.quantize_activations, quantize_activations)]
    for activation_bits in (8, 16):
        yield bits(reference.linear(x, codes, scale, weight[:, 0], activation_bits))
        yield bits(linear(x, packed, weight[:, 0], activation_bits=activation_bits))
        inputs = [t.clone().requires_grad_() for t in (x, weight, scale, weight[:, 0])]
        codes_now = training.ternarize_given(inputs[1], inputs[2])
        y = training.ternary_linear(*inputs, codes_now, activation_bits=activation_bits)
        y.square().sum().backward()
        yield [bits(y), *(bits(t.grad) for t in inputs)]
    yield bits(training.blended_weight(weight, scale, codes_now, 0.5))


def layers():
    """``TernaryLinear`` and rounded tables, there and back."""
    from torch import nn
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    import tritern

    for activation_bits in (8, 16):
        linear = nn.Linear(130, 50, dtype=torch.float32)
        linear.weight.data, linear.bias.data = given(50, 130), given(50)
        layer = tritern.TernaryLinear.from_linear(linear, activation_bits=activation_bits)
        x = given(7, 130).requires_grad_()
        layer(x).sum().backward()
        yield [state(layer), bits(layer(x)), bits(x.grad), bits(layer.bias.grad), state(layer.to_linear())]
        yield [bits(layer(x.to(dtype)).float()) for dtype in (torch.float16, torch.bfloat16)]
    ids, scaled = torch.arange(7), Gemma3TextScaledWordEmbedding(50, 130, None, embed_scale=11.4)
    scaled.weight.data = given(50, 130)
    for table in (nn.Embedding(50, 130, _weight=given(50, 130)), scaled):
        for kind in (tritern.Int8Embedding, tritern.Int4Embedding):
            made = kind.from_embedding(table)
            again = made.to_embedding()
            yield [state(made), bits(made(ids)), state(again), bits(again(ids))]


def models(path, texts):
    """What is patched, calibrated, saved, loaded, dequantized, distilled and searched."""
    from sentence_transformers import SentenceTransformer

    import tritern
    from tritern.search import SearchIndex

    def patched(**settings):
        return tritern.patch(SentenceTransformer(path, device="cpu"), **settings)

    yield bits(tritern.load("minilm-l6-ternary", device="cpu").encode(texts[:3]))
    for settings in ({}, {"activation_bits": 16}, {"rule": "absmean"}, {"calibration_texts": texts[:40]}):
        model = patched(embedding_bits=8, **settings)
        yield [state(model), bits(model.encode(texts[:9]))]
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = tritern.load(folder, device="cpu")
        yield [state(loaded), bits(loaded.encode(texts[:9]))]
    yield state(tritern.dequantize(model))
    yield str(tritern.evaluate(patched(), SentenceTransformer(path, device="cpu"), texts[:50]))
    yield str(replace(tritern.summary(patched()), products=()))  # the fastest may be another each time
    found = SearchIndex.build(None, patched(), texts[:30]).search(texts[:2])
    yield [hit.score for hits in found for hit in hits]
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(max_steps=2, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True)
        student = SentenceTransformer(path, device="cpu")
        made = tritern.distill(student, texts[:128], folder, holdout=32, seed=1, **settings)
    yield [state(made), bits(made.encode(texts[:9]))]


def digested(path, texts):
    """What this process gives."""
    found = {"kernels": kernels(), "layers": layers(), "models": models(path, texts)}
    return {name: list(values) for name, values in found.items()}


DTYPES = ("bfloat16", "float16", "float64")


@pytest.fixture(scope="module")
def found(tiny_path, sentences, tmp_path_factory):
    """What processes give in which another dtype is torch's default: forks of one that has imported all."""
    folder = tmp_path_factory.mktemp("digests")
    command = [sys.executable, __file__, tiny_path, folder]
    done = subprocess.run(command, input=json.dumps(sentences[:128]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {dtype: json.loads((folder / dtype).read_text()) for dtype in DTYPES}


@pytest.fixture(scope="module")
def expected(tiny_path, sentences):
    assert torch.get_default_dtype() == torch.float32
    return json.loads(json.dumps(digested(tiny_path, sentences[:128])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_under_every_default(dtype, expected, found):
    assert len(expected["models"]) == 14
    for part, values in expected.items():
        assert found[dtype][part] == values


def test_no_tensor_is_made_without_a_dtype():
    missing = []
    for file in [*ROOT.glob("tritern/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{m}" for m in MAKERS}:
                if not any(k.arg == "dtype" for k in node.keywords):
                    missing.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not missing, "\n".join(missing)


if __name__ == "__main__":
    texts = json.load(sys.stdin)
    import sentence_transformers  # noqa: F401  as what is slow to import

    for name in DTYPES:
        if not (child := os.fork()):
            torch.set_default_dtype(getattr(torch, name))
            Path(sys.argv[2], name).write_text(json.dumps(digested(sys.argv[1], texts)))
            sys.exit()
        if status := os.waitpid(child, 0)[1]:
            sys.exit(os.waitstatus_to_exitcode(status))
