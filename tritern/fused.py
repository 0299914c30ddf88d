"""Transformer blocks of the BERT kind with their steps fused, for serving on a GPU.

Between its products such a block adds, normalizes, applies GELU and quantizes: each a pass over memory and a
launch, together longer than the products. Fused, query, key and value are one product on one quantization,
and each addition and LayerNorm and each GELU gives the next product's int8 activations in the same pass.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tritern_kernels.dispatch import LONGEST_ROW, BlockSizes, block_plan

from .errors import TriternError
from .linear import TernaryLinear

if TYPE_CHECKING:
    from tritern_kernels.block import Weights

_BLOCKS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer")
_merging = threading.Lock()


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
    found: list[Any] = [m for m in model.modules() if _can_be_fused(m)]
    if not found:
        raise TriternError(
            "the model has no block to fuse: fuse() takes blocks of BERT, RoBERTa, XLM-RoBERTa, CamemBERT or "
            "ELECTRA whose linear layers are ternary with activation_bits=8, with GELU between them. Call "
            "tritern.patch() first; models of other families run without fuse()."
        )
    for block in found:
        if not _is_fused(block):
            block.__class__ = _fused_class(type(block))
        block._tritern_activation = (block.intermediate.intermediate_act_fn,)  # not as a submodule
        _weights(block)  # here, where no other stream or captured graph uses the layers' tensors
    for parent in model.modules():
        if isinstance(parent, nn.ModuleList):
            children: list[Any] = list(parent)
            for block, following in zip(children, children[1:]):
                if _is_fused(block):
                    block._tritern_hands_on = _is_fused(following)
    return len(found)


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, _Fused)


def fused_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that ``fuse`` has made what they are, and that still consist of ternary layers."""
    return [m for m in model.modules() if _is_fused(m) and _can_be_fused(m)]


def kind_of(block: nn.Module) -> tuple[BlockSizes, torch.device]:
    """What tells a fused block's kernels from another's, but for the dtype."""
    sizes, weights = _weights(block)
    return sizes, weights[0][0].device


def _can_be_fused(block: Any) -> bool:
    if type(block).__name__ not in _BLOCKS or not type(block).__module__.startswith("transformers."):
        return False
    layers, norms = _layers_of(block), (block.attention.output.LayerNorm, block.output.LayerNorm)
    activation = block.intermediate.intermediate_act_fn
    if not _ternary(layers):
        return False
    hidden, inner = layers[4].in_features, layers[4].out_features
    shapes = [*[(hidden, hidden)] * 4, (hidden, inner), (inner, hidden)]
    return (
        [(x.in_features, x.out_features) for x in layers] == shapes
        and hidden <= LONGEST_ROW
        and all(
            type(n) is nn.LayerNorm and n.bias is not None and len(n.normalized_shape) == 1 for n in norms
        )
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


def _ternary(layers: tuple[TernaryLinear, ...]) -> bool:
    return (
        all(type(x) is TernaryLinear and x.activation_bits == 8 and x.norm is None for x in layers)
        and len({x.bias is None for x in layers[:3]}) == 1
        and len({x.weight.device for x in layers}) == 1
    )


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

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        vars(self).pop("_tritern_merged", None)  # of the place before
        return super()._apply(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time: copies and pickles name the class that it extends
        reduced: Any = super().__reduce_ex__(protocol)
        state, *rest = reduced[2:]
        state = {name: value for name, value in state.items() if name != "_tritern_merged"}
        return _new, (self._tritern_base,), state, *rest


def _new(base: type[nn.Module]) -> nn.Module:
    fused = _fused_class(base)
    return fused.__new__(fused)


@cache
def _fused_class(base: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": base.__module__, "__doc__": base.__doc__, "_tritern_base": base}
    return type(base.__name__, (_Fused, base), names)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


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
        and block.intermediate.intermediate_act_fn is block._tritern_activation[0]
        and _ternary(_layers_of(block))
        and not _collecting_attentions()
        and not nn.modules.module._has_any_global_hook()
        and not any(_watched(m) or "forward" in vars(m) for m in _inside(block))
    )


def _inside(block: Any) -> tuple[nn.Module, ...]:
    outputs = (block.attention.output, block.output)
    return (
        block.attention, block.attention.self, block.intermediate, *outputs, *(o.LayerNorm for o in outputs),
        *_layers_of(block),
    )  # fmt: skip


def _watched(module: nn.Module) -> bool:
    """Whether anybody but transformers, which leaves hooks that collect outputs on request, hooks in here."""
    return bool(module._forward_pre_hooks) or any(
        not getattr(hook, "__module__", "").startswith("transformers.utils.output_capturing")
        for hook in module._forward_hooks.values()
    )


def _collecting_attentions() -> bool:
    from transformers.utils import output_capturing

    wanted = output_capturing._active_collector.get()
    return wanted is not None and any("attentions" in name for name in wanted)


def _forward(block: Any, hidden: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """The block's output; None where the kernels do not take the tensors as they are."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if hidden.is_cuda and hidden.device.index != torch.cuda.current_device():
        with torch.cuda.device(hidden.device):
            return _forward(block, hidden, mask, kwargs)
    attention = block.attention.self
    texts, tokens, width = hidden.shape
    x = hidden.reshape(-1, width).contiguous()
    interface = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation)
    if interface is None or (not _merged(block) and _capturing(x)):
        return None
    sizes, weights = _weights(block)
    if not _alike(x, sizes, weights):
        return None
    plan = block_plan(sizes, x.shape[0], x.dtype, x.device)
    known = vars(hidden).pop("_tritern", None)
    if known is not None and (_watched(block) or known[1] != hidden._version):
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
    context = context.reshape(x.shape).to(x.dtype).contiguous()
    context = context.clone() if context.data_ptr() & 15 else context
    z, int8 = plan.after(context, x, buffer, weights)
    result = z.view(hidden.shape)
    if vars(block).get("_tritern_hands_on") and not _watched(block):
        result._tritern = int8, result._version  # for the next block, if it is handed this very tensor
    return result


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _alike(x: Tensor, sizes: BlockSizes, weights: Weights) -> bool:
    """Whether all tensors are contiguous and on x's device, and biases and norms of its dtype, as the kernels
    expect.
    """
    biases = [group[2] for group, has_bias in zip(weights, sizes.biases) if has_bias]
    return all(t.dtype == x.dtype for t in (*biases, *weights[4], *weights[5])) and all(
        t.device == x.device and t.is_contiguous() for group in weights for t in group
    )


def _places(block: Any) -> list[int]:
    layers = _layers_of(block)[:3]
    tensors = [t for x in layers for t in (x.weight, x.weight_scale, x.bias) if t is not None]
    return [t.data_ptr() for t in tensors]


def _merged(block: Any) -> bool:
    """Whether query, key and value are parts of one product now."""
    known = vars(block).get("_tritern_merged")
    return known is not None and known[0] == _places(block)


def _weights(block: Any) -> tuple[BlockSizes, Weights]:
    """What ``BlockPlan`` needs of a block; query, key and value are merged anew where one has moved."""
    if not _merged(block):
        with _merging:
            if not _merged(block):
                product = _merge(_layers_of(block)[:3])
                block._tritern_merged = _places(block), product
    layers = _layers_of(block)
    norms = block.attention.output.LayerNorm, block.output.LayerNorm
    single = [_of(layer.weight, layer.weight_scale, layer.bias) for layer in layers[3:]]
    biases = (layers[0].bias is not None, *(layer.bias is not None for layer in layers[3:]))
    sizes = BlockSizes(layers[0].in_features, layers[4].out_features, biases, (norms[0].eps, norms[1].eps))
    return sizes, (block._tritern_merged[1], *single, *((norm.weight, norm.bias) for norm in norms))


def _of(packed: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return packed, scale, scale if bias is None else bias


def _merge(layers: tuple[TernaryLinear, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weights, scales and bias of query, key and value in one. What the layers hold becomes parts of
    it, so that it changes with them.
    """
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.cat([layer.weight for layer in layers])
        scale = torch.cat([layer.weight_scale for layer in layers])
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        bias = torch.cat(biases) if biases else None
        if packed.is_cuda:  # before what was copied from is freed, perhaps for another stream
            torch.cuda.current_stream(packed.device).synchronize()
        row = 0
        for layer in layers:
            rows = slice(row, row := row + layer.out_features)
            layer.weight, layer.weight_scale = packed[rows], scale[rows]
            if bias is not None and layer.bias is not None:
                layer.bias.data = bias[rows]
    return _of(packed, scale, bias)
