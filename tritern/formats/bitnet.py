"""``tritern.formats.bitnet.from_bitnet``: public BitNet checkpoints as ternary models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ..checkpoint import quantizer
from ..config import TernaryConfig
from ..errors import CheckpointError
from .bitnet_layers import StoredConfig

EMBEDDING_MODELS = ("qwen3", "gemma3_text")


def from_bitnet(
    path: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Load a public BitNet b1.58 checkpoint as a model of ``TernaryLinear`` layers with int8 activations.

    It reads two kinds:

    - BitNet-embedding 0.6B (Qwen3) and 270M (Gemma 3): full-precision weights, with an RMSNorm (times its
      weight, in both) before every projection. Loading ternarizes the weights by absmean. The result is a
      SentenceTransformer. If the folder has no modules.json, it pools the last token and normalizes.
    - transformers' ``bitnet`` format, such as BitNet b1.58 2B: packed weights or full-precision weights
      (``autobitlinear``, ``online``). ``weight_scale`` of packed weights divides in ``bitlinear`` and
      multiplies in ``autobitlinear``. The result is a SentenceTransformer if the folder has a modules.json,
      otherwise the transformers model, with a head if the config names a ForCausalLM.

    The result saves as a tritern checkpoint. Its layers compute the same as the source's, apart from the
    order of float32 roundings. One difference: BitNet rounds activations below 1e-5 as if the largest were
    1e-5; here they keep their precision. Sources: arXiv:2402.17764; in github.com/microsoft/BitNet
    ``docs/bitnet-embeddings-i2s-guide.md`` and ``utils/convert-bitnet-embedding-to-gguf.py``;
    ``transformers/integrations/bitnet.py``. Checked with small checkpoints modelled on these, not with the
    published weights.

    Args:
        path: folder, or name on the hub.
        device: where the model goes; by default sentence-transformers' choice, the CPU for other models.
        dtype: of everything that is not ternary; by default the checkpoint's. Full-precision weights are cast
            before they are ternarized, as in transformers.

    Raises:
        CheckpointError: no such folder, another format, missing tensors or wrong shapes, damaged codes, or a
            scale that is not a positive number.
    """
    folder = _folder(path)
    config = AutoConfig.from_pretrained(folder)
    settings = _settings(folder, config)
    arguments: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    device = None if device is None else str(device)
    if (folder / "modules.json").exists() or settings["norm_name"] == "norm":
        model: Any = _sentence_transformer(folder, config, settings, arguments, device)
    else:
        causal = any(name.endswith("ForCausalLM") for name in config.architectures or ())
        config.quantization_config = settings
        kind = AutoModelForCausalLM if causal else AutoModel
        model = kind.from_pretrained(folder, config=config, **arguments)
        model = model if device is None else model.to(device)
    quantizer.attach(model, TernaryConfig(rule="absmean"))
    if "_model_card_text" in vars(model):
        vars(model)["_model_card_text"] = _card(path)
    return model


def _folder(path: str | Path) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
        )
    except HFValidationError:
        raise CheckpointError(
            f"{path} is neither a folder nor a name on the hub, such as owner/name"
        ) from None


def _settings(folder: Path, config: Any) -> dict[str, Any]:
    """The storage of the layers, as settings of a ``StoredConfig``."""
    stored = getattr(config, "quantization_config", None)
    if stored is None and config.model_type in EMBEDDING_MODELS:
        eps = config.rms_norm_eps
        stored = {"linear_class": "autobitlinear", "quantization_mode": "online", "use_rms_norm": True}
        return StoredConfig(norm_name="norm", rms_norm_eps=eps, **stored).to_dict()
    if stored is None:
        raise CheckpointError(
            f"{folder}: config.json has no quantization_config, and model_type {config.model_type!r}; a "
            f"BitNet checkpoint has quant_method 'bitnet' or model_type {' or '.join(EMBEDDING_MODELS)}. "
            "Make other models ternary with tritern.patch(model)."
        )
    stored = dict(stored)
    method = stored.pop("quant_method", None)
    if method != "bitnet":
        raise CheckpointError(
            f"{folder}: quant_method is {method!r}; from_bitnet reads 'bitnet'"
            + (
                ". Load this folder with AutoModel or SentenceTransformer."
                if method == quantizer.METHOD
                else ""
            )
        )
    try:
        return StoredConfig(norm_name="rms_norm", **stored).to_dict()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: quantization_config in config.json: {error}") from None


def _sentence_transformer(
    folder: Path, config: Any, settings: dict[str, Any], arguments: dict[str, Any], device: str | None
) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    # AutoConfig takes only fields that config.json has; the model takes only the others.
    where = "config_kwargs" if hasattr(config, "quantization_config") else "model_kwargs"
    keywords: dict[str, Any] = {"model_kwargs": arguments, "config_kwargs": {}}
    keywords[where]["quantization_config"] = settings
    if (folder / "modules.json").exists():
        return SentenceTransformer(str(folder), device=device, **keywords)
    transformer = Transformer(str(folder), **keywords)
    modules = [transformer, Pooling(config.hidden_size, "lasttoken"), Normalize()]
    return SentenceTransformer(modules=modules, device=device)


def _card(path: str | Path) -> str:
    return f"""---
library_name: sentence-transformers
tags: [sentence-transformers, tritern, ternary]
---

# {Path(path).name}

A BitNet b1.58 model, imported by `tritern.formats.bitnet.from_bitnet`.
Linear layers hold weights in {{-1, 0, +1}}, two bits each; activations are int8 per token.

```python
import tritern  # registers the format
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
```
"""
