"""``encode`` of sentence-transformers' models through the engine."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from inspect import signature
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..progress import bar
from .extended import Extended, extend
from .fused import fuse_what_fits
from .packing import Size
from .path import way_of
from .pipeline import INLINE, Finish, Way, embed_here, embed_windows
from .runner import Packed

_BATCH_SIZE = 32
"""sentence-transformers' default. A larger one changes nothing: the engine takes that memory anyway."""


class Encoder(Extended):
    """Extends the class of a SentenceTransformer."""

    _tritern_base: Any

    def encode(
        self: Any,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = _BATCH_SIZE,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """``SentenceTransformer.encode`` through tritern's engine, with the same arguments.

        Results differ in last bits only. ``batch_size`` is a hint: below 32, runs shrink in proportion.
        """
        given = {
            "prompt_name": prompt_name,
            "prompt": prompt,
            "batch_size": batch_size,
            "show_progress_bar": show_progress_bar,
            "output_value": output_value,
            "precision": precision,
            "convert_to_numpy": convert_to_numpy,
            "convert_to_tensor": convert_to_tensor,
            "device": device,
            "normalize_embeddings": normalize_embeddings,
            "truncate_dim": truncate_dim,
        }
        return _encode(self, inputs, given | kwargs)


def encode(model: Any, inputs: Any, **given: Any) -> Any:
    """``model.encode``, through the engine where possible, for any model, ternary or not.

    Args:
        model: anything with an ``encode``.
        inputs, **given: its arguments.
    """
    known = _known()
    if known is None or not isinstance(model, known) or type(model).encode is not known.encode:
        return model.encode(inputs, **given)
    return _encode(model, inputs, _DEFAULTS | given)


_DEFAULTS = {
    name: p.default for name, p in signature(Encoder.encode).parameters.items() if p.default is not p.empty
}
"""Defaults of ``encode``'s arguments."""


def _encode(model: Any, inputs: Any, given: dict[str, Any]) -> Any:
    kind: Any = getattr(type(model), "_tritern_base", type(model))
    texts = _texts(inputs) if _plain(given) else None
    if not texts:
        return kind.encode(model, inputs, **given)
    device = given["device"]
    if device is not None and torch.empty(0, dtype=torch.uint8, device=device).device != model.device:
        model.to(device)
    prepare(model)
    prompt, width = given["prompt"], given["truncate_dim"]
    prompt = model._resolve_prompt(None, given["prompt_name"]) if prompt is None else prompt
    way = way_of(model, prompt, given.get("task"), _tokens(model, given["batch_size"]))
    if isinstance(way, str):
        return kind.encode(model, inputs, **given)
    to_tensor = given["convert_to_tensor"]
    to_numpy = given["convert_to_numpy"] and not to_tensor
    finish = _finish(model.truncate_dim if width is None else width, given["normalize_embeddings"])
    try:
        found = embed(way, texts, finish, to_numpy, _shown(given["show_progress_bar"]))
    except UnicodeEncodeError:
        return kind.encode(model, inputs, **given)  # its error says what is wrong with a text
    found = _converted(found, given["precision"], to_numpy, to_tensor)
    return found[0] if isinstance(inputs, str) else found


def attach(model: Any, *, fuse: bool | None = None) -> None:
    """Put the engine behind ``encode`` of a SentenceTransformer; other models do not change.

    Args:
        model: any module.
        fuse: fuse blocks when the model first runs on a GPU; None: keep the setting, at first True.
    """
    if is_sentence_transformer(model):
        if cast(Any, type(model)).encode is _known().encode:
            extend(model, Encoder)
        vars(model)["_tritern_fuse"] = vars(model).get("_tritern_fuse", True) if fuse is None else fuse
        vars(model).pop("_tritern_is_fused", None)


def detach(model: Any) -> None:
    """Undo ``attach``."""
    if isinstance(model, Encoder):
        model.__class__ = model._tritern_base
        vars(model).pop("_tritern_fuse", None)


def attach_to_loading() -> None:
    """``attach`` to the SentenceTransformer that is being loaded on this thread, if any. It is found on the
    call stack, because its parts do not know it.
    """
    frame = sys._getframe() if _known() is not None else None
    while frame is not None:
        model = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if is_sentence_transformer(model):
            if cast(Any, type(model)).encode is _known().encode:
                extend(model, Encoder)
            return
        frame = frame.f_back


def _known() -> Any:
    """The class, if its package has been imported."""
    return getattr(sys.modules.get("sentence_transformers"), "SentenceTransformer", None)


def is_sentence_transformer(model: Any) -> bool:
    """Whether a model is a SentenceTransformer. If the package is not imported, it is not."""
    return (known := _known()) is not None and isinstance(model, known)


def prepare(model: nn.Module) -> None:
    """Put a model in evaluation mode and fuse it on a GPU, unless the user turned fusing off."""
    if model.training:
        model.eval()
    own = vars(model)
    if isinstance(model, Encoder) and own.get("_tritern_fuse", True) and "_tritern_is_fused" not in own:
        if any(p.is_cuda for p in model.parameters()):
            fuse_what_fits(model)
            own["_tritern_is_fused"] = True


def capture(model: Any, tokens: Iterable[int]) -> None:
    """Capture a model's runs of each of these numbers of tokens, if its texts are packed."""
    prepare(model)
    way = way_of(model)
    if isinstance(way, Packed):
        for most in tokens:
            way.runs.warm(model, Size.holding(most, 1))


def embed(
    way: Way, texts: Sequence[str], finish: Finish, to_cpu: bool = False, shown: bool = False
) -> Tensor:
    """Vectors [len(texts), width] of at least one text.

    Args:
        way: how texts become vectors.
        texts: strings.
        finish: called on each batch of vectors.
        to_cpu: return them on the CPU.
        shown: show a progress bar.
    """
    if len(texts) <= INLINE and not shown:
        return embed_here(way, texts, finish, to_cpu=to_cpu)
    with bar(desc="Embedding", total=len(texts), unit=" texts", leave=False, disable=not shown) as progress:
        return next(embed_windows(way, [texts], finish, to_cpu=to_cpu, advance=progress.update))


def unit_length(vectors: Tensor) -> Tensor:
    """Vectors [N, width] of length 1; each result is independent of N."""
    if not vectors.is_cuda:
        return torch.nn.functional.normalize(vectors)
    from tritern_kernels.pooling import normalize

    return normalize(vectors)


def _finish(width: int | None, of_length_1: bool) -> Finish:
    def finish(vectors: Tensor) -> Tensor:
        vectors = vectors[:, :width] if width is not None else vectors
        return unit_length(vectors) if of_length_1 else vectors

    return finish


def _plain(given: dict[str, Any]) -> bool:
    """Whether these arguments of ``encode`` are valid and ask for vectors of texts on one device."""
    others = {k: v for k, v in given.items() if k not in _KNOWN and v is not None}
    return (
        not others
        and given["output_value"] == "sentence_embedding"
        and given["precision"] in (None, "float32", "int8", "uint8", "binary", "ubinary")
        and isinstance(given["batch_size"], int)
        and given["batch_size"] > 0
        and not isinstance(given["device"], (list, tuple))
        and isinstance(given["prompt"], (str, type(None)))
        and (
            given["truncate_dim"] is None
            or isinstance(given["truncate_dim"], int)
            and given["truncate_dim"] > 0
        )
    )


_KNOWN = {
    "prompt_name", "prompt", "batch_size", "show_progress_bar", "output_value", "precision",
    "convert_to_numpy", "convert_to_tensor", "device", "normalize_embeddings", "truncate_dim", "task",
}  # fmt: skip


def _texts(inputs: Any) -> list[str] | None:
    """The strings among ``encode``'s inputs; None if there is anything else, or nothing."""
    if isinstance(inputs, str):
        return [inputs]
    if not isinstance(inputs, (list, tuple, np.ndarray)):
        return None
    texts = inputs.tolist() if isinstance(inputs, np.ndarray) else list(inputs)
    return texts if isinstance(texts, list) and set(map(type, texts)) <= {str} else None


def _tokens(model: Any, batch_size: int) -> int | None:
    """Most tokens in a run, if the user wants small batches."""
    if batch_size >= _BATCH_SIZE or model.device.type == "cpu":
        return None
    return batch_size * min(model.max_seq_length or 512, 512)


def _shown(wanted: bool | None) -> bool:
    logger = logging.getLogger("sentence_transformers.sentence_transformer.model")
    return logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG) if wanted is None else wanted


def _converted(found: Tensor, precision: str | None, to_numpy: bool, to_tensor: bool) -> Any:
    if precision and precision != "float32":
        from sentence_transformers.util.quantization import quantize_embeddings

        quantized = quantize_embeddings(found.cpu(), precision=cast(Any, precision))
        return quantized if to_numpy else _of(torch.from_numpy(quantized), to_tensor)
    if to_numpy:
        return (found.float() if found.dtype == torch.bfloat16 else found).numpy()
    return _of(found, to_tensor)


def _of(found: Tensor, to_tensor: bool) -> Tensor | list[Tensor]:
    return found if to_tensor else list(found)
