"""The models of transformers that run on packed texts: texts end to end, attention within each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .packing import Positions

NAME = "tritern_packed"
"""The name of this attention in transformers."""
_FARTHEST = 128
"""MPNet's relative position bias is constant from this distance on."""
_tiles: ContextVar[Tensor] = ContextVar("tiles")


@dataclass(frozen=True)
class Family:
    """Models of one kind.

    Attributes:
        types: whether ``forward`` takes token_type_ids; they are zeros.
        run: takes the model, ids and positions (int32 [1, tokens]) and further arguments of the model;
            returns hidden states [tokens, hidden]. Attention is registered under ``NAME``.
    """

    types: bool = False
    run: Callable[..., Tensor] | None = None


def _forward(model: Any, ids: Tensor, positions: Tensor, **arguments: Any) -> Tensor:
    return model(input_ids=ids, position_ids=positions, **arguments).last_hidden_state[0]


def _decoder(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    return _forward(model, ids, positions, use_cache=False)


def _mpnet(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """Replaces MPNet's bias, which its own code computes for every pair of tokens of a run."""
    from tritern_kernels.attention import packed_attention

    encoder, hidden = model.encoder, model.embeddings(input_ids=ids, position_ids=positions)
    distances = torch.arange(-_FARTHEST, _FARTHEST + 1, device=ids.device)
    bias = encoder.relative_attention_bias(encoder.relative_position_bucket(distances)).T.contiguous()
    for layer in encoder.layer:
        block, own = layer.attention, layer.attention.attn
        heads = (*hidden.shape[1:-1], -1, own.attention_head_size)
        q, k, v = (project(hidden[0]).view(heads).transpose(0, 1) for project in (own.q, own.k, own.v))
        context = packed_attention(q, k, v, _tiles.get(), scale=own.attention_head_size**-0.5, bias=bias)
        attended = block.LayerNorm(own.o(context.flatten(1)[None]) + hidden)
        hidden = layer.output(layer.intermediate(attended), attended)
    return hidden[0]


FAMILIES = {
    "BertModel": Family(types=True),
    "RobertaModel": Family(types=True),
    "XLMRobertaModel": Family(types=True),
    "CamembertModel": Family(types=True),
    "ElectraModel": Family(types=True),
    "NomicBertModel": Family(types=True),
    "ModernBertModel": Family(),
    "MPNetModel": Family(run=_mpnet),
    "Qwen3Model": Family(run=_decoder),
    "Qwen2Model": Family(run=_decoder),
    "MistralModel": Family(run=_decoder),
    "LlamaModel": Family(run=_decoder),
    "Gemma3TextModel": Family(run=_decoder),
}
"""By the class of the model in transformers."""


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Called by transformers' blocks: query, key, value [1, heads, T, width] -> [1, T, heads, width]."""
    from tritern_kernels.attention import packed_attention

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = packed_attention(
        query[0], key[0], value[0], _tiles.get(), scale=scale, causal=causal, window=sliding_window
    )
    return out[None], None


def family_of(model: Any) -> Family | str:
    """The family of a transformers model, or a string that says why its texts cannot be packed."""
    kind = type(model)
    base = getattr(kind, "_tritern_base", kind)
    name = base.__name__
    if name not in FAMILIES or not base.__module__.startswith("transformers."):
        return f"{name} has no packed form"
    config = model.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        if name.endswith(("BertModel", "RobertaModel", "ElectraModel")):
            return f"{name} as a decoder has no packed form"
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
        return f"position_embedding_type={config.position_embedding_type!r} has no packed form"
    rope = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or "")
    if "dynamic" in rope or "longrope" in rope:
        return "its rotary embedding depends on the longest text"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps attention's logits"
    return FAMILIES[name]


def positions_of(model: nn.Module) -> Positions:
    """The way a model numbers tokens."""
    for module in model.modules():
        padding, table = getattr(module, "padding_idx", None), getattr(module, "position_embeddings", None)
        if isinstance(padding, int) and isinstance(table, nn.Module) and not isinstance(module, nn.Embedding):
            return Positions(padding + 1, padding)
    return Positions()


def hidden_states(model: Any, family: Family, ids: Tensor, positions: Tensor, tiles: Tensor) -> Tensor:
    """The last hidden states [tokens, hidden] of packed texts.

    Args:
        model: a model of transformers.
        family: its family.
        ids, positions: int32 [tokens].
        tiles: int32 [tiles, 3], as for ``packed_attention``.
    """
    run = family.run or partial(
        _forward, **({"token_type_ids": torch.zeros_like(ids)[None]} if family.types else {})
    )
    token = _tiles.set(tiles)
    try:
        with _packed(model):
            return run(model, ids[None], positions[None])
    finally:
        _tiles.reset(token)


@contextmanager
def _packed(model: nn.Module) -> Iterator[None]:
    """Switch a model to the attention ``NAME`` while the context lasts."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            configs[id(config)] = config
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
