"""Fused blocks of Qwen3 and other decoders with RMSNorm, rotary embedding and SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .block import LONGEST_ROW, Family, Fused, Parts, hand_on, handed_on, ready, serves


class Decoder(Family):
    """Blocks with an RMSNorm before attention and before the feed-forward part; Qwen3 norms heads, too."""

    blocks = ("Qwen3DecoderLayer", "Qwen2DecoderLayer", "MistralDecoderLayer", "LlamaDecoderLayer")

    def parts(self, block: Any) -> Parts:
        a, mlp = block.self_attn, block.mlp
        groups = (a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)
        of_heads = (getattr(a, name, None) for name in ("q_norm", "k_norm"))
        norms = block.input_layernorm, block.post_attention_layernorm, *(n for n in of_heads if n is not None)
        return Parts(groups, norms, mlp.act_fn, a, (mlp,))

    def fits(self, block: Any, parts: Parts) -> bool:
        (q, k, v), (o,), (gate, up), (down,) = parts.groups
        hidden, head_dim, norms = q.in_features, parts.attention.head_dim, parts.norms
        return (
            {x.in_features for x in (k, v, gate, up)} == {hidden}
            and o.out_features == down.out_features == hidden <= LONGEST_ROW
            and k.out_features == v.out_features
            and o.in_features == q.out_features
            and gate.out_features == up.out_features == down.in_features
            and head_dim >= 16
            and head_dim & (head_dim - 1) == 0
            and q.out_features % head_dim == k.out_features % head_dim == 0
            and all(type(n).__name__.endswith("RMSNorm") and hasattr(n, "variance_epsilon") for n in norms)
            and len(norms) in (2, 4)
            and len({n.variance_epsilon for n in norms[2:]}) <= 1
            and type(parts.activation).__name__ in ("SiLU", "SiLUActivation")
        )

    def first_norm(self, block: Any) -> nn.Module:
        return block.input_layernorm

    def example(self, block: Any, x: Tensor) -> dict[str, Any]:
        turn = x.new_zeros(1, x.shape[1], block.self_attn.head_dim)
        return {"position_embeddings": (turn, turn)}


class FusedDecoder(Fused):
    """A block of ``Decoder``."""

    _tritern_family = Decoder()

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states [texts, tokens, hidden] -> the same, as the block's class."""
        kwargs = {"position_ids": position_ids, "use_cache": use_cache} | kwargs
        if past_key_values is None and position_embeddings and (parts := serves(self, hidden_states)):
            result = run(self, parts, hidden_states, attention_mask, *position_embeddings, kwargs)
            if result is not None:
                return result
        return super().forward(
            hidden_states,
            attention_mask,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )


def run(
    block: Any,
    parts: Parts,
    hidden: Tensor,
    mask: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The block's output; None if the kernels do not take the tensors as they are."""
    if hidden.is_cuda and hidden.device.index != torch.cuda.current_device():
        with torch.cuda.device(hidden.device):
            return run(block, parts, hidden, mask, cos, sin, kwargs)
    attention = parts.attention
    texts, tokens, width = hidden.shape
    x = hidden.reshape(-1, width).contiguous()
    how = ready(block, parts, x)
    head_dim = attention.head_dim
    if how is None or not _turns(cos, sin, x, (texts, tokens, head_dim)):
        return None
    from tritern_kernels import blocks  # needs Triton

    (query, key, _), norms = parts.groups[0], parts.norms
    heads, key_heads = query.out_features // head_dim, key.out_features // head_dim
    weights = blocks.DecoderWeights(
        *(blocks.Product(*product) for product in how.products),
        norms=(norms[0].weight, norms[1].weight),
        head_norms=tuple(norm.weight for norm in norms[2:]),
        epsilons=(norms[0].variance_epsilon, norms[1].variance_epsilon, norms[-1].variance_epsilon),
        heads=(heads, key_heads),
    )
    cos, sin = (t.reshape(-1, head_dim).contiguous() for t in (cos, sin))
    qkv = blocks.decoder_qkv(x, handed_on(block, hidden, norms[0].weight), cos, sin, weights)
    qkv = qkv.view(texts, tokens, -1, head_dim).transpose(1, 2).split((heads, key_heads, key_heads), dim=1)
    kwargs = _window(block) | kwargs
    context, _ = how.attend(attention, *qkv, mask, dropout=0.0, scaling=attention.scaling, **kwargs)
    context = context.reshape(-1, heads * head_dim).to(x.dtype).contiguous()
    norm = _next_weight(block, x, weights.epsilons[0])
    z, int8 = blocks.decoder_output(context, x, weights, norm)
    return hand_on(block, z.view(hidden.shape), int8, norm)


def _turns(cos: Tensor, sin: Tensor, x: Tensor, shape: tuple[int, int, int]) -> bool:
    """Whether cos and sin have x's dtype and device, and are shared by all texts or given for each."""
    return cos.shape == sin.shape in (shape, (1, *shape[1:])) and all(
        t.dtype == x.dtype and t.device == x.device for t in (cos, sin)
    )


def _window(block: Any) -> dict[str, Any]:
    """The sliding window in the form that each family passes to attention."""
    if type(block).__name__ == "LlamaDecoderLayer":
        return {}
    holds_it = block.self_attn.config if type(block).__name__ == "MistralDecoderLayer" else block.self_attn
    return {"sliding_window": getattr(holds_it, "sliding_window", None)}


def _next_weight(block: Any, x: Tensor, eps: float) -> Tensor | None:
    """The weight of the next block's first norm, if the kernels take it."""
    if not block._tritern_next or block._tritern_next[0].variance_epsilon != eps:
        return None
    weight = block._tritern_next[0].weight
    fits = weight.dtype == x.dtype and weight.device == x.device and weight.is_contiguous()
    return weight if fits else None
