"""The entry for ternary layers in a saved model's config.json."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import TernaryConfig
from ..errors import CheckpointError

METHOD = TernaryConfig.quant_method


FORMAT_VERSION = 1


class TernaryQuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` entry of a saved model's config.json.

    Args:
        modules: names of the ternary layers, relative to the transformers model.
        activation_bits, rule, skip: as in ``TernaryConfig``.
        embeddings: names of the rounded embedding tables.
        embedding_bits: bits of their values, 8 or 4; 16 if there are none. Older models have 8 and no entry.
        norms: the eps of the RMSNorm of each ternary layer that has one, by the layer's name.
        int4_modules: names of those of ``modules`` whose weights have 4 bits.
        format_version: of the packed layout; a newer one is refused.

    Raises:
        CheckpointError: an unknown version, field or number of bits.
    """

    def __init__(
        self,
        modules: list[str] | None = None,
        activation_bits: int = 8,
        rule: str = "mse",
        skip: Iterable[str] = (),
        embeddings: list[str] | None = None,
        embedding_bits: int = 8,
        norms: dict[str, float] | None = None,
        int4_modules: list[str] | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"the model was saved in tritern format {format_version!r}; "
                f"this version reads {FORMAT_VERSION}: upgrade tritern"
            )
        if unknown:
            raise CheckpointError(
                f"unknown fields in the tritern quantization_config: {', '.join(sorted(unknown))}"
            )
        if embeddings and embedding_bits not in (4, 8):
            raise CheckpointError(
                f"embedding_bits of a saved model are 4 or 8; config.json says {embedding_bits!r}: upgrade "
                "tritern, or save the model again"
            )
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers takes registered names as str
        self.modules = list(modules or [])
        self.activation_bits = activation_bits
        self.rule = rule
        self.skip = list(skip)
        self.embeddings = list(embeddings or [])
        self.embedding_bits = embedding_bits
        self.norms = dict(norms or {})
        self.int4_modules = list(int4_modules or [])
        self.format_version = format_version
