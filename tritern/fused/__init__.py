"""Transformer blocks with their steps fused, for serving on a GPU.

Between its products a block adds, normalizes, applies an activation and quantizes: each a pass over memory
and a launch, together longer than the products. Fused, layers with the same input are one product on one
quantization, and each norm and each activation gives the next product's int8 activations in the same pass.
"""

from __future__ import annotations

import torch
from torch import nn

from tritern_kernels.dispatch import BertSizes, DecoderSizes

from ..errors import TriternError
from .bert import FusedBert
from .common import Fused, fused_class, prepare, weights
from .decoder import FusedDecoder

_KINDS = FusedBert, FusedDecoder


def fuse(model: nn.Module) -> int:
    """Fuse the steps of ternary transformer blocks, in place, for faster inference on a CUDA GPU.

    For blocks of BERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA (MiniLM, E5, BGE, GTE, LaBSE and many more
    are these) with exact GELU, and of Qwen3, Qwen2, Mistral and Llama (Qwen3-Embedding, E5-Mistral) with
    SwiGLU and heads of a power of two, all with int8 activations and at most 8,192 hidden features; others
    stay as they are. Parameters and saved files stay the same.
    Results differ from the unfused model's in last bits of norms and activations, which int8 rounding now and
    then turns into a step, so embed queries and documents the same way. In training, on a CPU, under autocast
    or ``torch.compile``, with eager attention, a cache of keys and values or hooks inside a block, it runs
    unfused.

    Args:
        model: a model that ``tritern.patch`` or loading made ternary.

    Returns:
        The number of fused blocks.

    Raises:
        TriternError: the model has no block that can be fused.
    """
    found = [(m, kind) for m in model.modules() if (kind := _kind(m))]
    if not found:
        raise TriternError(
            "the model has no block to fuse: fuse() takes blocks of BERT, RoBERTa, XLM-RoBERTa, CamemBERT or "
            "ELECTRA with GELU, and of Qwen3, Qwen2, Mistral or Llama with SwiGLU and heads as wide as a "
            "power of two, whose linear layers are ternary with activation_bits=8. Call tritern.patch() "
            "first, if it is not; other models run without fuse()."
        )
    for block, kind in found:
        if not isinstance(block, Fused):
            block.__class__ = fused_class(kind, type(block))
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    following = {block: after for blocks in lists for block, after in zip(blocks, blocks[1:])}
    blocks = {block for block, _ in found}
    for block in blocks:
        after = following.get(block)
        prepare(block, after if after in blocks else None)
    return len(found)


def fused_blocks(model: nn.Module) -> list[Fused]:
    """The blocks that ``fuse`` has made what they are, and that still consist of ternary layers."""
    return [m for m in model.modules() if isinstance(m, Fused) and _kind(m)]


def kind_of(block: Fused) -> tuple[BertSizes | DecoderSizes, torch.device]:
    """What tells a fused block's kernels from another's, but for the dtype."""
    sizes, tensors = weights(block, block._tritern_family.parts(block))
    return sizes, tensors[0][0].device


def run_on_zeros(block: Fused, texts: int, tokens: int, dtype: torch.dtype) -> None:
    """One run of a block, for what is compiled then."""
    sizes, device = kind_of(block)
    x = torch.zeros(texts, tokens, sizes.hidden, dtype=dtype, device=device)
    block(x, **block._tritern_family.example(block, x))


def _kind(block: nn.Module) -> type[Fused] | None:
    if not type(block).__module__.startswith("transformers."):
        return None
    for kind in _KINDS:
        family = kind._tritern_family
        if type(block).__name__ in family.blocks:
            parts = family.parts(block)
            return kind if parts.are_ternary() and family.fits(block, parts) else None
    return None
