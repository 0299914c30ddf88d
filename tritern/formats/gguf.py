"""``tritern.formats.gguf.export_gguf``: ternary models as files for llama.cpp."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import TriternError
from ..inputs import check_file
from ..nn.embedding import Int4Embedding, Int8Embedding
from ..nn.linear import TernaryLinear
from .gguf_vocabulary import add_bpe, add_wordpiece

POOLING = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}
"""GGUF's names of pooling modes by sentence-transformers' names."""


def export_gguf(model: nn.Module, path: str | Path) -> None:
    """Write a ternary SentenceTransformer as a GGUF file.

    Two families work: BERT with a WordPiece tokenizer in lower case and without accents (all-MiniLM, English
    bge and e5), as llama.cpp's ``bert``; and Qwen3 (Qwen3-Embedding), as ``qwen3``. Ternary layers become
    TQ2_0 if in_features is a multiple of 256, Q4_0 if it is a multiple of 32, otherwise F16. int8 tables
    become Q8_0 and 4-bit tables Q4_0 (F16 if the width is not a multiple of 32). The quantized types hold the
    exact codes; scales are rounded to float16. Full-precision parts become F16 (linear layers and word
    tables) or F32 (the rest).

    llama.cpp rounds activations to int8 in blocks of 32 or 256, tritern in whole tokens, so vectors are close
    to tritern's, not equal. GGUF has no place for prompts, max_seq_length and normalization (llama.cpp
    normalizes by default). Checked by reading files back with the ``gguf`` package and comparing tensors and
    metadata with the model's. Names and layout follow ``conversion/bert.py`` and ``qwen.py`` in
    github.com/ggml-org/llama.cpp. Not run in llama.cpp itself.

    Args:
        model: a SentenceTransformer of Transformer, Pooling (mean, cls or lasttoken) and perhaps Normalize,
            with at least one ternary layer.
        path: of the file. An existing file is replaced once the new one is complete.

    Raises:
        TriternError: another model, family, tokenizer or pooling, layers with an RMSNorm of their own,
            values beyond float16, or a path that cannot be written. Nothing is written then.
        ImportError: the gguf package is not installed.
    """
    gguf, path = _gguf(), check_file(path, "path")
    transformer, pooling = _parts(model)
    arch = transformer.config.model_type
    if arch not in ("bert", "qwen3"):
        raise TriternError(f"export_gguf writes the families bert and qwen3; this model's is {arch!r}")
    _check_config(transformer.config)
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.BERT if arch == "bert" else gguf.MODEL_ARCH.QWEN3,
        transformer.config.num_hidden_layers,
    )
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(path.stem)
    writer.add_pooling_type(gguf.PoolingType[POOLING[pooling]])
    _add_sizes(gguf, writer, transformer.config)
    (add_wordpiece if arch == "bert" else add_bpe)(gguf, writer, model.tokenizer, transformer.config)
    for name, (data, kind) in _tensors(gguf, transformer).items():
        full = name if arch == "bert" else f"model.{name}"
        new = names.get_name(full, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise TriternError(f"{name} has no place in a GGUF file of the family {arch!r}")
        writer.add_tensor(new, data, raw_dtype=kind)

    temporary = path.with_name(
        f"{path.name}.{os.getpid()}"
    )  # an existing file stays until this one is complete
    try:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise ImportError("export_gguf needs the gguf package: pip install 'tritern[gguf]'") from None
    return gguf


def _parts(model: Any) -> tuple[PreTrainedModel, str]:
    """The transformers model and the pooling mode of a SentenceTransformer."""
    from sentence_transformers import SentenceTransformer

    if not isinstance(model, SentenceTransformer):
        raise TriternError(
            f"export_gguf takes a SentenceTransformer: its tokenizer and pooling go into the file; "
            f"received {type(model).__name__}"
        )
    kinds = [type(module).__name__ for module in model]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise TriternError(
            "export_gguf takes models of Transformer, Pooling and perhaps Normalize; "
            f"this one has {', '.join(kinds)}"
        )
    if model[1].pooling_mode not in POOLING:
        raise TriternError(
            f"pooling_mode must be one of {', '.join(POOLING)}; it is {model[1].pooling_mode!r}"
        )
    if not any(isinstance(m, TernaryLinear) for m in model.modules()):
        raise TriternError("the model has no ternary layers: call tritern.patch(model) first")
    transformer = next(m for m in model[0].modules() if isinstance(m, PreTrainedModel))
    return transformer, str(model[1].pooling_mode)


def _check_config(config: Any) -> None:
    """Refuse settings that llama.cpp's graphs do not support."""
    rope = getattr(config, "rope_parameters", None) or {}
    sliding = getattr(config, "use_sliding_window", False)
    for name, value, allowed in (
        (
            "hidden_act",
            config.hidden_act,
            ("gelu", "gelu_new", "gelu_pytorch_tanh") if config.model_type == "bert" else ("silu",),
        ),
        ("position_embedding_type", getattr(config, "position_embedding_type", "absolute"), ("absolute",)),
        ("rope_type", rope.get("rope_type", "default"), ("default",)),
        ("use_sliding_window", sliding, (False,)),
        ("is_decoder", getattr(config, "is_decoder", False), (False,)),
    ):
        if value not in allowed:
            raise TriternError(
                f"{name} of a {config.model_type} model must be {' or '.join(map(repr, allowed))} to be "
                f"written as GGUF; it is {value!r}"
            )


def _add_sizes(gguf: ModuleType, writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_TQ2_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if config.model_type == "bert":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_causal_attention(False)
        writer.add_token_type_count(config.type_vocab_size)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _tensors(gguf: ModuleType, transformer: PreTrainedModel) -> dict[str, tuple[np.ndarray, Any]]:
    """Content and GGML type of every tensor but the pooler's, by its name in the model."""
    types, found = gguf.GGMLQuantizationType, {}
    for name, module in transformer.named_modules():
        if name.startswith("pooler"):
            continue
        if isinstance(module, TernaryLinear):
            if module.norm is not None:
                raise TriternError(f"{name} has an RMSNorm of its own; llama.cpp has no place for it")
            found[f"{name}.weight"] = _ternary(gguf, name, module)
        elif isinstance(module, Int8Embedding):
            found[f"{name}.weight"] = _int8(gguf, name, module)
        elif isinstance(module, Int4Embedding):
            found[f"{name}.weight"] = _int4(gguf, name, module)
        for key, value in module.named_parameters(recurse=False):
            table = name.endswith(("word_embeddings", "embed_tokens"))
            half = key == "weight" and (table or isinstance(module, nn.Linear))
            data = _half(f"{name}.{key}", value) if half else value.detach().float().cpu().numpy()
            found[f"{name}.{key}"] = data, types.F16 if half else types.F32
    return found


def _ternary(gguf: ModuleType, name: str, layer: TernaryLinear) -> tuple[np.ndarray, Any]:
    types, K = gguf.GGMLQuantizationType, layer.in_features
    codes = layer.packed().codes().cpu().numpy()
    scale = _half(f"{name}.weight_scale", layer.weight_scale)[:, None]
    values = codes * scale.astype(np.float32)
    if K % 256 == 0 and layer.weight_bits == 2:
        return gguf.quants.quantize(values, types.TQ2_0), types.TQ2_0
    if K % 32 == 0:  # the gguf library's own Q4_0 scales keep only one sign exact
        nibbles = (codes + 8).astype(np.uint8).reshape(len(codes), K // 32, 2, 16)
        return _blocks(scale, nibbles[:, :, 0] | nibbles[:, :, 1] << 4), types.Q4_0
    return values.astype(np.float16), types.F16


def _int8(gguf: ModuleType, name: str, table: Int8Embedding) -> tuple[np.ndarray, Any]:
    types, K = gguf.GGMLQuantizationType, table.embedding_dim
    codes = table.weight.cpu().numpy()
    scale = _half(f"{name}.weight_scale", table.weight_scale)[:, None]
    if K % 32 == 0:
        return _blocks(scale, codes.view(np.uint8).reshape(len(codes), K // 32, 32)), types.Q8_0
    return (codes * scale.astype(np.float32)).astype(np.float16), types.F16


def _int4(gguf: ModuleType, name: str, table: Int4Embedding) -> tuple[np.ndarray, Any]:
    types, K = gguf.GGMLQuantizationType, table.embedding_dim
    if K % 32 == 0:
        scale = _half(f"{name}.weight_scale", table.weight_scale)
        return _blocks(scale, table.weight.cpu().numpy().reshape(*scale.shape, 16)), types.Q4_0
    return _half(name, table.to_embedding().weight), types.F16


def _blocks(scale: np.ndarray, content: np.ndarray) -> np.ndarray:
    """uint8 [N, bytes of a row]: the scale float16 [N, 1 or blocks] before the content uint8 of each
    [N, blocks].
    """
    start = np.broadcast_to(scale[..., None].view(np.uint8), (*content.shape[:2], 2))
    return np.concatenate([start, content], axis=-1).reshape(len(content), -1)


def _half(name: str, values: Tensor) -> np.ndarray:
    """The values as float16."""
    rounded = values.detach().to("cpu", torch.float16)
    if not torch.isfinite(rounded).all():
        raise TriternError(
            f"{name} has values beyond float16, its type in a GGUF file: the largest is "
            f"{values.detach().abs().max():g}"
        )
    return rounded.numpy()
