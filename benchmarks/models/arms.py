"""Models and arms of ``encode.py``'s table.

encode fp32, fp16     sentence-transformers' ``encode``.
encode fp16 compiled  the same after ``torch.compile(dynamic=True)`` of the transformer.
encode fp16 unpadded  the same with FlashAttention 2 on unpadded texts, where that is installed.
engine fp32, fp16     the same model behind tritern's engine, not ternary.
engine ternary        a ternary model (int8 activations) behind it: for minilm the shipped minilm-l6-ternary,
                      others are patched and not trained.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import torch
from models import encode, encode_gpu

ON_GPU = (
    "encode fp32",
    "encode fp16",
    "encode fp16 unpadded",
    "engine fp16",
    "engine ternary",
    "encode fp16 compiled",
)
ON_CPU = ("encode fp32", "engine fp32", "engine ternary")
ALL = tuple(dict.fromkeys(ON_GPU + ON_CPU))
RANDOM = ("bge-base", "bge-large", "qwen3-0.6b")
MODELS = ("minilm", *RANDOM)
LONGEST = 512
"""Tokens to which texts are cut for models with random weights; MiniLM's own limit is 256."""


def random_model(name: str, dtype: torch.dtype, device: str) -> Any:
    """A sentence-transformer of a model's size, with random weights and MiniLM's tokenizer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoModel, AutoTokenizer

    inner: Any = encode_gpu.build(name, dtype, device)
    decoder = encode_gpu.MODELS[name]["type"] == "qwen3"
    tokenizer: Any = AutoTokenizer.from_pretrained(encode.packaged_model())
    if decoder:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "layer_types": None}
    config = type(inner.config)(**(inner.config.to_dict() | small))
    with tempfile.TemporaryDirectory() as folder:  # what sentence-transformers infers a module from
        AutoModel.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        first = Transformer(folder, max_seq_length=LONGEST)
    first.model = inner
    pooling = Pooling(inner.config.hidden_size, "lasttoken" if decoder else "mean")
    return SentenceTransformer(modules=[first, pooling, Normalize()], device=device)


def original(name: str, dtype: torch.dtype, device: str) -> Any:
    """A model by its name here, on the hub, or by its path."""
    from sentence_transformers import SentenceTransformer

    if name in RANDOM:
        return random_model(name, dtype, device)
    path = encode.packaged_model() if name == "minilm" else name
    return SentenceTransformer(path, device=device, model_kwargs={"dtype": dtype})


def load(name: str, arm: str, device: str) -> Any:
    """The model of an arm.

    Raises:
        ValueError, ImportError: FlashAttention 2 is missing, or the model has no unpadded form.
    """
    import tritern
    from tritern.engine.encoder import attach

    how, kind, *extra = arm.split()
    half = kind == "fp16" or (kind == "ternary" and device == "cuda")
    if name == "minilm" and kind == "ternary":
        return tritern.load("minilm-l6-ternary", device=device)
    model = original(name, torch.float16 if half else torch.float32, device)
    if kind == "ternary":
        return tritern.patch(model)
    if how == "engine":
        attach(model)
    if "unpadded" in extra:
        model[0].auto_model.set_attn_implementation("flash_attention_2")
        model[0].unpad_inputs = True
        if not model[0].can_flatten_inputs:
            raise ValueError("sentence-transformers does not unpad it: flash-attn is missing")
    if "compiled" in extra:
        model[0].auto_model.compile(dynamic=True)
    return model
