"""Settings of a distillation run and their schedules."""

from __future__ import annotations

import logging
import math
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, NoReturn

import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import HfArgumentParser

from ..errors import TriternError
from ..inputs import many, near, true_or_false, whole_number
from .losses import LOSSES

logger = logging.getLogger(__name__)

_WHOLE = {
    "max_steps": -1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
    "data_seed": 0,
    "max_length": 1,
}
"""Settings that are whole numbers, with their least values."""
_OR_NONE = "data_seed", "max_length"


@dataclass
class TernaryDistillationArguments(SentenceTransformerTrainingArguments):
    """All of ``SentenceTransformerTrainingArguments``, with these changed or added.

    Args:
        learning_rate: peak; None: 5e-4 at 22 million parameters; it falls with the root of their number.
        per_device_train_batch_size, gradient_accumulation_steps: a step has 2 batches of 32 texts. With
            ``group_by_length`` a batch holds texts of one length; steps with several lengths train better.
        max_length: tokens per text in training, at most the model's maximum (None: that); longer texts are
            cut.
        group_by_length: make batches of texts of similar length (less padding, several times as fast).
        cosine_weight, similarity_weight, hidden_weight, last_hidden_weight: weights of the terms in
            ``tritern.distillation.losses``; 0 leaves a term out. They multiply scaled terms: the first batch
            sets the scales so that the terms' gradients at the first block are equally long.
        temperature: of the similarity term.
        matryoshka_dims: apply the cosine and similarity terms to vectors cut to each of these dimensions.
        layer_fade_start, layer_fade: per-token terms have weight ``layer_fade`` after the share
            ``layer_fade_start`` of the steps.
        learn_scale: learn the row scales by gradient; otherwise the rule renews them at every step.
        clip: weights beyond clip * scale get no gradient.
        blend_ratio: share of the steps over which the layers go from full precision to ternary.
        train_embeddings: train the embedding tables, too.
        train_rounded_embeddings: round the embedding tables during training, not only at its end.
        cpu_bf16: on a CPU, run the teacher, the backward products and the blended layers in bfloat16. The
            student's ternary forward does not change. None: True if the CPU has bfloat16 instructions. (On
            CUDA, float32 gradients of a layer's input are 16-bit products.)
    """

    learning_rate: float | None = field(default=None)  # type: ignore[assignment]
    num_train_epochs: float = field(default=1.0)
    lr_scheduler_type: str = field(default="cosine")  # type: ignore[assignment]
    warmup_steps: float = field(default=0.05)
    adam_beta2: float = field(default=0.98)
    per_device_train_batch_size: int = field(default=32)
    gradient_accumulation_steps: int = field(default=2)
    dataloader_drop_last: bool = field(default=True)
    logging_steps: float = field(default=10)

    max_length: int | None = field(default=128)
    group_by_length: bool = field(default=True)
    cosine_weight: float = field(default=1.0)
    similarity_weight: float = field(default=0.2)
    hidden_weight: float = field(default=3.0)
    last_hidden_weight: float = field(default=0.0)
    temperature: float = field(default=0.05)
    matryoshka_dims: list[int] | None = field(default=None)
    layer_fade_start: float = field(default=0.7)
    layer_fade: float = field(default=0.2)
    learn_scale: bool = field(default=True)
    clip: float = field(default=1.0)
    blend_ratio: float = field(default=0.3)
    train_embeddings: bool = field(default=True)
    train_rounded_embeddings: bool = field(default=True)
    cpu_bf16: bool | None = field(default=None)

    def __post_init__(self) -> None:
        for name, least in _WHOLE.items():
            if (value := getattr(self, name)) is not None or name not in _OR_NONE:
                setattr(self, name, whole_number(value, name, least))
        for f in fields(self):
            if isinstance(f.default, bool):
                true_or_false(getattr(self, f.name), f.name)
        self._check_number("num_train_epochs")
        if self.matryoshka_dims is not None:
            dims = many(self.matryoshka_dims, "matryoshka_dims")
            self.matryoshka_dims = [whole_number(width, "matryoshka_dims", 1) for width in dims]
        rate = self.learning_rate
        self.learning_rate = 0.0 if rate is None else rate
        super().__post_init__()
        self.learning_rate = rate
        if self.n_gpu > 1:
            logger.warning(
                "%d GPUs are visible and one is used: start with torchrun --nproc-per-node=%d to use all",
                self.n_gpu,
                self.n_gpu,
            )
            self._n_gpu = 1  # DataParallel would run the hooks of all replicas into one list
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type == "cuda"
        if rate is not None:
            self._check_number("learning_rate")
            if not rate >= 0:
                raise TriternError(f"learning_rate must not be negative; received {rate}")
        for name in ("layer_fade_start", "blend_ratio"):
            value = self._check_number(name)
            if not 0 <= value <= 1:
                raise TriternError(f"{name} is a share of the steps, from 0 to 1; received {value}")
        for name in (*(f"{n}_weight" for n in LOSSES), "layer_fade"):
            if not self._check_number(name) >= 0:
                raise TriternError(f"{name} must not be negative; received {getattr(self, name)}")
        for name in ("temperature", "clip"):
            if not self._check_number(name) > 0:
                raise TriternError(f"{name} must be positive; received {getattr(self, name)}")

    def _check_number(self, name: str) -> Any:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TriternError(f"{name} must be a number; received {value!r} ({type(value).__name__})")
        return value

    def loss_weights(self) -> dict[str, float]:
        """Weights of the terms in use, by name."""
        weights = {name: getattr(self, f"{name}_weight") for name in LOSSES}
        return {name: weight for name, weight in weights.items() if weight}

    def teacher_dtype(self) -> torch.dtype | None:
        """The dtype of mixed precision for the teacher, or None."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else self.backward_dtype()

    def backward_dtype(self) -> torch.dtype | None:
        """The dtype of the backward products of a float32 forward; None means float32."""
        wanted = torch.cpu._is_avx512_bf16_supported() if self.cpu_bf16 is None else self.cpu_bf16
        return torch.bfloat16 if wanted and self.device.type == "cpu" else None

    def blend(self, progress: float) -> float:
        """Share of the ternary weights at a share of the steps."""
        return min(1.0, progress / self.blend_ratio) if self.blend_ratio else 1.0


def suggested_learning_rate(parameters: int) -> float:
    """Peak rate for a model with this number of parameters."""
    return 5e-4 * math.sqrt(22.7e6 / parameters)


class _SettingsParser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise TriternError(f"settings: {message}")


def settings_parser() -> HfArgumentParser:
    """Parser of ``--name value`` for every field of ``TernaryDistillationArguments``."""
    fields: Any = TernaryDistillationArguments
    form = ArgumentDefaultsHelpFormatter
    return _SettingsParser(fields, add_help=False, allow_abbrev=False, formatter_class=form)


def parse_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """The fields of ``TernaryDistillationArguments`` named in ``--name value`` pairs, and no others.

    Raises:
        TriternError: an unknown name, or a value that does not fit.
    """
    known, unknown = settings_parser().parse_known_args(list(arguments))
    if unknown:
        names = [f.name for f in fields(TernaryDistillationArguments)]
        meant = (
            near(token[2:].partition("=")[0].replace("-", "_"), names)
            for token in unknown
            if token.startswith("--")
        )
        hints = ", ".join(f"--{name}" for found in meant for name in found)
        hint = f"did you mean {hints}? " if hints else ""
        raise TriternError(f"unknown options: {' '.join(unknown)} ({hint}--help-all lists every setting)")
    given = {token[2:].partition("=")[0].replace("-", "_") for token in arguments if token.startswith("--")}
    given |= {name.removeprefix("no_") for name in given}
    return {name: value for name, value in vars(known).items() if name in given}
