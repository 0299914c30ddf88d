"""The product on a CPU, by libraries that torch brings: the GPU kernels' int32 sums, bit for bit.

Processors differ by an order of magnitude in how fast they multiply int8, and no one flag tells. So each
library's int8 product is timed once a process and the fastest is taken; all give the same bits. A weight is
kept in the form which that product reads, made once.
"""

from __future__ import annotations

import math
import operator
import time
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .formats import unpack
from .reference import ONE_127TH, SMALLEST_ABSMAX

ROWS = 1024
"""Tokens taken at a time: temporaries stay a few MB, and larger pieces are no faster."""

LARGEST_EXACT_K = 2**24 // 127
"""Up to this K every partial sum of int8 activations times codes is an integer that float32 holds."""

_127 = torch.tensor(127.0, dtype=torch.float32, device="cpu")
"""As a tensor: the division of a number by a tensor multiplies by a rounded reciprocal."""


# ---------------------------------------------------------------- products


class Product(NamedTuple):
    """A way to multiply activations by codes.

    Attributes:
        prepare: codes int8 [N, K] -> what is kept of them.
        multiply: activations [M, K], what is kept -> sums [M, N], int32 or float32.
        operand: dtype of the activations. Where it is float32 they may be integers from -127 to 127.
        bytes: kept for each weight.
    """

    prepare: Callable[[Tensor], Any]
    multiply: Callable[[Tensor, Any], Tensor]
    operand: torch.dtype
    bytes: int


def _int_mm(x: Tensor, codes: Tensor) -> Tensor:
    if x.shape[1] == 1:  # torch 2.13 leaves the result as it found the memory
        return x.int() * codes.t()
    return torch.ops.aten._int_mm(x, codes.t())  # looked up at each call: benchmarks replace it


def _mm(x: Tensor, codes: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # which would round the sums
        return torch.mm(x, codes.t())


def _pack_fbgemm(codes: Tensor) -> Any:
    with warnings.catch_warnings():  # torch may drop this product one day: it is then not among those timed
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor.*deprecated", UserWarning)
        weight = torch._make_per_tensor_quantized_tensor(codes, 1.0, 0)  # pyright: ignore
    return _with_fbgemm(lambda: torch.ops.quantized.linear_prepack(weight, None))


def _with_fbgemm(pack: Callable[[], Any]) -> Any:
    """What ``pack`` gives while torch's quantized engine is FBGEMM; on x86 it is by default."""
    engine = torch.backends.quantized.engine
    if engine in ("x86", "fbgemm"):
        return pack()
    torch.backends.quantized.engine = "fbgemm"
    try:
        return pack()
    finally:
        torch.backends.quantized.engine = engine


PRODUCTS = {
    "oneDNN int8": Product(lambda codes: codes, _int_mm, torch.int8, 1),
    "FBGEMM int8": Product(  # x + 128 as uint8; no pair of products with codes -1, 0, 1 exceeds int16
        _pack_fbgemm,
        lambda x, kept: torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1.0, 128, kept),
        torch.float32,
        1,
    ),
    "FBGEMM fp16": Product(  # codes in fp16, products and sums in float32
        lambda codes: _with_fbgemm(lambda: torch.ops.quantized.linear_prepack_fp16(codes.float(), None)),
        lambda x, kept: torch.ops.quantized.linear_dynamic_fp16(x, kept),
        torch.float32,
        2,
    ),
    "float32": Product(lambda codes: codes.float(), _mm, torch.float32, 4),
}
"""By name: the library and the dtype in which codes are kept."""

_CHOICES = {8: ("oneDNN int8", "FBGEMM int8", "float32"), 16: ("FBGEMM fp16", "float32")}
"""Products for int8 activations, of which the fastest is taken, and for 16-bit ones, of which it is the first
that torch has: their sums differ in the last bits, so that every process takes the same.
"""

HOPELESS = 4
"""A product so many times slower than another is not timed again: without VNNI torch multiplies int8 in a
plain loop.
"""


@cache
def fastest(activation_bits: int) -> tuple[str, ...]:
    """Names of the products that are right on this processor, the fastest first (of 16 bits, in a fixed
    order); timed once a process.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    codes = torch.randint(-1, 2, (512, 512), generator=generator, device="cpu").to(torch.int8)
    rows = torch.randint(-127, 128, (256, 512), generator=generator, device="cpu").float()
    codes[0], rows[0] = 1, 127.0  # the largest sum
    kept: dict[str, Any] = {}
    for name in _CHOICES[activation_bits]:
        form = _form_if_right(PRODUCTS[name], rows, codes)
        if form is not None:
            kept[name] = form
    if activation_bits == 16:
        return tuple(kept)
    seconds = {name: [math.inf, math.inf] for name in kept}
    for _ in range(5):  # in turn, so that other work on the machine meets all alike
        quickest = min(times[0] for times in seconds.values())
        for name, times in seconds.items():
            if HOPELESS * quickest < times[0] < math.inf:
                continue
            for i, x in enumerate((rows, rows[:16])):  # documents, a query
                start = time.perf_counter()
                PRODUCTS[name].multiply(x.to(PRODUCTS[name].operand), kept[name])
                times[i] = min(times[i], time.perf_counter() - start)
    best = [min(column) for column in zip(*seconds.values())]
    relative = {name: sum(map(operator.truediv, times, best)) for name, times in seconds.items()}
    return tuple(sorted(relative, key=relative.__getitem__))


def _form_if_right(product: Product, rows: Tensor, codes: Tensor) -> Any:
    """What the product keeps of the codes; None if torch has it not, or its sums are wrong here."""
    try:
        form = product.prepare(codes)
        sums = product.multiply(rows.to(product.operand), form)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    return form if torch.equal(sums.float(), _mm(rows, codes.float())) else None


def product_for(activation_bits: int, K: int) -> str:
    """Name of the product by which K features are multiplied here."""
    if activation_bits == 8 and K > LARGEST_EXACT_K:
        return "oneDNN int8"  # the others give the sums in float32
    return fastest(activation_bits)[0]


# ---------------------------------------------------------------- what is kept of a weight


class _Kept(NamedTuple):
    """Forms of a packed weight, by product, and what tells that it has changed since they were made.

    Writes that torch counts nowhere, through ``.data`` or NumPy, are not noticed.
    """

    K: int
    address: int
    version: int | None
    copy: Tensor | None
    forms: dict[str, Any]


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _forms(packed: Tensor, K: int) -> dict[str, Any]:
    """Forms of the weight as it is now; none that were made before a change in place."""
    kept = _kept.get(packed)
    if kept is not None and kept.K == K and kept.address == packed.data_ptr():
        if kept.copy is None:
            same = kept.version == packed._version
        else:
            same = torch.equal(kept.copy, _words(packed))
        if same:
            return kept.forms
    # tensors made in inference mode count no versions: a copy shows changes, at two bits a weight
    version = copy = None
    if packed.is_inference():
        copy = _words(packed).clone()
    else:
        version = packed._version
    _kept[packed] = kept = _Kept(K, packed.data_ptr(), version, copy, {})
    return kept.forms


def _words(packed: Tensor) -> Tensor:
    """Packed bytes as int64, where they can be seen so: eight times as fast to compare."""
    return packed if packed.storage_offset() % 8 else packed.view(torch.int64)


def _form(packed: Tensor, K: int, name: str) -> Any:
    """The weight as a product reads it, made once and kept as long as the weight lives."""
    forms = _forms(packed, K)
    if name not in forms:
        with torch.inference_mode(False):
            codes = forms.get("oneDNN int8")
            forms[name] = PRODUCTS[name].prepare(unpack(packed, K) if codes is None else codes)
    return forms[name]


def codes_of(packed: Tensor, K: int) -> Tensor:
    """Codes int8 [N, K] of a packed weight, unpacked once and kept as long as it lives."""
    return _form(packed, K, "oneDNN int8")


def remember(packed: Tensor, codes: Tensor) -> None:
    """Keep the codes int8 [N, K] that a packed weight was made of, so that they need not be unpacked."""
    _forms(packed, codes.shape[1])["oneDNN int8"] = codes


# ---------------------------------------------------------------- the operators


def linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, activation_bits: int) -> Tensor:
    """y [M, N] in x's dtype for x [M, K]."""
    name = product_for(activation_bits, x.shape[1])
    form = _form(packed, x.shape[1], name)
    y = x.new_empty((x.shape[0], packed.shape[0]))
    for out, part in _pieces(y, x):
        rows, scale_x = _rounded(part) if activation_bits == 8 else (part.float(), None)
        _fill(out, rows, scale_x, name, form, scale, bias)
    return y


def _pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The rows of all tensors, ``ROWS`` at a time."""
    return [tensors] if len(tensors[0]) <= ROWS else zip(*(t.split(ROWS) for t in tensors))


def linear_int8(
    x_q: Tensor, scale_x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``linear`` of activations that ``quantize`` has made int8: y [M, N] in ``dtype``, the same bits.

    For weights that change with every step: a product that has to pack them first is not taken.
    """
    K = x_q.shape[1]
    unpacked = (name for name in fastest(8) if not name.startswith("FBGEMM"))
    name = "oneDNN int8" if K > LARGEST_EXACT_K else next(unpacked)
    form = _form(packed, K, name)
    y = torch.empty((x_q.shape[0], packed.shape[0]), dtype=dtype)
    for out, part, part_scale in _pieces(y, x_q, scale_x[:, None]):
        _fill(out, part, part_scale, name, form, scale, bias)
    return y


def _fill(
    out: Tensor,
    x: Tensor,
    scale_x: Tensor | None,
    name: str,
    form: Any,
    scale: Tensor,
    bias: Tensor | None,
) -> None:
    """Fill out [M, N] for x [M, K]: integers with their scale [M, 1], or floating point without."""
    product = PRODUCTS[name]
    y = product.multiply(x.to(product.operand), form)
    if scale_x is not None:
        y = y.mul_(scale_x) if y.dtype == torch.float32 else y * scale_x
    target = out if out.dtype == torch.float32 else y
    y = torch.mul(y, scale, out=target) if bias is None else torch.addcmul(bias.float(), y, scale, out=target)
    if y is not out:
        out.copy_(y)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.quantize_activations`` in fewer passes: [M, K] in natural order."""
    rows, scale = _rounded(x)
    return rows.to(torch.int8), scale[:, 0]


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """The integers of ``quantize`` in float32 [M, K], and the scale [M, 1]."""
    values = x.float()
    # amax and amin are ten times as fast as torch.aminmax(dim=1)
    absmax = torch.maximum(values.amax(1, True), values.amin(1, True).neg_()).clamp_(min=SMALLEST_ABSMAX)
    scale = absmax * ONE_127TH
    inverse = torch.div(_127, absmax)
    if not math.isfinite(float(absmax.sum())):
        finite = torch.isfinite(absmax)
        scale = torch.where(finite, scale, torch.nan)
        values = torch.where(finite, values, 0.0)
        inverse = torch.where(finite, inverse, 0.0)
    return (values * inverse).round_(), scale
