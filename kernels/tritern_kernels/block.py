"""All steps of a transformer block but attention itself, with everything decided (see ``plan``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import activations, gemm, norms
from .config import KernelConfig
from .formats import padded_k
from .launch import ASM, INTERPRETED, Launch, current_stream, hooked
from .ops import BertSizes, DecoderSizes
from .plan import product, quantizer, tickets_of

Group = tuple[Tensor, ...]
Choose = Callable[[int, int, int], KernelConfig]


class BlockPlan(ABC):
    """What blocks have in common: four products (query with key and value, output, the first and the last of
    the feed-forward part) and one buffer for what comes between them, for up to ``most`` tokens in a dtype on
    a GPU.

    A block's ``weights`` are groups of tensors: of each product packed codes, scale and bias (or again the
    scale), then of each norm its parameters. ``choose(M, N, K)`` configures products.
    """

    def __init__(
        self,
        shapes: tuple[tuple[int, int], ...],
        biases: tuple[bool, ...],
        inner_activation: activations.Activation,
        most: int,
        dtype: torch.dtype,
        device: torch.device,
        choose: Choose,
    ) -> None:
        self.shapes, self.dtype, self.device = shapes, dtype, device
        (_, self.hidden), (_, context), _, (_, inner) = shapes
        configs = [choose(most, N, K) for N, K in shapes]
        # tickets are cleared by a quantizer, which only the last product has just before it in any case
        configs[:3] = [replace(c, split_k=1) for c in configs[:3]]
        self.configs = configs
        self.tickets = tickets_of(configs[3], most, self.hidden)
        self.products = [
            product(c, N, K, bias, False, device)
            for c, (N, K), bias in zip(configs, shapes, biases, strict=True)
        ]
        self.quantize_context, self.rows_of_context = quantizer(context, context, 0, "", device)
        stride = shapes[2][0]  # of what the feed-forward part's first product gives
        self.quantize_inner, self.rows_of_inner = quantizer(
            inner, stride, self.tickets, inner_activation, device
        )
        self.norm_blocks = activations.quantize_blocks(self.hidden)
        self.layout = lru_cache(maxsize=1024)(self._layout)

    def _layout(self, M: int) -> tuple[dict[str, tuple[int, int, torch.dtype]], int]:
        """Where everything begins, its elements and dtype in the buffer for M tokens; the buffer's size."""
        (qkv, H), (_, context), (between, _), (_, inner) = self.shapes
        last, value, byte, word, fp32 = self.configs[3], self.dtype, torch.int8, torch.int32, torch.float32
        shares = last.tiles(M, H) * last.split_k * last.block_m * last.block_n if self.tickets else 0
        areas = {
            "q": (M * padded_k(max(H, context)), byte), "scale": (M, fp32), "out": (M * H, value),
            "y": (M * H, value), "inner_q": (M * padded_k(inner), byte),
            "tickets": (self.tickets or 32, word), "shares": (shares or 32, word),
            "qkv": (M * qkv, value), "inner": (M * between, value),
        }  # fmt: skip
        places, size = {}, 0
        for name, (count, dtype) in areas.items():
            start = places["qkv"][0] if name == "inner" else size  # it comes when qkv is done with
            places[name] = (start, count, dtype)
            size = max(size, start + (count * dtype.itemsize + 127 & -128))
        return places, size

    def _takes(self, x: Tensor, weights: tuple[Group, ...]) -> bool:
        """Whether the tensors are aligned to 16 bytes, and no profiler has hooked launches."""
        any_bit = x.data_ptr()
        for group in weights:
            for tensor in group:
                any_bit |= tensor.data_ptr()
        return not (any_bit & 15 or hooked())

    def _buffer(self, M: int) -> Tensor:
        return torch.empty(self.layout(M)[1], dtype=torch.uint8, device=self.device)

    def _quantize(self, x: Tensor, q: Any, scale: Any, stream: int) -> None:
        """x as wide as attention's context, in int8."""
        M = x.shape[0]
        grid = -(-M // self.rows_of_context), 1
        self.quantize_context(grid, stream, M, (self._of(x), q, scale, scale))

    def _qkv(
        self, M: int, q: Any, scale: Any, buffer: Tensor, weights: tuple[Group, ...], stream: int
    ) -> Tensor:
        """qkv [M, ...] of x in int8: the buffer's part."""
        places, _ = self.layout(M)
        self._product(0, M, q, scale, self._at(buffer, places)("qkv"), weights, stream)
        return _view(buffer, places["qkv"]).view(M, -1)

    def _inner_to_out(
        self, M: int, at: Callable[[str], Any], weights: tuple[Group, ...], stream: int
    ) -> None:
        """The feed-forward part, from its input in int8 to the last product."""
        q, scale, h, inner_q, tickets = at("q"), at("scale"), at("inner"), at("inner_q"), at("tickets")
        self._product(2, M, q, scale, h, weights, stream)
        self.quantize_inner((-(-M // self.rows_of_inner), 1), stream, M, (h, inner_q, scale, tickets))
        self._product(3, M, inner_q, scale, at("out"), weights, stream, (at("shares"), tickets))

    def _product(
        self, i: int, M: int, q: Any, scale: Any, y: Any, weights: tuple[Group, ...], stream: int,
        workspace: tuple[Any, ...] = (),
    ) -> None:  # fmt: skip
        multiply = self.products[i]
        if multiply.kernel is not gemm.gemm_int8_kernel:
            workspace = ()
        elif not workspace:
            workspace = scale, scale  # not used without a split
        packed, weight_scale, bias = map(self._of, weights[i])
        grid = self.configs[i].grid(M, self.shapes[i][0])
        multiply(grid, stream, M, (q, packed, scale, weight_scale, bias, y, *workspace))

    def _norm(self, eps: float, rms: bool, add: bool) -> Launch:
        constants = (*self.norm_blocks, rms, add, ASM)
        sizes = self.hidden, padded_k(self.hidden), eps
        return Launch(norms.norm_quantize_kernel, sizes, constants, self.device)

    def _rows(self, M: int) -> tuple[int, int]:
        return -(-M // self.norm_blocks[0]), 1

    @property
    @abstractmethod
    def _compiled(self) -> bool:
        """Whether every kernel has been launched once, and takes addresses from now on."""

    def _stream(self) -> int:
        return 0 if INTERPRETED else current_stream(self.device.index)

    def _of(self, tensor: Tensor) -> Any:
        return tensor.data_ptr() if self._compiled else tensor

    def _at(self, buffer: Tensor, places: dict[str, tuple[int, int, torch.dtype]]) -> Callable[[str], Any]:
        if self._compiled:
            base = buffer.data_ptr()
            return lambda name: base + places[name][0]
        return lambda name: _view(buffer, places[name])

    def _new_int8(self, M: int) -> Tensor:
        """Room for int8 activations [M, padded hidden] and, behind them, their scales."""
        size = (M * padded_k(self.hidden) + 127 & -128) + 4 * M
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _int8(self, known: Tensor, M: int) -> tuple[Any, Any]:
        size = M * padded_k(self.hidden)
        behind = size + 127 & -128
        if self._compiled:
            base = known.data_ptr()
            return base, base + behind
        return known[:size].view(torch.int8), known[behind : behind + 4 * M].view(torch.float32)


def _view(buffer: Tensor, place: tuple[int, int, torch.dtype]) -> Tensor:
    start, count, dtype = place
    return buffer[start : start + count * dtype.itemsize].view(dtype)


def _like(x: Tensor) -> Tensor:
    with torch.inference_mode(False):  # a tensor that counts its changes
        return torch.empty_like(x)


class BertPlan(BlockPlan):
    """A block of the BERT kind.

        qkv = x Wqkv;  [attention gives context];
        y = norm(context Wout + x);  z = norm(gelu(y Winner) Wlast + y)

    x, y and z also in int8, as the next product takes them: each comes from the kernel before it. ``weights``
    end with weight and bias of each of the two norms.
    """

    def __init__(
        self, sizes: BertSizes, most: int, dtype: torch.dtype, device: torch.device, choose: Choose
    ) -> None:
        H, inner = sizes.hidden, sizes.inner
        shapes = (3 * H, H), (H, H), (inner, H), (H, inner)
        super().__init__(shapes, sizes.biases, "gelu", most, dtype, device, choose)
        self.norms = [self._norm(eps, False, True) for eps in sizes.epsilons]

    def before(
        self, x: Tensor, known: Tensor | None, weights: tuple[Group, ...]
    ) -> tuple[Tensor, Tensor] | None:
        """qkv [M, 3 * hidden] of x [M, hidden], and the buffer it is a part of; None where ``Plan`` would
        give None (weights have to be contiguous). ``known``: x's int8 form as ``after`` gives it, or None.
        """
        if not self._takes(x, weights):
            return None
        M, stream = x.shape[0], self._stream()
        buffer = self._buffer(M)
        if known is None:
            at = self._at(buffer, self.layout(M)[0])
            q, scale = at("q"), at("scale")
            self._quantize(x, q, scale, stream)
        else:
            q, scale = self._int8(known, M)
        return self._qkv(M, q, scale, buffer, weights, stream), buffer

    def after(
        self, context: Tensor, x: Tensor, buffer: Tensor, weights: tuple[Group, ...]
    ) -> tuple[Tensor, Tensor]:
        """z [M, hidden] of attention's context [M, hidden], and its int8 form with the scales behind it."""
        M = x.shape[0]
        at, stream, rows = self._at(buffer, self.layout(M)[0]), self._stream(), self._rows(M)
        z, known = _like(x), self._new_int8(M)
        q, scale, out, y = at("q"), at("scale"), at("out"), at("y")
        self._quantize(context, q, scale, stream)
        self._product(1, M, q, scale, out, weights, stream)
        first, second = (tuple(map(self._of, norm)) for norm in weights[4:])
        self.norms[0](rows, stream, M, (out, self._of(x), *first, y, q, scale))
        self._inner_to_out(M, at, weights, stream)
        self.norms[1](rows, stream, M, (out, y, *second, self._of(z), *self._int8(known, M)))
        return z, known

    @property
    def _compiled(self) -> bool:
        return self.norms[1].compiled is not None  # the last of all


class DecoderPlan(BlockPlan):
    """A decoder's block with RMSNorm, rotary embedding and SwiGLU.

        qkv = norm(x) Wqkv, its queries and keys normalized (or not) and rotated;  [attention gives context];
        y = context Wout + x;  z = swiglu(norm(y) Winner) Wlast + y

    The norms' results exist in int8 only. ``weights`` end with the weights of the norms: of x, of y, and of
    queries and keys (an empty group where these have none).
    """

    def __init__(
        self, sizes: DecoderSizes, most: int, dtype: torch.dtype, device: torch.device, choose: Choose
    ) -> None:
        H, inner, context = sizes.hidden, sizes.inner, sizes.heads * sizes.head_dim
        turned = sizes.heads + sizes.key_heads
        width = (turned + sizes.key_heads) * sizes.head_dim
        shapes = (width, H), (H, context), (2 * inner, H), (H, inner)
        super().__init__(shapes, sizes.biases, "swiglu", most, dtype, device, choose)
        self.turned, self.heads_a_program = turned, norms.rotate_blocks(sizes.head_dim)
        eps = sizes.epsilons
        self.first_norm = self._norm(eps[0], True, False)
        self.norms = [self._norm(eps[1], True, True), self._norm(eps[0], True, True)]
        constants = self.heads_a_program, sizes.head_dim // 2, sizes.normalized_heads
        self.rotate = Launch(
            norms.norm_rotate_kernel, (sizes.heads, turned, width, eps[2]), constants, device
        )

    @property
    def _compiled(self) -> bool:
        # in the first pass through a model its first block runs the one, and it or another the other, last
        return self.first_norm.compiled is not None and self.norms[1].compiled is not None

    def before(
        self, x: Tensor, known: Tensor | None, cos: Tensor, sin: Tensor, weights: tuple[Group, ...]
    ) -> tuple[Tensor, Tensor] | None:
        """qkv [M, (heads + 2 key heads) * head_dim] of x [M, hidden], and the buffer it is a part of; None as
        in ``BertPlan``. ``known``: the int8 form of norm(x) as ``after`` gives it, or None. cos and sin
        [period, head_dim], contiguous, in x's dtype: row m is turned by row m % period.
        """
        if not self._takes(x, (*weights, (cos, sin))):
            return None
        M, stream = x.shape[0], self._stream()
        buffer = self._buffer(M)
        if known is None:
            at = self._at(buffer, self.layout(M)[0])
            q, scale, (weight,), first = at("q"), at("scale"), map(self._of, weights[4]), self._of(x)
            self.first_norm(self._rows(M), stream, M, (first, first, weight, weight, first, q, scale))
        else:
            q, scale = self._int8(known, M)
        qkv = self._qkv(M, q, scale, buffer, weights, stream)
        turn = tuple(map(self._of, (cos, sin, *(weights[6] or (cos, sin)))))
        grid = -(-M * self.turned // self.heads_a_program), 1
        self.rotate(grid, stream, M, (self._of(qkv), *turn, cos.shape[0]))
        return qkv, buffer

    def after(
        self, context: Tensor, x: Tensor, buffer: Tensor, weights: tuple[Group, ...], next_norm: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """z [M, hidden] of attention's context [M, heads * head_dim]; and the int8 form of the next block's
        norm(z), by that norm's weight, with the scales behind it.
        """
        M = x.shape[0]
        places, _ = self.layout(M)
        at, stream, rows = self._at(buffer, places), self._stream(), self._rows(M)
        z, known = _like(x), None
        q, scale, out, y = at("q"), at("scale"), at("out"), at("y")
        self._quantize(context, q, scale, stream)
        self._product(1, M, q, scale, out, weights, stream)
        (weight,) = map(self._of, weights[5])
        self.norms[0](rows, stream, M, (out, self._of(x), weight, weight, y, q, scale))
        self._inner_to_out(M, at, weights, stream)
        if next_norm is None:
            torch.add(_view(buffer, places["out"]).view_as(z), _view(buffer, places["y"]).view_as(z), out=z)
        else:
            known, weight = self._new_int8(M), self._of(next_norm)
            self.norms[1](rows, stream, M, (out, y, weight, weight, self._of(z), *self._int8(known, M)))
        return z, known
