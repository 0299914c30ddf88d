"""Transformer blocks of the BERT kind with their steps fused, for serving on a GPU.

Between its products such a block adds, normalizes, applies GELU and quantizes: each a pass over memory and a
launch, together longer than the products. Fused, query, key and value are one product on one quantization,
and each addition and LayerNorm and each GELU gives the next product's int8 activations in the same pass.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tritern_kernels.dispatch import BlockSizes, block_plan

from .errors import TriternError
from .linear import TernaryLinear

if TYPE_CHECKING:
    from tritern_kernels.block import Weights

_BLOCKS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer")
_LONGEST_ROW = 8192  # activations.LONGEST_ROW, which cannot be imported without Triton


def fuse(model: nn.Module) -> int:
    """Fuse the steps of ternary transformer blocks, in place, for faster inference on a CUDA GPU.

    For blocks of BERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA (MiniLM, E5, BGE, GTE, LaBSE and many more
    are these) with int8 activations and exact GELU; others stay as they are. Parameters and saved files stay
    the same. Results differ from the unfused model's in last bits of LayerNorm and GELU, which int8 rounding
    now and then turns into a step, so embed queries and documents the same way. In training, on a CPU, under
    autocast or ``torch.compile``, with eager attention or hooks inside a block, it runs unfused.

    Args:
        model: a model that ``tritern.patch`` or loading made ternary.

    Returns:
        The number of fused blocks.

    Raises:
        TriternError: the model has no block that can be fused.
    """
    found = [m for m in model.modules() if is_fused(m) or _can_be_fused(m)]
    if not found:
        raise TriternError(
            "the model has no block to fuse: fuse() takes blocks of BERT, RoBERTa, XLM-RoBERTa, CamemBERT or "
            "ELECTRA whose linear layers are ternary with activation_bits=8, with GELU between them. Call "
            "tritern.patch() first; models of other families run without fuse()."
        )
    for block in found:
        if not is_fused(block):
            block.__class__ = _fused_class(type(block))
    return len(found)


def is_fused(module: nn.Module) -> bool:
    """Whether ``fuse`` has made the module what it is."""
    return isinstance(module, _Fused)


def kind_of(block: nn.Module) -> tuple[BlockSizes, torch.device]:
    """What tells a fused block's kernels from another's, but for the dtype."""
    sizes, weights = _weights(block)
    return sizes, weights[0][0].device


def _can_be_fused(block: Any) -> bool:
    if type(block).__name__ not in _BLOCKS or not type(block).__module__.startswith("transformers."):
        return False
    layers, norms = _layers_of(block), (block.attention.output.LayerNorm, block.output.LayerNorm)
    activation = block.intermediate.intermediate_act_fn
    hidden, inner = layers[4].in_features, layers[4].out_features
    shapes = [*[(hidden, hidden)] * 4, (hidden, inner), (inner, hidden)]
    return (
        all(type(x) is TernaryLinear and x.activation_bits == 8 and x.norm is None for x in layers)
        and all(
            type(n) is nn.LayerNorm and n.bias is not None and len(n.normalized_shape) == 1 for n in norms
        )
        and len({x.bias is None for x in layers[:3]}) == 1
        and [(x.in_features, x.out_features) for x in layers] == shapes
        and hidden <= _LONGEST_ROW
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
            result = _forward(self, hidden_states, attention_mask, kwargs)
            if result is not None:
                return result
        return super().forward(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            **kwargs,
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
        and x.numel() > 0
        and block.attention.self.config._attn_implementation != "eager"
        and not any(m._forward_hooks or m._forward_pre_hooks for m in _inside(block))
        and all(type(m) is TernaryLinear and m.activation_bits == 8 for m in _layers_of(block))
    )


def _inside(block: Any) -> tuple[nn.Module, ...]:
    outputs = (block.attention.output, block.output)
    return (
        block.attention, block.attention.self, block.intermediate, *outputs, *(o.LayerNorm for o in outputs),
        *_layers_of(block),
    )  # fmt: skip


def _forward(block: Any, hidden: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """The block's output; None where the kernels do not take the tensors as they lie in memory."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention = block.attention.self
    texts, tokens, width = hidden.shape
    x = hidden.reshape(-1, width).contiguous()
    sizes, weights = _weights(block)
    interface = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation)
    if interface is None or not _alike(x, sizes, weights):
        return None
    plan = block_plan(sizes, x.shape[0], x.dtype, x.device)
    known = getattr(hidden, "_tritern", None)
    hooked = block._forward_hooks or block._forward_pre_hooks
    if known is not None and (hooked or known[1] != _version(hidden)):
        known = None
    found = plan.before(x, known and known[0], weights)
    if found is None:
        return None
    qkv, buffer = found
    heads = (texts, tokens, 3, -1, attention.attention_head_size)
    query, key, value = qkv.view(heads).permute(2, 0, 3, 1, 4).unbind(0)
    context, _ = interface(
        attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling, **kwargs
    )
    z, int8 = plan.after(context.reshape(x.shape).contiguous(), x, buffer, weights)
    result = z.view(hidden.shape)
    if not hooked:
        result._tritern = int8, _version(result)  # for the next block, if it is handed this very tensor
    return result


def _alike(x: Tensor, sizes: BlockSizes, weights: Weights) -> bool:
    """Whether all tensors are on x's device, and biases and norms of its dtype, as the kernels expect."""
    biases = [group[2] for group, has_bias in zip(weights, sizes.biases) if has_bias]
    return all(t.dtype == x.dtype for t in (*biases, *weights[4], *weights[5])) and all(
        t.device == x.device for group in weights for t in group
    )


def _version(x: Tensor | None) -> int:
    return 0 if x is None or x.is_inference() else x._version


def _place(x: Tensor | None) -> tuple[int, int]:
    return (0 if x is None else x.data_ptr()), _version(x)


def _weights(block: Any) -> tuple[BlockSizes, Weights]:
    """What ``BlockPlan`` needs of a block; merged anew when a tensor has another place or was written to."""
    layers = _layers_of(block)
    norms = block.attention.output.LayerNorm, block.output.LayerNorm
    places = [_place(t) for layer in layers[:3] for t in (layer.weight, layer.weight_scale, layer.bias)]
    known = vars(block).get("_tritern_merged")
    if known is None or known[0] != places:
        merged = _merge(layers[:3])
        places = [_place(t) for layer in layers[:3] for t in (layer.weight, layer.weight_scale, layer.bias)]
        known = block._tritern_merged = places, merged
    single = [_of(layer.weight, layer.weight_scale, layer.bias) for layer in layers[3:]]
    biases = (layers[0].bias is not None, *(layer.bias is not None for layer in layers[3:]))
    sizes = BlockSizes(layers[0].in_features, layers[4].out_features, biases, (norms[0].eps, norms[1].eps))
    return sizes, (known[1], *single, *((norm.weight, norm.bias) for norm in norms))


def _of(packed: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return packed, scale, scale if bias is None else bias


def _merge(layers: tuple[TernaryLinear, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weights, scales and bias of query, key and value in one; the layers' weights become parts of
    it.
    """
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.cat([layer.weight for layer in layers])
        scale = torch.cat([layer.weight_scale for layer in layers])
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        bias = torch.cat(biases) if biases else None
        row = 0
        for layer in layers:
            rows = slice(row, row := row + layer.out_features)
            layer.weight, layer.weight_scale = packed[rows], scale[rows]
    return _of(packed, scale, bias)
