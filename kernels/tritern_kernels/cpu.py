"""The product on a CPU by libraries inside torch: the same int32 sums as the GPU kernels, bit for bit.

Processors differ by an order of magnitude in their int8 speed, and no flag tells which is fast. So each
process times every library's int8 product once and takes the fastest; all give the same bits. A weight is
converted once to the form of that product and kept.
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

from .formats import LARGEST_CODE, unpack, weight_bits
from .reference import ONE_127TH, SMALLEST_ABSMAX

ROWS = 1024
"""Tokens at a time: temporaries stay at a few MB, and larger pieces are no faster."""


def largest_exact_k(bits: int) -> int:
    """Up to this K every partial sum of int8 activations times codes is an integer that float32 holds."""
    return 2**24 // (127 * LARGEST_CODE[bits])


_127 = torch.tensor(127.0, dtype=torch.float32, device="cpu")
"""A tensor, because torch divides a number by a tensor with a rounded reciprocal."""


# ---------------------------------------------------------------- products


class Product(NamedTuple):
    """A way to multiply activations by codes.

    Attributes:
        prepare: codes int8 [N, K] -> the form to keep.
        multiply: activations [M, K] and that form -> sums [M, N], int32 or float32.
        operand: dtype of the activations. float32 ones may be integers from -127 to 127.
        bytes: size of the form per weight.
    """

    prepare: Callable[[Tensor], Any]
    multiply: Callable[[Tensor, Any], Tensor]
    operand: torch.dtype
    bytes: int


def _int_mm(x: Tensor, codes: Tensor) -> Tensor:
    if x.shape[1] == 1:  # torch 2.13 leaves this result uninitialized
        return x.int() * codes.t()
    return torch.ops.aten._int_mm(x, codes.t())  # looked up at each call: benchmarks replace it


def _mm(x: Tensor, codes: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # autocast would round the sums
        return torch.mm(x, codes.t())


def _pack_fbgemm(codes: Tensor) -> Any:
    with warnings.catch_warnings():  # torch may drop this product one day; then it is not timed
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor.*deprecated", UserWarning)
        weight = torch._make_per_tensor_quantized_tensor(codes, 1.0, 0)  # pyright: ignore
    return _with_fbgemm(lambda: torch.ops.quantized.linear_prepack(weight, None))


def _with_fbgemm(pack: Callable[[], Any]) -> Any:
    """The result of ``pack`` with FBGEMM as torch's quantized engine, the default on x86."""
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
    "FBGEMM int8": Product(  # x + 128 as uint8; no pair of products with codes from -7 to 7 exceeds int16
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
"""Products by name: the library and the dtype of the kept codes."""

_CHOICES = {8: ("oneDNN int8", "FBGEMM int8", "float32"), 16: ("FBGEMM fp16", "float32")}
"""Products for int8 and for 16-bit activations. int8 takes the fastest. 16 bits take the first that torch
has, the same in every process, because their sums differ in the last bits.
"""

HOPELESS = 4
"""A product slower than another by this factor is not timed again. Without VNNI torch multiplies int8 in a
plain loop.
"""


@cache
def fastest(activation_bits: int) -> tuple[str, ...]:
    """Names of the products with right results on this processor, the fastest first (for 16 bits, in a fixed
    order). They are timed once per process.
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
    for _ in range(5):  # in turn, so that other load slows all alike
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
    """The product's form of the codes; None if torch lacks the product or its sums are wrong here."""
    try:
        form = product.prepare(codes)
        sums = product.multiply(rows.to(product.operand), form)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    return form if torch.equal(sums.float(), _mm(rows, codes.float())) else None


def product_for(activation_bits: int, K: int, bits: int = 2) -> str:
    """Name of the product for K features and weights of ``bits`` bits on this processor."""
    if activation_bits == 8 and K > largest_exact_k(bits):
        return "oneDNN int8"  # the others give the sums in float32
    return fastest(activation_bits)[0]


# ---------------------------------------------------------------- kept forms of a weight


class _Kept(NamedTuple):
    """Forms of a packed weight, by product, and a mark that shows later changes of the weight.

    It does not notice writes that torch does not count, through ``.data`` or NumPy.
    """

    K: int
    address: int
    version: int | None
    copy: Tensor | None
    forms: dict[str, Any]


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _forms(packed: Tensor, K: int) -> dict[str, Any]:
    """Forms of the present weight, none from before a change in place."""
    kept = _kept.get(packed)
    if kept is not None and kept.K == K and kept.address == packed.data_ptr():
        if kept.copy is None:
            same = kept.version == packed._version
        else:
            same = torch.equal(kept.copy, _words(packed))
        if same:
            return kept.forms
    # tensors of inference mode have no version counter: a copy, two bits per weight, shows changes
    version = copy = None
    if packed.is_inference():
        copy = _words(packed).clone()
    else:
        version = packed._version
    _kept[packed] = kept = _Kept(K, packed.data_ptr(), version, copy, {})
    return kept.forms


def _words(packed: Tensor) -> Tensor:
    """Packed bytes viewed as int64 if possible: comparing is eight times as fast."""
    return packed if packed.storage_offset() % 8 else packed.view(torch.int64)


def _form(packed: Tensor, K: int, name: str) -> Any:
    """The weight in a product's form, made once and kept while the weight lives."""
    forms = _forms(packed, K)
    if name not in forms:
        with torch.inference_mode(False):
            codes = forms.get("oneDNN int8")
            forms[name] = PRODUCTS[name].prepare(unpack(packed, K) if codes is None else codes)
    return forms[name]


def codes_of(packed: Tensor, K: int) -> Tensor:
    """Codes int8 [N, K] of a packed weight, unpacked once and kept while it lives."""
    return _form(packed, K, "oneDNN int8")


def remember(packed: Tensor, codes: Tensor) -> None:
    """Keep the codes int8 [N, K] of a packed weight, so that they need not be unpacked."""
    _forms(packed, codes.shape[1])["oneDNN int8"] = codes


# ---------------------------------------------------------------- the operators


def linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, activation_bits: int) -> Tensor:
    """y [M, N] in x's dtype for x [M, K]."""
    name = product_for(activation_bits, x.shape[1], weight_bits(packed, x.shape[1]))
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
    """``linear`` of int8 activations from ``quantize``: y [M, N] in ``dtype``, the same bits.

    It serves weights that change with every step, so it takes no product that must pack them first.
    """
    K = x_q.shape[1]
    unpacked = (name for name in fastest(8) if not name.startswith("FBGEMM"))
    name = "oneDNN int8" if K > largest_exact_k(weight_bits(packed, K)) else next(unpacked)
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
    """Fill out [M, N] for x [M, K]: integers with their scale [M, 1], or floating point without one."""
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
