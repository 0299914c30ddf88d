"""``Int8Embedding``: an embedding table with one byte a value and one scale a row."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tritern_kernels.dispatch import FLOATS
from tritern_kernels.reference import quantize_activations

from .errors import TriternError


class Int8Embedding(nn.Module):
    """A drop-in for ``nn.Embedding`` in inference: row i is ``weight_scale[i] * weight[i]``, times
    ``embed_scale`` in place of tables that multiply what they look up, such as Gemma's.

    Takes ids [...] and returns [..., embedding_dim] in the dtype of ``weight_scale``, which follows the
    module when it is cast; the table stays int8.

    Attributes:
        weight: buffer, int8 [num_embeddings, embedding_dim], each row's values / scale, rounded.
        weight_scale: buffer, floating point [num_embeddings], each row's absmax / 127.
        embed_scale: multiplies the output, rounded to its dtype first; 1 for an ``nn.Embedding``.
        original: class of the table that this one stands for.

    Args:
        num_embeddings: rows.
        embedding_dim: values in a row.
        padding_idx: kept for those who ask; it changes nothing in inference.
        device: where the buffers live.
        dtype: of the scales and of the output; torch's default if None.

    Raises:
        TriternError: another dtype than float32, float16 or bfloat16.
    """

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
        shape = (num_embeddings, embedding_dim)
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.zeros(num_embeddings, device=device, dtype=dtype))

    @classmethod
    def like(cls, embedding: nn.Embedding) -> Int8Embedding:
        """One without values, on the meta device, that can stand in for a table.

        Raises:
            TriternError: a subclass of ``nn.Embedding`` that may do more than multiply by its
                ``embed_scale``; another dtype than float32, float16, bfloat16.
        """
        scale = multiplier(embedding)
        if scale is None:
            raise TriternError(
                f"a {type(embedding).__name__} cannot be made int8: only nn.Embedding and tables of "
                "transformers that do no more than multiply by their embed_scale can"
            )
        shape = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
        new = cls(*shape, device="meta", dtype=embedding.weight.dtype)
        new.embed_scale, new.original = scale, type(embedding)
        return new.train(embedding.training)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> Int8Embedding:
        """Round a table row by row, as activations are (``reference.quantize_activations``).

        Raises:
            TriternError: as ``like``; no ``nn.Embedding``, one with ``max_norm``, on the meta device, or with
                NaN or infinity.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TriternError(f"embedding must be an nn.Embedding; received {type(embedding).__name__}")
        weight = embedding.weight.detach()
        if embedding.max_norm is not None:
            raise TriternError(
                f"an embedding with max_norm={embedding.max_norm} cannot be made int8, as reading rescales "
                "its rows; rescale them beforehand and set max_norm to None"
            )
        if weight.is_meta:
            raise TriternError("the table is on the meta device; load the weights before making it int8")
        if not torch.isfinite(weight).all():
            raise TriternError("the table holds NaN or infinity; repair the checkpoint")
        new = cls.like(embedding)
        q, scale = quantize_activations(weight)
        new.weight, new.weight_scale = q, scale.to(weight.dtype)
        return new

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The ``original`` table with the same values in ``dtype`` (default: that of the scales)."""
        values = self._values(self.weight, self.weight_scale).to(dtype or self.weight_scale.dtype)
        options: Any = {} if self.original is nn.Embedding else {"embed_scale": self.embed_scale}
        table: Any = self.original(1, self.embedding_dim, None, **options).to(values.device)
        if options:  # the buffer would have torch's default dtype
            table.embed_scale = torch.tensor(self.embed_scale, dtype=torch.float32, device=values.device)
        table.num_embeddings, table.padding_idx = self.num_embeddings, self.padding_idx
        table.weight = nn.Parameter(values)
        return table.train(self.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, nn.Embedding's name
        """Ids [...] -> [..., embedding_dim]."""
        rows = nn.functional.embedding(input, self.weight)
        values = self._values(rows, nn.functional.embedding(input, self.weight_scale[:, None]).squeeze(-1))
        return multiplied(values, self.embed_scale)

    @staticmethod
    def _values(rows: Tensor, scale: Tensor) -> Tensor:
        return rows.to(scale.dtype) * scale[..., None]

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        scale = "" if self.embed_scale == 1 else f", embed_scale={self.embed_scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}{scale}"

    def requires_grad_(self, requires_grad: bool = True) -> Int8Embedding:
        """Refused when True: rounded tables have no gradient."""
        if requires_grad:
            raise TriternError("an Int8Embedding cannot be trained; train `table.to_embedding()` instead")
        return super().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Embedding:
        table = self.weight
        super()._apply(fn, recurse)
        if self.weight.dtype != torch.int8:
            self.weight = table.to(self.weight.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        for name, dtypes in (("weight", (torch.int8,)), ("weight_scale", FLOATS)):
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


def multiplier(table: nn.Embedding) -> float | None:
    """What a table multiplies its rows by: 1 for an ``nn.Embedding``, None for a subclass that may do more
    than that.
    """
    if type(table) is nn.Embedding:
        return 1.0
    if not _multiplies(type(table)):
        return None
    return float(torch.tensor(table.scalar_embed_scale, dtype=torch.float32, device="cpu"))  # as its buffer


def multiplied(values: Tensor, scale: float) -> Tensor:
    """Values times a multiplier, which is rounded to their dtype first, as transformers does."""
    return values if scale == 1 else values * torch.full((), scale, dtype=values.dtype, device=values.device)


@cache
def _multiplies(kind: type[nn.Embedding]) -> bool:
    """Whether a table's class, one of transformers', only multiplies by its buffer ``embed_scale``: seen from
    its arguments and from what it does to three rows.
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
