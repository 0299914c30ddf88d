"""Embedding tables in 8 or 4 bits a value: ``Int8Embedding`` and ``Int4Embedding``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritern_kernels.embedding import lookup, quantize_table
from tritern_kernels.ops import FLOATS
from tritern_kernels.reference import quantize_activations

from ..errors import TriternError

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantizedEmbedding(nn.Module):
    """Base of ``Int8Embedding`` and ``Int4Embedding``, which stand in for ``nn.Embedding``.

    Ids [...] give rows [..., embedding_dim] in the dtype of ``weight_scale``. That dtype changes when the
    module is cast. The rows are multiplied by ``embed_scale``, for tables such as Gemma's.

    Attributes:
        bits: class attribute, bits of a value: 8 or 4.
        weight, weight_scale: buffers, the codes and their scales.
        embed_scale: factor of the output, first rounded to its dtype; 1 for an ``nn.Embedding``.
        original: class of the table that this one replaces.

    Args:
        num_embeddings: rows.
        embedding_dim: values in a row.
        padding_idx: kept as an attribute; it changes nothing in inference.
        device: where the buffers live.
        dtype: of the scales and of the output; torch's default if None.

    Raises:
        TriternError: another dtype than float32, float16 or bfloat16.
    """

    bits: ClassVar[int]
    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        if dtype not in FLOATS:
            raise TriternError(f"dtype must be float32, float16 or bfloat16; received {dtype}: cast it first")
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.embed_scale, self.original = 1.0, nn.Embedding
        row = self.quantize(torch.zeros(1, embedding_dim, device="meta", dtype=dtype))
        for name, one in zip(("weight", "weight_scale"), row, strict=True):
            shape = (num_embeddings, *one.shape[1:])
            self.register_buffer(name, torch.zeros(shape, dtype=one.dtype, device=device))

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [rows, embedding_dim] -> codes and scales as in the buffers, scales in weight's dtype."""
        raise NotImplementedError

    @staticmethod
    def dequantize(ids: Tensor, packed: Tensor, scale: Tensor, width: int) -> Tensor:
        """Ids [...] -> rows [..., width] in scale's dtype."""
        raise NotImplementedError

    @classmethod
    def like(cls, embedding: nn.Embedding) -> Self:
        """A stand-in for a table, without values, on the meta device.

        Raises:
            TriternError: a subclass of ``nn.Embedding`` that may do more than multiply by its
                ``embed_scale``; another dtype than float32, float16 or bfloat16.
        """
        scale = multiplier(embedding)
        if scale is None:
            raise TriternError(
                f"a {type(embedding).__name__} cannot be made int{cls.bits}: only nn.Embedding and "
                "tables of transformers that just multiply by their embed_scale can"
            )
        shape = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
        new = cls(*shape, device="meta", dtype=embedding.weight.dtype)
        new.embed_scale, new.original = scale, type(embedding)
        return new.train(embedding.training)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> Self:
        """Round a table.

        Raises:
            TriternError: as ``like``; not an ``nn.Embedding``; a table with ``max_norm``, on the meta device,
                or with NaN or infinity.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TriternError(f"embedding must be an nn.Embedding; received {type(embedding).__name__}")
        weight = embedding.weight.detach()
        if embedding.max_norm is not None:
            raise TriternError(
                f"an embedding with max_norm={embedding.max_norm} cannot be made int{cls.bits}: each lookup "
                "rescales its rows; rescale them beforehand and set max_norm to None"
            )
        if weight.is_meta:
            raise TriternError(
                f"the table is on the meta device; load the weights before making it int{cls.bits}"
            )
        if not torch.isfinite(weight).all():
            raise TriternError("the table holds NaN or infinity; repair the checkpoint")
        new = cls.like(embedding)
        new.weight, new.weight_scale = cls.quantize(weight)
        return new

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The ``original`` table with the same values in ``dtype`` (default: that of the scales)."""
        ids = torch.arange(self.num_embeddings, dtype=torch.int64, device=self.weight.device)
        values = self.dequantize(ids, self.weight, self.weight_scale, self.embedding_dim)
        values = values.to(dtype or self.weight_scale.dtype)
        options: Any = {} if self.original is nn.Embedding else {"embed_scale": self.embed_scale}
        table: Any = self.original(1, self.embedding_dim, None, **options).to(values.device)
        if options:  # the buffer would have torch's default dtype
            table.embed_scale = torch.tensor(self.embed_scale, dtype=torch.float32, device=values.device)
        table.num_embeddings, table.padding_idx = self.num_embeddings, self.padding_idx
        table.weight = nn.Parameter(values)
        return table.train(self.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, nn.Embedding's name
        """Ids [...] -> [..., embedding_dim]."""
        values = self.dequantize(input, self.weight, self.weight_scale, self.embedding_dim)
        return multiplied(values, self.embed_scale)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        scale = "" if self.embed_scale == 1 else f", embed_scale={self.embed_scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}{scale}"

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Refuse True: rounded tables have no gradient."""
        if requires_grad:
            raise TriternError(
                f"an {type(self).__name__} cannot be trained; train `table.to_embedding()` instead"
            )
        return super().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        table = self.weight
        super()._apply(fn, recurse)
        if self.weight.dtype != table.dtype:
            self.weight = table.to(self.weight.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        for name, dtypes in (("weight", (self.weight.dtype,)), ("weight_scale", FLOATS)):
            value = state_dict.get(prefix + name)
            if value is not None and value.dtype not in dtypes:  # copy_ would convert it without a word
                error_msgs.append(
                    f"{prefix}{name} must be {' or '.join(map(str, dtypes))}; the state dict holds "
                    f"{value.dtype}. Load full-precision weights before patching the model."
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class Int8Embedding(QuantizedEmbedding):
    """A table with one byte per value and one scale per row: row i is ``weight_scale[i] * weight[i]``.

    Arguments, attributes and errors are those of ``QuantizedEmbedding``. ``weight`` is int8 [num_embeddings,
    embedding_dim]: values / scale, rounded. ``weight_scale`` is [num_embeddings]: absmax / 127 of each row
    (``reference.quantize_activations``).
    """

    bits = 8

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """int8 [rows, width] and the scale of each row, in weight's dtype."""
        codes, scale = quantize_activations(weight)
        return codes, scale.to(weight.dtype)

    @staticmethod
    def dequantize(ids: Tensor, packed: Tensor, scale: Tensor, width: int) -> Tensor:
        """Rows of int8 times their scales."""
        return F.embedding(ids, packed).to(scale.dtype) * F.embedding(ids, scale[:, None])


class Int4Embedding(QuantizedEmbedding):
    """A table with 4 bits per value and one scale per 32 values of a row.

    That makes 4.5 bits per value with 16-bit scales. The codes are those of llama.cpp's Q4_0; the scales give
    a smaller squared error (``tritern_kernels.embedding``). On a GPU an id out of range gives a row of NaN,
    not an error.

    Arguments, attributes and errors are those of ``QuantizedEmbedding``. ``weight`` is uint8 [num_embeddings,
    16 * groups] and ``weight_scale`` [num_embeddings, groups]; groups = embedding_dim / 32, rounded up.
    """

    bits = 4
    quantize = staticmethod(quantize_table)
    dequantize = staticmethod(lookup)


def embedding_of(bits: int) -> type[QuantizedEmbedding]:
    """The class of tables of 8 or 4 bits."""
    return Int4Embedding if bits == 4 else Int8Embedding


def multiplier(table: nn.Embedding) -> float | None:
    """The factor of a table's rows: 1 for an ``nn.Embedding``, None for a subclass that may do more than
    multiply.
    """
    if type(table) is nn.Embedding:
        return 1.0
    if not _multiplies(type(table)):
        return None
    return float(torch.tensor(table.scalar_embed_scale, dtype=torch.float32, device="cpu"))  # as its buffer


def multiplied(values: Tensor, scale: float) -> Tensor:
    """Values times a factor that is first rounded to their dtype, as transformers does."""
    return values if scale == 1 else values * torch.full((), scale, dtype=values.dtype, device=values.device)


@cache
def _multiplies(kind: type[nn.Embedding]) -> bool:
    """Whether a table class of transformers only multiplies by its buffer ``embed_scale``.

    Its arguments and a trial on three rows tell.
    """
    arguments = ["num_embeddings", "embedding_dim", "padding_idx", "embed_scale"]
    of_transformers = kind.__module__.startswith("transformers.")
    if not of_transformers or list(inspect.signature(kind).parameters) != arguments:
        return False
    make: Any = kind
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        table = make(3, 2, None, embed_scale=3.0)
        if not isinstance(table.embed_scale, Tensor) or not hasattr(table, "scalar_embed_scale"):
            return False  # a multiplier that is not rounded to the table's dtype
        table.weight = nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 0.0], [5.0, 6.0]], dtype=torch.float32))
        return torch.equal(table(torch.arange(3)), table.weight * 3)
