"""Fused blocks of BERT and its kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .block import LONGEST_ROW, Family, Fused, Parts, hand_on, handed_on, ready, serves


class Bert(Family):
    """Blocks with an addition and a LayerNorm after attention and after the feed-forward part; exact GELU."""

    blocks = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer")

    def parts(self, block: Any) -> Parts:
        attention, first, inner, last = (
            block.attention.self, block.attention.output, block.intermediate, block.output,
        )  # fmt: skip
        groups = (
            (attention.query, attention.key, attention.value),
            (first.dense,),
            (inner.dense,),
            (last.dense,),
        )
        norms = first.LayerNorm, last.LayerNorm
        return Parts(
            groups, norms, inner.intermediate_act_fn, attention, (block.attention, first, inner, last)
        )

    def fits(self, block: Any, parts: Parts) -> bool:
        layers = parts.layers
        hidden, inner = layers[4].in_features, layers[4].out_features
        shapes = [*[(hidden, hidden)] * 4, (hidden, inner), (inner, hidden)]
        return (
            [(x.in_features, x.out_features) for x in layers] == shapes
            and hidden <= LONGEST_ROW
            and all(
                type(n) is nn.LayerNorm and n.bias is not None and len(n.normalized_shape) == 1
                for n in parts.norms
            )
            and _is_exact_gelu(parts.activation)
            and not block.is_decoder
            and not block.chunk_size_feed_forward
        )


def _is_exact_gelu(activation: Any) -> bool:
    exact = type(activation) is nn.GELU and activation.approximate == "none"
    return exact or type(activation).__name__ == "GELUActivation"


class FusedBert(Fused):
    """A block of ``Bert``."""

    _tritern_family = Bert()

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
        alone = encoder_hidden_states is None and past_key_values is None
        if alone and (parts := serves(self, hidden_states)):
            result = run(self, parts, hidden_states, attention_mask, kwargs)
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


def run(
    block: Any, parts: Parts, hidden: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """The block's output; None if the kernels do not take the tensors as they are."""
    if hidden.is_cuda and hidden.device.index != torch.cuda.current_device():
        with torch.cuda.device(hidden.device):
            return run(block, parts, hidden, mask, kwargs)
    attention = parts.attention
    texts, tokens, width = hidden.shape
    x = hidden.reshape(-1, width).contiguous()
    how = ready(block, parts, x)
    if how is None:
        return None
    from tritern_kernels import blocks  # needs Triton

    norms = parts.norms
    weights = blocks.BertWeights(
        *(blocks.Product(*product) for product in how.products),
        norms=tuple((norm.weight, norm.bias) for norm in norms),
        epsilons=(norms[0].eps, norms[1].eps),
    )
    qkv = blocks.bert_qkv(x, handed_on(block, hidden), weights)
    heads = (texts, tokens, 3, -1, attention.attention_head_size)
    query, key, value = qkv.view(heads).permute(2, 0, 3, 1, 4).unbind(0)
    context, _ = how.attend(
        attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling, **kwargs
    )
    context = context.reshape(-1, width).to(x.dtype).contiguous()
    z, int8 = blocks.bert_output(context, x, weights)
    return hand_on(block, z.view(hidden.shape), int8)
