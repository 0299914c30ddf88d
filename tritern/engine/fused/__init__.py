"""Transformer blocks with their steps fused, for serving on a GPU.

Between its products a block adds, normalizes, applies an activation and quantizes. Each step is a launch and
a pass over memory; together they take longer than the products. In a fused block, layers with the same input
are one product on one quantization. Each norm and activation writes the next product's int8 activations in
the same pass.
"""

from __future__ import annotations

import warnings
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import nn

from tritern_kernels.devices import unsupported
from tritern_kernels.internals import changed

from ...errors import TriternError
from ...inputs import check_model
from ..extended import extend
from .bert import FusedBert
from .block import Fused, prepare
from .decoder import FusedDecoder

Model = TypeVar("Model", bound=nn.Module)

_KINDS = FusedBert, FusedDecoder


def fuse(model: Model) -> Model:
    """Fuse the steps of ternary transformer blocks, in place, for faster inference on a CUDA GPU. ``patch``,
    loading and ``encode`` do so themselves if the model is on a GPU.

    Two kinds of blocks are fused, both with int8 activations and at most 8,192 hidden features:

    - BERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA (MiniLM, E5, BGE, GTE, LaBSE and many more) with exact
      GELU;
    - Qwen3, Qwen2, Mistral and Llama (Qwen3-Embedding, E5-Mistral) with SwiGLU and a head width that is a
      power of two.

    Other blocks do not change. Parameters and saved files stay the same. Results differ from the unfused
    model's in last bits of norms and activations. int8 rounding can turn these into one quantization step, so
    embed queries and documents the same way.

    Blocks run unfused in training, on a CPU, under autocast, ``torch.compile``, ``torch.jit.trace`` or an
    export, with eager attention, a cache of keys and values, or hooks inside a block.

    Args:
        model: a model that ``tritern.patch`` or loading made ternary.

    Returns:
        The model.

    Raises:
        TriternError: not a model, or one without a block that can be fused.

    Warns:
        UserWarning: the model is not on a GPU with kernels, or transformers has changed its blocks.
    """
    check_model(model)
    if fuse_what_fits(model):
        block = fused_blocks(model)[0]
        _warn_without_kernels(block._tritern_family.parts(block).layers[0].weight.device)
    elif not any(_kind_by_name(m) and not _as_known(m) for m in model.modules()):
        raise TriternError(
            "the model has no block to fuse: fuse() takes blocks of BERT, RoBERTa, XLM-RoBERTa, CamemBERT or "
            "ELECTRA with GELU, and of Qwen3, Qwen2, Mistral or Llama with SwiGLU and a head width that is a "
            "power of two. Their linear layers must be ternary with activation_bits=8: call tritern.patch() "
            "first. Other models run without fuse()."
        )
    return model


def fuse_what_fits(model: nn.Module) -> int:
    """Fuse the blocks that can be fused; return their number, which may be 0."""
    found = [(m, kind) for m in model.modules() if (kind := _kind(m))]
    for block, kind in found:
        if not isinstance(block, Fused):
            extend(block, kind)
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    following = {block: after for blocks in lists for block, after in zip(blocks, blocks[1:])}
    blocks = {block for block, _ in found}
    for block in blocks:
        after = following.get(block)
        prepare(block, after if after in blocks else None)
    return len(found)


def _warn_without_kernels(device: torch.device) -> None:
    why = "it is on the CPU" if device.type == "cpu" else unsupported(device)
    if why:
        warnings.warn(
            f"the blocks run unfused for now: {why}. Fused ones need an NVIDIA GPU. After a move there with "
            "model.to('cuda') they run fused; no second fuse() is needed.",
            stacklevel=3,
        )


def fused_blocks(model: nn.Module) -> list[Fused]:
    """The blocks that ``fuse`` has changed and that still consist of ternary layers."""
    return [m for m in model.modules() if isinstance(m, Fused) and _kind(m)]


def kind_of(block: Fused) -> tuple[tuple[Any, ...], torch.device]:
    """A key for a fused block's kernels, apart from the dtype, and the block's device."""
    parts = block._tritern_family.parts(block)
    layers, norms = parts.layers, parts.norms
    shapes = tuple((x.in_features, x.out_features, x.bias is None) for x in layers)
    epsilons = tuple(getattr(norm, "eps", getattr(norm, "variance_epsilon", None)) for norm in norms)
    head = getattr(parts.attention, "head_dim", None)
    return (type(block._tritern_family), shapes, head, epsilons), layers[0].weight.device


def run_on_zeros(block: Fused, texts: int, tokens: int, dtype: torch.dtype) -> None:
    """Run a block once, to compile its kernels."""
    layer = block._tritern_family.parts(block).layers[0]
    x = torch.zeros(texts, tokens, layer.in_features, dtype=dtype, device=layer.weight.device)
    block(x, **block._tritern_family.example(block, x))


def _kind(block: nn.Module) -> type[Fused] | None:
    kind = _kind_by_name(block)
    if kind is None or not _as_known(block):
        return None
    family = kind._tritern_family
    parts = family.parts(block)
    return kind if parts.are_ternary() and family.fits(block, parts) else None


def _kind_by_name(block: nn.Module) -> type[Fused] | None:
    if not type(block).__module__.startswith("transformers."):
        return None
    name = type(block).__name__
    return next((kind for kind in _KINDS if name in kind._tritern_family.blocks), None)


def _as_known(block: nn.Module) -> bool:
    """Whether a block has the modules of its family, and its ``forward`` the parameters of the fused one."""
    kind = _kind_by_name(block)
    assert kind is not None
    own = getattr(block, "_tritern_base", type(block))
    try:
        kind._tritern_family.parts(block)
        known = list(signature(own.forward).parameters) == list(signature(kind.forward).parameters)
    except (AttributeError, ValueError):
        known = False
    if not known:
        changed(f"{own.__module__}.{own.__name__}", "such blocks are not fused")
    return known
