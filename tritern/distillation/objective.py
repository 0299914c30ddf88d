"""The training loss: hooks record teacher and student on one batch, terms compare them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from sentence_transformers.util import all_gather, all_gather_with_grad
from torch import Tensor, nn

from ..errors import TriternError
from ..modes import evaluating, without_cudnn_attention
from ..selection import blocks_of
from .layers import TrainableTernaryLinear
from .losses import LOSSES, Outputs, terms

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from .arguments import TernaryDistillationArguments

_PER_TOKEN = ("hidden", "last_hidden")


class HiddenStates:
    """Hooks that collect the outputs of a model's transformer blocks."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = list(blocks_of(model).values())

    @contextmanager
    def collect(self) -> Iterator[list[Tensor]]:
        """A list that gets the blocks' outputs while the model runs once."""
        hidden: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            hidden.append(output if isinstance(output, Tensor) else output[0])

        handles = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            yield hidden
        finally:
            for handle in handles:
                handle.remove()


class DistillationLoss(nn.Module):
    """Weighted terms of ``losses.LOSSES`` between a student and its frozen teacher on the same texts.

    Args:
        model: the student, its layers not yet replaced by trainable ones.
        teacher: a model with the same tokenizer, or None if the batches bring its vectors as labels.
        args: weights and schedules.

    Raises:
        TriternError: a term that cannot compare the two models; the error names the setting that turns it
            off.
    """

    balance: Tensor

    def __init__(
        self,
        model: SentenceTransformer,
        teacher: SentenceTransformer | None,
        args: TernaryDistillationArguments,
    ) -> None:
        super().__init__()
        self.model = model
        self.args = args
        self.progress = 0.0  # share of the training steps done, set by the trainer
        # factors that make the terms' gradients equally long; NaN until measured on the first batch
        self.register_buffer("balance", torch.full((len(LOSSES),), torch.nan, dtype=torch.float32))
        self._teacher = (teacher,)  # a tuple: as a submodule it would be trained, moved and saved
        self._states = HiddenStates(model), None if teacher is None else HiddenStates(teacher)
        self._check(model, teacher)

    def _check(self, model: SentenceTransformer, teacher: SentenceTransformer | None) -> None:
        names, width = self.args.loss_weights(), model.get_embedding_dimension()
        if width and any(dim > width for dim in self.args.matryoshka_dims or ()):
            raise TriternError(
                f"matryoshka_dims must be at most {width}, the width of the model's vectors; received "
                f"{self.args.matryoshka_dims}"
            )
        per_token = [n for n in names if n in _PER_TOKEN]
        if not names:
            raise TriternError(f"all loss weights are 0; the terms are {_settings(LOSSES)}")
        if teacher is None:
            if per_token:
                raise TriternError(
                    f"{_settings(per_token)} must be 0 with precomputed teacher vectors: there is no teacher "
                    "to show hidden states"
                )
            return
        if per_token and not self._states[0].blocks:
            raise TriternError(f"{_settings(per_token)} must be 0 for this model: it has no blocks")

    @without_cudnn_attention()
    def forward(self, features: list[dict[str, Tensor]], labels: Tensor | None = None) -> dict[str, Tensor]:
        """The weighted terms by name; their sum is the loss. ``features`` is one tokenized column."""
        teacher = self._teacher_outputs(features[0], labels)
        if torch.isnan(self.balance).any() and torch.is_grad_enabled():
            with _without_blend(self.model):  # a blended student may equal its teacher
                self._measure(*self._compare(features[0], teacher))
        values, _ = self._compare(features[0], teacher)
        fade = self.args.layer_fade if self.progress >= self.args.layer_fade_start else 1.0
        weights, balance = self.args.loss_weights(), torch.nan_to_num(self.balance, nan=1.0)
        return {
            name: value * weights[name] * balance[LOSSES.index(name)] * (fade if name in _PER_TOKEN else 1.0)
            for name, value in values.items()
        }

    def _compare(self, features: dict[str, Tensor], teacher: Outputs) -> tuple[dict[str, Tensor], Tensor]:
        """The unweighted terms and the student's first hidden state, or its vectors if it has none."""
        names = list(self.args.loss_weights())
        with self._states[0].collect() as hidden:
            pooled = self.model(dict(features))["sentence_embedding"]
        student, mask = Outputs(pooled, hidden), features.get("attention_mask")
        if mask is None and (per_token := [n for n in names if n in _PER_TOKEN]):
            raise TriternError(
                f"{_settings(per_token)} need padded batches with an attention mask, but this model's are "
                "flattened for flash attention: set model[0].unpad_inputs = False, for the teacher too"
            )
        self._check_widths(student, teacher, names)
        values = terms(
            student,
            teacher,
            mask,
            names,
            gathered=_gather(pooled, teacher.pooled) if "similarity" in names else None,
            dims=self.args.matryoshka_dims or (),
            temperature=self.args.temperature,
        )
        return values, hidden[0] if hidden else pooled

    def _teacher_outputs(self, features: dict[str, Tensor], labels: Tensor | None) -> Outputs:
        teacher, states = self._teacher[0], self._states[1]
        if teacher is None or states is None:
            if labels is None:
                raise TriternError(
                    "without a teacher model every batch needs the teacher's vectors as `label`"
                )
            return Outputs(labels, [])
        device = next(iter(features.values())).device
        if teacher.device != device:
            teacher.to(device)
        dtype = self.args.teacher_dtype()
        # no autocast cache: it would keep casts made in inference mode
        autocast = torch.autocast(
            device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False
        )
        with evaluating(teacher), torch.inference_mode(), autocast, states.collect() as hidden:
            pooled = teacher(dict(features))["sentence_embedding"]
        # a backward pass cannot use tensors of inference mode, but it can use their copies
        wanted = self.args.loss_weights()
        hidden = hidden if "hidden" in wanted else hidden[-1:] if "last_hidden" in wanted else []
        return Outputs(pooled.clone(), [h.clone() for h in hidden])

    def _check_widths(self, student: Outputs, teacher: Outputs, names: list[str]) -> None:
        widths = student.pooled.shape[-1], teacher.pooled.shape[-1]
        if widths[0] != widths[1] and ("cosine" in names or self.args.matryoshka_dims):
            raise TriternError(
                f"the teacher's vectors have {widths[1]} dimensions and the student's {widths[0]}: set "
                "cosine_weight=0 (similarity works across widths) or take a teacher of the same width"
            )
        if "hidden" in names and len(student.hidden) != len(teacher.hidden):
            raise TriternError(
                f"hidden_weight must be 0: the student has {len(student.hidden)} blocks, "
                f"the teacher {len(teacher.hidden)}"
            )
        ours, theirs = ([h.shape[-1] for h in x.hidden[-1:]] for x in (student, teacher))
        if ours != theirs and ("hidden" in names or "last_hidden" in names):
            raise TriternError(
                "hidden_weight and last_hidden_weight must be 0: hidden states have width "
                f"{ours} in the student and {theirs} in the teacher"
            )

    def _measure(self, values: dict[str, Tensor], at: Tensor) -> None:
        """Set ``balance``: it makes all terms' gradients at the first block as long as the first term's."""
        # times 2^14, which cancels: the smallest gradients must not vanish in float16
        gradients = [
            torch.autograd.grad(v * 2.0**14, at, retain_graph=True, materialize_grads=True)[0]
            for v in values.values()  # a term that does not depend on it has zeros, and so the factor 1
        ]
        squares = torch.stack([g.float().square().sum() for g in gradients])
        if dist.is_initialized():
            dist.all_reduce(squares)  # as if one process had the whole batch
        for name, ratio in zip(values, (squares[0] / squares).sqrt()):
            self.balance[LOSSES.index(name)] = ratio
        self.balance[~(torch.isfinite(self.balance) & (self.balance > 0))] = 1.0


@contextmanager
def _without_blend(model: nn.Module) -> Iterator[None]:
    """Run the model's layers fully ternary while the context lasts."""
    blends = {m: m.blend for m in model.modules() if isinstance(m, TrainableTernaryLinear)}
    for layer in blends:
        layer.blend = 1.0
    try:
        yield
    finally:
        for layer, blend in blends.items():
            layer.blend = blend


def _settings(names: Iterable[str]) -> str:
    return ", ".join(f"{n}_weight" for n in names)


def _gather(student: Tensor, teacher: Tensor) -> dict[str, Any] | None:
    """The vectors of all processes, with gradients to this student's; None for a single process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return {
        "all_student": all_gather_with_grad(student),
        "all_teacher": all_gather(teacher),
        "first": dist.get_rank() * len(student),
    }
