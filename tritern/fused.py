"""Transformer blocks of the BERT kind with their steps fused, for serving on a GPU.

Between its products such a block adds, normalizes, applies GELU and quantizes: each a pass over memory and a
launch, together longer than the products. Fused, query, key and value are one product on one quantization, and
each addition and LayerNorm and each GELU gives the next product's int8 activations in the same pass.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tritern_kernels.dispatch import linear_int8_cuda, linear_unchecked, quantized_for

from .errors import TriternError
from .linear import TernaryLinear

_BLOCKS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer")
_LONGEST_ROW = 8192  # activations.LONGEST_ROW, which cannot be imported without Triton


def fuse(model: nn.Module) -> int:
    """Fuse the steps of ternary transformer blocks, in place, for faster inference on a CUDA GPU.

    For blocks of BERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA (MiniLM, E5, BGE, GTE, LaBSE and many more are
    these) with int8 activations and exact GELU; others stay as they are. Parameters and saved files stay the
    same. Results differ from the unfused model's in last bits of LayerNorm, which int8 rounding now and then
    turns into a step, so embed queries and documents the same way. In training, on a CPU, under autocast or
    ``torch.compile``, with hooks inside a block or where attentions are asked for, a fused block runs unfused.

    Args:
        model: a model that ``tritern.patch`` or loading made ternary.

    Returns:
        The number of fused blocks.

    Raises:
        TriternError: the model has no block that can be fused.
    """
    found = [m for m in model.modules() if isinstance(m, _Fused) or _can_be_fused(m)]
    if not found:
        raise TriternError(
            "the model has no block to fuse: fuse() takes blocks of BERT, RoBERTa, XLM-RoBERTa, CamemBERT or ELECTRA "
            "whose linear layers are ternary with activation_bits=8, with GELU between them. Call tritern.patch() "
            "first; models of other families run without fuse()."
        )
    for block in found:
        if not isinstance(block, _Fused):
            block.__class__ = _fused_class(type(block))
    return len(found)


def _can_be_fused(block: nn.Module) -> bool:
    if type(block).__name__ not in _BLOCKS or not type(block).__module__.startswith("transformers."):
        return False
    layers, norms = _layers_of(block), (block.attention.output.LayerNorm, block.output.LayerNorm)
    activation = block.intermediate.intermediate_act_fn
    return (
        all(type(x) is TernaryLinear and x.activation_bits == 8 and x.norm is None for x in layers)
        and all(type(n) is nn.LayerNorm and n.bias is not None and len(n.normalized_shape) == 1 for n in norms)
        and len({x.bias is None for x in layers[:3]}) == 1
        and layers[0].in_features <= _LONGEST_ROW
        and (type(activation).__name__ == "GELUActivation" or _is_exact_gelu(activation))
        and not block.is_decoder
        and not block.chunk_size_feed_forward
    )


def _is_exact_gelu(activation: Any) -> bool:
    return type(activation) is nn.GELU and activation.approximate == "none"


def _layers_of(block: Any) -> tuple[TernaryLinear, ...]:
    attention = block.attention.self
    return (
        attention.query, attention.key, attention.value,
        block.attention.output.dense, block.intermediate.dense, block.output.dense,
    )  # fmt: skip


class _Fused(nn.Module):
    """What a block's class is extended by; its own ``forward`` stays for everything but serving."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states [texts, tokens, hidden] -> the same, as the block's class."""
        if encoder_hidden_states is None and past_key_values is None and _serves(self, hidden_states):
            return _forward(self, hidden_states, attention_mask, kwargs)
        return super().forward(
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values, **kwargs
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time: copies and pickles name the class that it extends
        made, arguments, *rest = super().__reduce_ex__(protocol)
        return _new, (type(self).__mro__[2],), *rest


def _new(base: type[nn.Module]) -> nn.Module:
    fused = _fused_class(base)
    return fused.__new__(fused)


@cache
def _fused_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(base.__name__, (_Fused, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and x.device.index == torch.cuda.current_device()


def _serves(block: Any, x: Tensor) -> bool:
    """Whether the fused steps can stand for the block's own."""
    return (
        not torch.compiler.is_compiling()
        and _on_gpu(x)
        and not block.training
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and x.dim() == 3
        and x.dtype == block.output.LayerNorm.weight.dtype
        and block.attention.self.config._attn_implementation != "eager"
        and not any(m._forward_hooks or m._forward_pre_hooks for m in _inside(block))
        and all(type(m) is TernaryLinear and m.activation_bits == 8 for m in _layers_of(block))
        and block.attention.self.query.weight.device == x.device
    )


def _inside(block: Any) -> tuple[nn.Module, ...]:
    outputs = (block.attention.output, block.output)
    return (
        block.attention, block.attention.self, block.intermediate, *outputs, *(o.LayerNorm for o in outputs),
        *_layers_of(block),
    )  # fmt: skip


def _forward(block: Any, hidden: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention, dense = block.attention.self, block.attention.output.dense
    texts, tokens, width = hidden.shape
    x = hidden.reshape(-1, width)
    q, scale, tickets = _quantized(block, hidden, x)
    packed, weight_scale, bias = _merged(block)
    qkv = linear_int8_cuda(q, scale, packed, weight_scale, bias, width, x.dtype, tickets=tickets)
    heads = (texts, tokens, -1, attention.attention_head_size)
    query, key, value = (part.view(heads).transpose(1, 2) for part in qkv.view(texts, tokens, -1).chunk(3, dim=-1))
    interface = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    context, _ = interface(
        attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling, **kwargs
    )
    context = context.reshape(x.shape[0], -1)
    out = linear_unchecked(context, dense.weight, dense.weight_scale, dense.bias, dense.in_features, 8, False)
    y, q, scale = _add_norm_quantize(out, x, block.attention.output.LayerNorm)
    inner = block.intermediate.dense
    h = linear_int8_cuda(q, scale, inner.weight, inner.weight_scale, inner.bias, width, x.dtype)
    last = block.output.dense
    q, scale, tickets = quantized_for(h, last.out_features, gelu=True)
    out = linear_int8_cuda(
        q, scale, last.weight, last.weight_scale, last.bias, last.in_features, x.dtype, tickets=tickets
    )
    y, q, scale = _add_norm_quantize(out, y, block.output.LayerNorm)
    result = y.view(hidden.shape)
    if not (block._forward_hooks or block._forward_pre_hooks):
        result._tritern = q, scale, _version(result)  # for the next block, if it is handed this very tensor
    return result


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _quantized(block: Any, hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """x in int8: from the block before, unless anything may have changed it since."""
    known = getattr(hidden, "_tritern", None)
    if known and known[2] == _version(hidden) and not (block._forward_hooks or block._forward_pre_hooks):
        return known[0], known[1], None
    return quantized_for(x.contiguous(), 3 * block.attention.self.query.out_features)


def _merged(block: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed weights, scales and bias of query, key and value in one; the layers' weights become parts of
    it.
    """
    layers = _layers_of(block)[:3]
    key = [(*_place(x.weight), *_place(x.weight_scale), *_place(x.bias)) for x in layers]
    if getattr(block, "_tritern_merged", None) is None or block._tritern_merged[0] != key:
        with torch.inference_mode(False), torch.no_grad():
            merged = torch.cat([x.weight for x in layers]), torch.cat([x.weight_scale for x in layers])
            biases = [x.bias for x in layers if x.bias is not None]
            bias = torch.cat(biases) if biases else None
            row = 0
            for layer in layers:
                rows = slice(row, row := row + layer.out_features)
                layer.weight, layer.weight_scale = merged[0][rows], merged[1][rows]
        key = [(*_place(x.weight), *_place(x.weight_scale), *_place(x.bias)) for x in layers]
        block._tritern_merged = key, (*merged, bias)
    return block._tritern_merged[1]


def _place(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), _version(x))


def _add_norm_quantize(x: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    from tritern_kernels.activations import add_norm_quantize

    return add_norm_quantize(x, residual, norm.weight, norm.bias, norm.eps)
