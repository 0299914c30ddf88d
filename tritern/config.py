"""Settings of the conversion to ternary."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from tritern_kernels.formats import WEIGHT_BITS
from tritern_kernels.ops import ACTIVATION_BITS
from tritern_kernels.reference import RULES, Rule

from .errors import TriternError
from .inputs import many

EMBEDDING_BITS = (4, 8, 16)
Bits = int | Mapping[str, int]
"""Bits of all weights, or of the layers with these names or patterns."""


def bits(value: int, name: str, allowed: tuple[int, ...] = ACTIVATION_BITS) -> int:
    """One of the numbers allowed, as an int.

    Raises:
        TriternError: another number, or not a whole number.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number not in allowed:
        *first, last = allowed
        numbers = f"{', '.join(map(str, first))} or {last}"
        raise TriternError(f"{name} must be {numbers}; received {value!r} ({type(value).__name__})")
    return number


def covers(pattern: str, name: str) -> bool:
    """Whether a module name or shell pattern names this module or one above it."""
    return fnmatchcase(name, pattern) or name.startswith(pattern + ".")


@dataclass(frozen=True)
class TernaryConfig:
    """Settings of ``tritern.patch``.

    To patch while loading, pass them as ``quantization_config`` to transformers' ``from_pretrained`` or in
    the ``model_kwargs`` of a SentenceTransformer.

    Args:
        rule: how a weight matrix becomes codes and scales. ``"mse"``: per row, the smallest squared error.
            ``"absmean"``: one scale for the matrix, mean|W| (BitNet b1.58). ``"twn"``: per row, threshold 0.7
            mean|w| (Ternary Weight Networks).
        activation_bits: 8 quantizes activations per token to int8 (fastest, exact sums); 16 leaves them as
            they are.
        weight_bits: 2 (ternary) or 4 for all layers. Or a mapping of module names or shell patterns to bits,
            such as ``{"*.attention.*": 4}``: the last match counts, and layers without one have 2.
        embedding_bits: 8 rounds word-embedding tables to int8, with one scale per row. 4 rounds them to
            4 bits, with one scale per 32 values of a row. 16 leaves them in full precision.
        skip: layers and tables to leave in full precision: qualified module names or shell patterns, such as
            ``"*.layer.0.*"``. A name also covers everything below it.

    Raises:
        TriternError: an unknown value.
    """

    rule: Rule = "mse"
    activation_bits: int = 8
    embedding_bits: int = 8
    skip: tuple[str, ...] = ()
    weight_bits: Bits = 2

    quant_method: ClassVar[str] = "tritern"
    """The name of tritern's quantizer in transformers."""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise TriternError(f"rule must be one of {', '.join(map(repr, RULES))}; received {self.rule!r}")
        for name, allowed in (("activation_bits", ACTIVATION_BITS), ("embedding_bits", EMBEDDING_BITS)):
            object.__setattr__(self, name, bits(getattr(self, name), name, allowed))
        given = self.weight_bits
        if isinstance(given, Mapping):
            if bad := [name for name in given if not isinstance(name, str)]:
                raise TriternError(f"weight_bits must map names or patterns to bits; received {bad[0]!r}")
            checked = {n: bits(b, f"weight_bits[{n!r}]", WEIGHT_BITS) for n, b in given.items()}
            object.__setattr__(self, "weight_bits", checked)
        else:
            object.__setattr__(self, "weight_bits", bits(given, "weight_bits", WEIGHT_BITS))
        skip = self.skip if isinstance(self.skip, str) else tuple(many(self.skip, "skip"))
        if isinstance(skip, str) or not all(isinstance(s, str) for s in skip):
            raise TriternError(f"skip must be a sequence of module names or patterns; received {skip!r}")
        object.__setattr__(self, "skip", skip)

    def bits_of(self, names: Iterable[str]) -> int:
        """Bits of the weights of the layer with these names."""
        if not isinstance(self.weight_bits, Mapping):
            return self.weight_bits
        names = list(names)
        matching = [b for pattern, b in self.weight_bits.items() if any(covers(pattern, n) for n in names)]
        return matching[-1] if matching else 2

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values; transformers shows them in a model's config."""
        return {"quant_method": self.quant_method, **asdict(self)}
