"""All steps of a BERT block but attention itself, with everything decided (see ``plan``).

    qkv = x Wqkv;  [attention gives context];  y = norm(context Wout + x);  z = norm(gelu(y Win) Wlast + y)

x, y and z also in int8, as the next product takes them: each comes from the kernel before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import activations, gemm
from .dispatch import BlockSizes
from .formats import padded_k
from .launch import ASM, INTERPRETED, Launch, current_stream, hooked
from .plan import product, quantizer, tickets_of
from .tuning import KernelConfig

Weights = tuple[tuple[Tensor, ...], ...]
"""Of the four products (query with key and value, output, intermediate, last): packed, scale, bias or scale;
and of the two norms: weight, bias.
"""


class BlockPlan:
    """The steps for up to ``most`` tokens in a dtype on a GPU; ``choose(M, N, K)`` configures products."""

    def __init__(
        self,
        sizes: BlockSizes,
        most: int,
        dtype: torch.dtype,
        device: torch.device,
        choose: Callable[[int, int, int], KernelConfig],
    ) -> None:
        self.sizes, self.dtype, self.device = sizes, dtype, device
        H, inner = sizes.hidden, sizes.inner
        shapes = ((3 * H, H), (H, H), (inner, H), (H, inner))
        configs = [choose(most, N, K) for N, K in shapes]
        # tickets are cleared by a quantizer, which only the last product has just before it in any case
        configs[:3] = [replace(c, split_k=1) for c in configs[:3]]
        self.configs, self.shapes = configs, shapes
        self.tickets = tickets_of(configs[3], most, H)
        self.products = [
            product(c, N, K, bias, False, device)
            for c, (N, K), bias in zip(configs, shapes, sizes.biases, strict=True)
        ]
        self.quantize, self.rows = quantizer(H, H, 0, False, device)
        self.gelu, self.gelu_rows = quantizer(inner, inner, self.tickets, True, device)
        block_m, block_k, pieces = activations.quantize_blocks(H)
        norm = activations.add_norm_quantize_kernel
        self.norms = [
            Launch(norm, (H, padded_k(H), eps), (block_m, block_k, pieces, ASM), device)
            for eps in sizes.epsilons
        ]
        self.layout = lru_cache(maxsize=1024)(self._layout)

    def _layout(self, M: int) -> tuple[dict[str, tuple[int, int, torch.dtype]], int, int]:
        """Where everything begins, its bytes and dtype in the buffer for M tokens; the buffer's size; and the
        size of z's int8 form with the scales.
        """
        H, inner, value = self.sizes.hidden, self.sizes.inner, self.dtype
        last, byte, word, fp32 = self.configs[3], torch.int8, torch.int32, torch.float32
        shares = last.tiles(M, H) * last.split_k * last.block_m * last.block_n if self.tickets else 0
        areas = {
            "q": (M * padded_k(H), byte), "scale": (M, fp32), "out": (M * H, value), "y": (M * H, value),
            "hq": (M * padded_k(inner), byte), "tickets": (self.tickets or 32, word),
            "shares": (shares or 32, word), "qkv": (M * 3 * H, value), "h": (M * inner, value),
        }  # fmt: skip
        places, size = {}, 0
        for name, (count, dtype) in areas.items():
            start = places["qkv"][0] if name == "h" else size  # h comes when qkv is done with
            places[name] = (start, count * dtype.itemsize, dtype)
            size = max(size, start + (count * dtype.itemsize + 127 & -128))
        return places, size, (M * padded_k(H) + 127 & -128) + 4 * M

    def before(self, x: Tensor, known: Tensor | None, weights: Weights) -> tuple[Tensor, Tensor] | None:
        """qkv [M, 3 * hidden] of x [M, hidden], and the buffer it is a part of; None where ``Plan`` would
        give None (weights have to be contiguous). ``known``: x's int8 form as ``after`` gives it, or None.
        """
        pointers = [t.data_ptr() for group in weights for t in group]
        any_bit = x.data_ptr()
        for p in pointers:
            any_bit |= p
        if any_bit & 15 or hooked():
            return None
        M = x.shape[0]
        places, size, _ = self.layout(M)
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        at, stream = self._at(buffer, places), self._stream()
        if known is None:
            q, scale = at("q"), at("scale")
            self.quantize((-(-M // self.rows), 1), stream, M, (self._of(x), q, scale, scale))
        else:
            q, scale = self._int8(known, M)
        self._product(0, M, q, scale, at("qkv"), weights, stream)
        start, count, dtype = places["qkv"]
        return buffer[start : start + count].view(dtype).view(M, -1), buffer

    def after(self, context: Tensor, x: Tensor, buffer: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """z [M, hidden] of attention's context [M, hidden], and its int8 form with the scales behind it."""
        M, H = x.shape
        places, _, size = self.layout(M)
        at, stream = self._at(buffer, places), self._stream()
        with torch.inference_mode(False):  # a tensor that counts its changes
            z = torch.empty_like(x)
        known = torch.empty(size, dtype=torch.uint8, device=self.device)
        q, scale, out, y = at("q"), at("scale"), at("out"), at("y")
        rows = (-(-M // self.rows), 1)
        self.quantize(rows, stream, M, (self._of(context), q, scale, scale))
        self._product(1, M, q, scale, out, weights, stream)
        first, second = (tuple(map(self._of, norm)) for norm in weights[4:])
        self.norms[0](rows, stream, M, (out, self._of(x), *first, y, q, scale))
        h, hq, tickets = at("h"), at("hq"), at("tickets")
        self._product(2, M, q, scale, h, weights, stream)
        self.gelu((-(-M // self.gelu_rows), 1), stream, M, (h, hq, scale, tickets))
        self._product(3, M, hq, scale, out, weights, stream, (at("shares"), tickets))
        self.norms[1](rows, stream, M, (out, y, *second, self._of(z), *self._int8(known, M)))
        return z, known

    def _product(
        self, i: int, M: int, q: Any, scale: Any, y: Any, weights: Weights, stream: int,
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

    @property
    def _compiled(self) -> bool:
        return self.norms[1].compiled is not None  # the last of all

    def _stream(self) -> int:
        return 0 if INTERPRETED else current_stream(self.device.index)

    def _of(self, tensor: Tensor) -> Any:
        return tensor.data_ptr() if self._compiled else tensor

    def _at(self, buffer: Tensor, places: dict[str, tuple[int, int, torch.dtype]]) -> Callable[[str], Any]:
        if self._compiled:
            base = buffer.data_ptr()
            return lambda name: base + places[name][0]

        def tensor(name: str) -> Tensor:
            start, count, dtype = places[name]
            return buffer[start : start + count].view(dtype)

        return tensor

    def _int8(self, known: Tensor, M: int) -> tuple[Any, Any]:
        size = M * padded_k(self.sizes.hidden)
        behind = size + 127 & -128
        if self._compiled:
            base = known.data_ptr()
            return base, base + behind
        return known[:size].view(torch.int8), known[behind : behind + 4 * M].view(torch.float32)
