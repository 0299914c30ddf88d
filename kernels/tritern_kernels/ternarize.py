"""Weight matrix -> codes, scale and packed bytes in one kernel launch, and back."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .device import ternarize as device
from .formats import ATOM, PackedWeight, check_shape, packed_width, padded_k, weight_bits
from .reference import RULES, Rule

_expand_kernel: Any = device.expand_kernel  # Triton's types lack compile-time arguments
_ternarize_kernel: Any = device.ternarize_kernel


def ternarize(weight: Tensor, rule: Rule = "mse") -> PackedWeight:
    """Ternarize and pack a finite weight [N, K] (fp32, fp16, bf16).

    ``absmean`` and ``twn`` follow ``reference.ternarize``. ``mse`` searches the threshold on two grids of 32,
    then does one step of Lloyd's algorithm. Its squared error is within 1e-4 of the exact optimum's.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; received {rule!r}")
    scale = torch.empty((weight.shape[0],), dtype=torch.float32, device=weight.device)
    given = weight.abs().mean(dtype=torch.float64).float() if rule == "absmean" else scale
    return _launch(weight, scale, given, rule)


def ternarize_given(weight: Tensor, scale: Tensor) -> PackedWeight:
    """Codes of a weight [N, K] for known scales float32 [N]: sign(w) where |w| > scale / 2."""
    return _launch(weight, scale, scale, "given")


def _launch(weight: Tensor, scale: Tensor, given: Tensor, rule: str) -> PackedWeight:
    N, K = weight.shape
    check_shape(N, K)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    packed = torch.empty((N, packed_width(K)), dtype=torch.uint8, device=weight.device)
    with torch.cuda.device_of(weight):  # Triton launches on the current device
        _ternarize_kernel[(N,)](
            weight, packed, scale, given, K, weight.stride(0), packed.stride(0), RULE=rule
        )
    return PackedWeight(packed, scale, (N, K))


def expand(packed: Tensor, scale: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] in ``dtype``, ``scale[:, None] * codes``, in one launch."""
    N = packed.shape[0]
    out = torch.empty((N, K), dtype=dtype, device=packed.device)
    atoms = min(16, triton.next_power_of_2(padded_k(K) // ATOM))
    with torch.cuda.device_of(packed):
        _expand_kernel[(N, triton.cdiv(padded_k(K) // ATOM, atoms))](
            packed, scale, out, K, packed.stride(0), ATOMS=atoms, BITS=weight_bits(packed, K)
        )
    return out
