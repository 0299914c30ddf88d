"""What a race of GEMM contestants is about: shapes, data, rows, and the check against float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritern_kernels import PackedWeight, reference, ternarize_weight
from tritern_kernels.tune import MODELS

CHUNK_BYTES = 256 * 2**20  # float64 operands of the check are made in pieces of at most this size

DEFAULT_MODELS = ("minilm", "bge-base", "qwen3-embedding-0.6b")
DEFAULT_TOKENS = (1, 16, 64, 128, 1024, 8192)
QUICK = (
    *("16x4096x4096", "16x12288x4096", "64x12288x4096", "128x12288x4096"),  # bound by memory
    *("1024x4096x4096", "8192x4096x4096"),  # bound by arithmetic
    *("8192x3072x768", "8192x1536x384"),  # short K
    *("16x3072x768", "128x768x768"),  # bound by launches
)


# ---------------------------------------------------------------- shapes


class Shape(NamedTuple):
    """M tokens, N out_features, K in_features."""

    M: int
    N: int
    K: int


def parse_shapes(names: list[str], tokens: list[int]) -> list[Shape]:
    """Shapes of model names, ``all`` or explicit MxNxK, each once, all tokens of a weight together.

    Raises:
        ValueError: a name that is neither, or a size below 1.
    """
    shapes: list[Shape] = []
    for name in names:
        if sizes := re.fullmatch(r"(\d+)x(\d+)x(\d+)", name):
            shapes.append(Shape(*map(int, sizes.groups())))
        elif name == "all" or name in MODELS:
            weights = [w for model in (MODELS if name == "all" else [name]) for w in MODELS[model]]
            shapes += [Shape(M, N, K) for N, K in weights for M in tokens]
        else:
            raise ValueError(f"shapes are all, MxNxK or one of {', '.join(MODELS)}; received {name!r}")
    if bad := [tuple(s) for s in shapes if min(s) < 1]:
        raise ValueError(f"tokens, out_features and in_features must be at least 1; received {bad[0]}")
    return list(dict.fromkeys(shapes))


# ---------------------------------------------------------------- data and rows


@dataclass(frozen=True)
class Case:
    """The data of one shape, the same for all: Gaussian weights and activations."""

    shape: Shape
    x: Tensor  # bf16 [M, K]
    dense: Tensor  # bf16 [N, K]
    weight: PackedWeight  # ``dense`` made ternary
    zeros: float  # fraction of its codes
    quick: bool

    @property
    def codes(self) -> Tensor:
        """int8 [N, K]."""
        return self.weight.codes()

    def int8(self) -> Operands:
        """What multiplying int8 activations and ternary weights should give."""
        x_q, scale_x = reference.quantize_activations(self.x)
        return Operands(x_q, self.codes, scale_x, self.weight.scale)


def make_case(shape: Shape, seed: int, quick: bool, device: str = "cuda") -> Case:
    """Random data for a shape; the same seed gives the same data whatever ran before."""
    generator = torch.Generator(device).manual_seed(seed)
    dense = 0.02 * torch.randn(shape.N, shape.K, generator=generator, device=device)
    x = torch.randn(shape.M, shape.K, generator=generator, device=device).bfloat16()
    weight = ternarize_weight(dense)
    zeros = float((weight.codes() == 0).double().mean())
    return Case(shape, x, dense.bfloat16(), weight, zeros, quick)


@dataclass(frozen=True)
class Tolerance:
    """Accepted errors: ``rms`` over the exact result's RMS, ``largest`` over its largest magnitude."""

    rms: float
    largest: float


EXACT = Tolerance(0.0, 0.0)
"""int32 sums."""
ONE_ROUNDING = Tolerance(2.5e-3, 5e-3)
"""Exact or fp32 arithmetic, rounded once to bf16: that alone costs 1.7e-3 RMS and at most 2^-8 = 3.9e-3."""
BF16 = Tolerance(8e-3, 1.6e-2)
"""Partial sums rounded before they are added, as cuBLAS may and split-K atomics do: five single roundings."""
FP16 = Tolerance(1e-3, 2e-3)
"""The same in fp16, where one rounding costs 2.1e-4 RMS and at most 2^-11."""
FP8 = Tolerance(2e-2, 5e-2)
"""Hopper truncates its running fp8 sums to about 14 bits: up to 1 % over K = 14,336."""


@dataclass(frozen=True)
class Operands:
    """What the result should be: x [M, K] w^T, w [N, K], times scale_x [M] and scale [N] where given."""

    x: Tensor
    w: Tensor
    scale_x: Tensor | None = None
    scale: Tensor | None = None


@dataclass(frozen=True)
class Entry:
    """A contestant: ``call(weights)`` gives [M, N]; cold timing rotates over copies of ``weights``."""

    call: Callable[[Any], Tensor]
    weights: Any
    operands: Operands
    tolerance: Tolerance
    x_bytes: int
    note: str = ""


Contestants = dict[str, Callable[[Case], Entry]]


@dataclass(frozen=True)
class Errors:
    """Relative errors as in ``Tolerance``; NaN when the result holds NaN."""

    rms: float
    largest: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether both errors are accepted; NaN never is."""
        return self.rms <= tolerance.rms and self.largest <= tolerance.largest


@dataclass(frozen=True)
class Times:
    """Microseconds per call: median, 20th and 80th percentile of the replays; ``calls`` in a replay."""

    median: float
    p20: float
    p80: float
    replays: int
    calls: int


@dataclass(frozen=True)
class Row:
    """One contestant at one shape. ``reason`` says why there are no times; with times it is empty.

    ``bytes_moved`` counts activations, stored weights and results once each. Speeds are the time of the
    faster dense 16-bit baseline over this one's: below 1 is a loss.
    """

    contestant: str
    M: int
    N: int
    K: int
    reason: str = ""
    note: str = ""
    zeros: float | None = None
    errors: Errors | None = None
    tolerance: Tolerance | None = None
    weight_bytes: int | None = None
    bytes_moved: int | None = None
    cold: Times | None = None
    hot: Times | None = None
    cold_speed: float | None = None
    hot_speed: float | None = None

    @property
    def tflops(self) -> float | None:
        """Achieved TFLOP/s, weights cold: 2MNK operations over the median."""
        return None if self.cold is None else 2e-6 * self.M * self.N * self.K / self.cold.median

    @property
    def intensity(self) -> float | None:
        """Operations per byte moved."""
        return None if not self.bytes_moved else 2 * self.M * self.N * self.K / self.bytes_moved


@dataclass(frozen=True)
class Roofs:
    """Measured ceilings: device copy in TB/s (bytes read plus written) and dense bf16 products in TFLOP/s."""

    copy_tb_s: float
    bf16_tflops: float

    def at(self, intensity: float) -> float:
        """TFLOP/s the roofline allows at this many operations per byte."""
        return min(self.bf16_tflops, intensity * self.copy_tb_s)


# ---------------------------------------------------------------- check


def errors(out: Tensor, operands: Operands) -> Errors:
    """Errors of ``out`` against the float64 result of ``operands``, computed in pieces.

    Raises:
        ValueError: ``out`` has the wrong shape.
    """
    (M, K), N = operands.x.shape, operands.w.shape[0]
    if tuple(out.shape) != (M, N):
        raise ValueError(f"the result must have shape [{M}, {N}]; received {list(out.shape)}")
    step = max(1, min(4096, CHUNK_BYTES // (8 * K)))
    zero = torch.zeros((), dtype=torch.float64, device=out.device)
    sum_error, sum_exact, max_error, max_exact = zero, zero, zero, zero
    for n in range(0, N, step):
        w = operands.w[n : n + step].double()
        for m in range(0, M, step):
            exact = operands.x[m : m + step].double() @ w.T
            if operands.scale_x is not None:
                exact *= operands.scale_x[m : m + step].double()[:, None]
            if operands.scale is not None:
                exact *= operands.scale[n : n + step].double()
            error = out[m : m + step, n : n + step].double() - exact
            sum_error, sum_exact = sum_error + error.square().sum(), sum_exact + exact.square().sum()
            max_error = torch.maximum(max_error, error.abs().max())
            max_exact = torch.maximum(max_exact, exact.abs().max())
    tiny = 1e-300  # an exact result of zeros accepts zeros
    rms = math.sqrt(float(sum_error) / max(float(sum_exact), tiny))
    return Errors(rms, float(max_error) / max(float(max_exact), tiny))


def check(when: str, out: Tensor, entry: Entry) -> tuple[Errors, str]:
    """The errors and, when they are not accepted, a sentence that says so (otherwise an empty string)."""
    found, allowed = errors(out, entry.operands), entry.tolerance
    if found.within(allowed):
        return found, ""
    return found, (
        f"failed the check against float64 ({when}): RMS error {found.rms:.1e}, accepted {allowed.rms:.1e}; "
        f"largest {found.largest:.1e}, accepted {allowed.largest:.1e}"
    )
