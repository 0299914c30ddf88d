"""Embedding tables with 4 bits per value: the format, rounding, and lookup of rows.

A group of 32 values of a row shares a scale: value = scale * (nibble - 8). Byte i of a group holds value i in
its low half and value 16 + i in its high half. A scale may be negative. (Both are as in llama.cpp's Q4_0.)
Rows are padded with zeros to whole groups.

``tritern::lookup`` reads the packed rows on CUDA (a Triton kernel) and on the CPU, to the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .devices import check_device, refuse
from .ops import FLOATS

GROUP = 32
_HALF = GROUP // 2
_FACTORS = tuple(0.7 + 0.05 * i for i in range(9))
"""Scales to try for a group, as multiples of the scale that maps its largest magnitude to -8. More scales
would lower the squared error by less than a hundredth (all-MiniLM-L6-v2).
"""
LOOKUP_BLOCK = 64
"""Groups per program of the lookup."""
_CHUNKS = {"cpu": 1 << 10, "cuda": 1 << 15}
"""Rows to round at once: few enough for a CPU's cache, enough to keep a GPU busy."""


def groups(width: int) -> int:
    """Number of groups in a row of ``width`` values."""
    return -(-width // GROUP)


def quantize_table(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a table to 4 bits, with the best scale found for each group (least squared error).

    The best of the tried scales gives first codes. Their least-squares scale is rounded to the table's dtype.
    The values divided by it give the final codes.

    Args:
        weight: [rows, width] fp32, fp16 or bf16, finite.

    Returns:
        uint8 [rows, 16 * groups(width)] and the scales [rows, groups(width)] in weight's dtype.

    Raises:
        TypeError: another dtype. ValueError: not a matrix.
    """
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight must be float32, float16 or bfloat16; received {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] < 1:
        raise ValueError(f"weight must be a matrix [rows, width]; received shape {list(weight.shape)}")
    count = groups(weight.shape[1])
    packed = weight.new_empty((len(weight), _HALF * count), dtype=torch.uint8)
    scale = weight.new_empty((len(weight), count))
    rows = _CHUNKS.get(weight.device.type, len(weight) or 1)
    for begin in range(0, len(weight), rows):
        part = slice(begin, begin + rows)
        packed[part], scale[part] = _quantize(weight[part], count)
    return packed, scale


def _quantize(weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values = torch.nn.functional.pad(weight.float(), (0, GROUP * count - weight.shape[1]))
    values = values.view(-1, count, GROUP)
    peak = values.gather(-1, values.abs().argmax(-1, keepdim=True))
    shares = values / torch.where(peak == 0, 1.0, peak)  # their squares neither over- nor underflow
    best, least = torch.zeros_like(values), torch.full_like(peak, torch.inf)
    for factor in _FACTORS:
        codes = (shares * (-8 / factor)).round_().clamp_(-8, 7)
        error = (codes * (factor / -8) - shares).square_().sum(-1, keepdim=True)
        best, least = torch.where(error < least, codes, best), torch.minimum(error, least)
    length = (best * best).sum(-1, keepdim=True)
    scale = (peak * ((best * shares).sum(-1, keepdim=True) / length.clamp(min=1))).to(weight.dtype)
    nibbles = (_codes(values, scale.float()) + 8).to(torch.uint8)
    low, high = nibbles[..., :_HALF], nibbles[..., _HALF:]
    return (low | high << 4).flatten(1), scale.squeeze(-1)


def _codes(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale, rounded, from -8 to 7, as floats; 0 if the scale is 0."""
    codes = (values / scale).round_().clamp_(-8, 7)
    return torch.where(scale == 0, 0.0, codes)


def lookup(ids: Tensor, packed: Tensor, scale: Tensor, width: int) -> Tensor:
    """Rows of a 4-bit table.

    Args:
        ids: int32 or int64 [...].
        packed, scale: from ``quantize_table``, on ids' device.
        width: values in a row.

    Returns:
        [..., width] in scale's dtype, each value rounded once.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device does not fit; a device without kernels.
        IndexError: on a CPU, an id out of range. On a GPU such an id gives a row of NaN.
    """
    return torch.ops.tritern.lookup(ids, packed, scale, width)


def _check(ids: Tensor, packed: Tensor, scale: Tensor, width: int) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64; received {ids.dtype}")
    if packed.dtype != torch.uint8 or scale.dtype not in FLOATS:
        raise TypeError(
            "packed must be uint8 and scale float32, float16 or bfloat16; received "
            f"{packed.dtype} and {scale.dtype}"
        )
    shapes = (len(packed), _HALF * groups(width)), (len(packed), groups(width))
    if width < 1 or (tuple(packed.shape), tuple(scale.shape)) != shapes:
        raise ValueError(
            f"rows of {width} values need packed [rows, {shapes[0][1]}] and scale [rows, {shapes[1][1]}]; "
            f"received {list(packed.shape)} and {list(scale.shape)}"
        )
    if ids.device != packed.device or scale.device != packed.device:
        raise ValueError(
            f"ids are on {ids.device}, packed on {packed.device} and scale on {scale.device}; move them"
        )


def _lookup_cpu(ids: Tensor, packed: Tensor, scale: Tensor, width: int) -> Tensor:
    _check(ids, packed, scale, width)
    rows = torch.nn.functional.embedding(ids, packed).unflatten(-1, (-1, 1, _HALF))
    codes = torch.cat([rows & 15, rows >> 4], -2).flatten(-2).to(scale.dtype).sub_(8)
    values = codes.mul_(torch.nn.functional.embedding(ids, scale)[..., None]).flatten(-2)
    return values[..., :width].contiguous()


def _lookup_cuda(ids: Tensor, packed: Tensor, scale: Tensor, width: int) -> Tensor:
    _check(ids, packed, scale, width)
    check_device(packed.device)
    with torch.cuda.device(packed.device):
        rows = _launch(ids.reshape(-1).contiguous(), packed.contiguous(), scale.contiguous(), width)
    return rows.view(*ids.shape, width)


def _launch(ids: Tensor, packed: Tensor, scale: Tensor, width: int) -> Tensor:
    """``lookup`` for ids [M] on the current device, all contiguous, in one launch."""
    from .device.embedding import lookup_kernel  # needs Triton
    from .launch import launch

    M, count = len(ids), groups(width)
    y = torch.empty((M, width), dtype=scale.dtype, device=ids.device)
    if M:
        grid = -(-M * count // LOOKUP_BLOCK), 1
        sizes = M, len(packed), count, width
        launch(lookup_kernel, grid, (ids, packed, scale, y, *sizes), (LOOKUP_BLOCK,), num_warps=4)
    return y


def _lookup_fake(ids: Tensor, packed: Tensor, scale: Tensor, width: int) -> Tensor:
    _check(ids, packed, scale, width)
    return scale.new_empty((*ids.shape, width))


_library = torch.library.Library("tritern", "FRAGMENT")
_library.define("lookup(Tensor ids, Tensor packed, Tensor scale, int width) -> Tensor")
_library.impl("lookup", _lookup_cpu, "CPU")
_library.impl("lookup", _lookup_cuda, "CUDA")
_library.impl("lookup", refuse, "CompositeExplicitAutograd")  # all other devices
torch.library.register_fake("tritern::lookup", _lookup_fake, lib=_library)
