"""Settings of the conversion to ternary."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from tritern_kernels.ops import ACTIVATION_BITS
from tritern_kernels.reference import RULES, Rule

from .errors import TriternError
from .inputs import many

EMBEDDING_BITS = (4, 8, 16)


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

    quant_method: ClassVar[str] = "tritern"
    """The name of tritern's quantizer in transformers."""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise TriternError(f"rule must be one of {', '.join(map(repr, RULES))}; received {self.rule!r}")
        for name, allowed in (("activation_bits", ACTIVATION_BITS), ("embedding_bits", EMBEDDING_BITS)):
            object.__setattr__(self, name, bits(getattr(self, name), name, allowed))
        skip = self.skip if isinstance(self.skip, str) else tuple(many(self.skip, "skip"))
        if isinstance(skip, str) or not all(isinstance(s, str) for s in skip):
            raise TriternError(f"skip must be a sequence of module names or patterns; received {skip!r}")
        object.__setattr__(self, "skip", skip)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values; transformers shows them in a model's config."""
        return {"quant_method": self.quant_method, **asdict(self)}
