"""The common part of fused blocks: when they run, merged products, int8 activations for the next block."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tritern_kernels.internals import changed, recorded

from ...nn.linear import Int4Linear, TernaryLinear
from ..extended import Extended

Tensors = tuple[Tensor, ...]
Weights = tuple[Tensor, Tensor, Tensor | None]
"""Packed codes, scale and bias of a product."""
Int8 = tuple[Tensor, Tensor]
"""Activations between kernels: int8 in packed order, and scales."""
Layers = tuple[TernaryLinear, ...]
KINDS = (TernaryLinear, Int4Linear)
LONGEST_ROW = 8192
"""Most hidden features of a fused block: a row of them fits into a GPU's registers."""
_merging = threading.Lock()


class Parts(NamedTuple):
    """A block's modules.

    These are the layers, grouped by their input (each group is one product); the norms; the activation of the
    feed-forward part; the module to pass to attention's functions; and the other modules that the fused block
    does not run.
    """

    groups: tuple[Layers, ...]
    norms: tuple[Any, ...]
    activation: nn.Module
    attention: Any
    others: tuple[nn.Module, ...]

    @property
    def layers(self) -> Layers:
        """All layers."""
        return tuple(layer for group in self.groups for layer in group)

    def are_ternary(self) -> bool:
        """Whether the kernels take all layers, and the layers of each group are alike."""
        layers = self.layers
        return (
            all(type(x) in KINDS and x.activation_bits == 8 and x.norm is None for x in layers)
            and all(len({(type(x), x.bias is None) for x in group}) == 1 for group in self.groups)
            and len({x.weight.device for x in layers}) == 1
        )

    def kinds(self) -> tuple[type, ...]:
        """Classes of all modules but the layers."""
        return tuple(type(m) for m in (*self.norms, self.activation, self.attention, *self.others))


class Family(ABC):
    """Blocks of one kind: their parts, and the facts that the kernels need.

    Attributes:
        blocks: names of the blocks' classes in transformers.
    """

    blocks: tuple[str, ...]

    @abstractmethod
    def parts(self, block: Any) -> Parts:
        """The block's modules."""

    @abstractmethod
    def fits(self, block: Any, parts: Parts) -> bool:
        """Whether the kernels can replace this block of ternary layers."""

    def norms(self, parts: Parts) -> Tensors:
        """The norms' parameters."""
        return tuple(p for norm in parts.norms for p in norm.parameters())

    def first_norm(self, block: Any) -> nn.Module | None:
        """The norm at the start of the block, if there is one."""
        return None

    def example(self, block: Any, x: Tensor) -> dict[str, Any]:
        """Further arguments of the block's ``forward`` for x [texts, tokens, hidden]."""
        return {}


class Fused(Extended, nn.Module):
    """Extends a block's class. The block's own ``forward`` still does everything but serving."""

    _tritern_family: Family
    _tritern_unsaved = ("_tritern_merged",)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        if not _merged(self, self._tritern_family.parts(self)):
            vars(self).pop("_tritern_merged", None)  # it belongs to the former device
        return result


def prepare(block: Any, following: Any) -> None:
    """Make a block ready to run before ``following``, a block or None. On a GPU its products are merged here,
    because no other stream or captured graph uses the layers' tensors yet.
    """
    family: Family = block._tritern_family
    parts = family.parts(block)
    block._tritern_kinds, block._tritern_next = parts.kinds(), None
    if following is not None and following._tritern_family is family:
        block._tritern_next = (family.first_norm(following),)  # a tuple, or it would be a submodule
    if on_gpu(parts.layers[0].weight):
        weights(block, parts)


# ---------------------------------------------------------------- whether a block runs fused


def on_gpu(x: Tensor) -> bool:
    """Whether the kernels can run."""
    return x.is_cuda


def serves(block: Any, x: Tensor) -> Parts | None:
    """The block's parts, if the fused steps can replace its own."""
    if (
        recorded()
        or type(x) is not Tensor
        or not on_gpu(x)
        or block.training
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled(x.device.type)
        or x.dim() != 3
        or not x.numel()
    ):
        return None
    parts: Parts = block._tritern_family.parts(block)
    fits = (
        _nothing_else_wanted(parts.attention.config)
        and parts.kinds() == block._tritern_kinds
        and parts.are_ternary()
        and not any(
            watched(m) or "forward" in vars(m)
            for m in (*parts.layers, *parts.norms, parts.activation, parts.attention, *parts.others)
        )
    )
    return parts if fits else None


def watched(module: nn.Module) -> bool:
    """Whether a module has hooks, except those of transformers that collect outputs on request."""
    return bool(module._forward_pre_hooks) or any(
        not getattr(hook, "__module__", "").startswith("transformers.utils.output_capturing")
        for hook in module._forward_hooks.values()
    )


def _nothing_else_wanted(config: Any) -> bool:
    """Whether attention is not eager, no attentions are collected and there are no global hooks. False if
    unknown.
    """
    try:
        from transformers.utils import output_capturing

        collected = output_capturing._active_collector.get()
        return (
            config._attn_implementation != "eager"
            and not any("attentions" in name for name in collected or ())
            and not nn.modules.module._has_any_global_hook()
        )
    except (ImportError, AttributeError, LookupError, TypeError) as error:
        changed(f"transformers or torch ({error})", "fused blocks run unfused")
        return False


# ---------------------------------------------------------------- a block's run


class Run(NamedTuple):
    """Attention's function and the products of a fused block."""

    attend: Callable[..., Any]
    products: tuple[Weights, ...]


def ready(block: Any, parts: Parts, x: Tensor) -> Run | None:
    """All that a run on x [M, hidden] needs; None if the kernels do not take the tensors as they are.

    They must be contiguous and on x's device; biases and norms must have its dtype.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS.get(parts.attention.config._attn_implementation)
    if attend is None or (_capturing(x) and not _merged(block, parts)):
        return None
    products = weights(block, parts)
    values = [bias for _, _, bias in products if bias is not None]
    values += block._tritern_family.norms(parts)
    tensors = (*values, *(t for packed, scale, _ in products for t in (packed, scale)))
    alike = all(t.dtype == x.dtype for t in values) and all(
        t.device == x.device and t.is_contiguous() for t in tensors
    )
    return Run(attend, products) if alike else None


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class _HandedOn(NamedTuple):
    """The int8 form of a block's output, or of its norm by a weight, and the conditions of its use: the same
    version of the output, the same stream, and the same graph or none.
    """

    int8: Int8
    norm: Tensor | None
    version: int
    stream: tuple[int, bool]


def _stream(x: Tensor) -> tuple[int, bool]:
    return (torch.cuda.current_stream(x.device).cuda_stream, _capturing(x)) if x.is_cuda else (0, False)


def handed_on(block: Any, hidden: Tensor, norm: Tensor | None = None) -> Int8 | None:
    """The int8 form of the block's input [texts, tokens, hidden], or of its norm by that weight. The block
    before has left it; None if it is no longer valid.
    """
    known: _HandedOn | None = vars(hidden).pop("_tritern", None)
    if known is None or watched(block):
        return None
    right = known.norm is norm and known.version == hidden._version and known.stream == _stream(hidden)
    return known.int8 if right else None


def hand_on(block: Any, hidden: Tensor, int8: Int8 | None, norm: Tensor | None = None) -> Tensor:
    """The block's output, with its int8 form attached. The next block uses it if it gets this very tensor."""
    if int8 is not None and block._tritern_next and not watched(block):
        known = _HandedOn(int8, norm, hidden._version, _stream(hidden))
        hidden._tritern = known  # pyright: ignore[reportAttributeAccessIssue]
    return hidden


def weights(block: Any, parts: Parts) -> tuple[Weights, ...]:
    """The block's products; they are merged anew if a layer's tensors have moved."""
    if not _merged(block, parts):
        with _merging:
            if not _merged(block, parts):
                products = tuple(_merge(group) for group in parts.groups if len(group) > 1)
                block._tritern_merged = _places(parts), products
    merged = iter(block._tritern_merged[1])
    return tuple(next(merged) if len(g) > 1 else _single(*g) for g in parts.groups)


def _places(parts: Parts) -> list[int]:
    layers = [x for group in parts.groups if len(group) > 1 for x in group]
    tensors = [t for x in layers for t in (x.weight, x.weight_scale, x.bias) if t is not None]
    return [t.data_ptr() for t in tensors]


def _merged(block: Any, parts: Parts) -> bool:
    """Whether layers with the same input are parts of one product now."""
    known = vars(block).get("_tritern_merged")
    return known is not None and known[0] == _places(parts)


def _single(layer: TernaryLinear) -> Weights:
    return layer.weight, layer.weight_scale, layer.bias


def _merge(layers: Layers) -> Weights:
    """Packed weights, scales and bias of several layers in one. The layers' tensors become views of it, so it
    changes with them.
    """
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.cat([layer.weight for layer in layers])
        scale = torch.cat([layer.weight_scale for layer in layers])
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        bias = torch.cat(biases) if biases else None
        if packed.is_cuda:  # before the copied tensors are freed and another stream reuses their memory
            torch.cuda.current_stream(packed.device).synchronize()
        row = 0
        for layer in layers:
            rows = slice(row, row := row + layer.out_features)
            layer.weight, layer.weight_scale = packed[rows], scale[rows]
            if bias is not None and layer.bias is not None:
                layer.bias.data = bias[rows]
    return packed, scale, bias
