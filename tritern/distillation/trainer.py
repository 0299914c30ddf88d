"""``TernaryDistiller``: sentence-transformers' trainer for a student with ternary layers."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.sampler import BatchSamplers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoint.digest import sealed
from ..config import TernaryConfig
from ..errors import TriternError
from ..inputs import near
from ..nn.replace import is_ternary
from ..pretrained import model_of
from .arguments import TernaryDistillationArguments, suggested_learning_rate
from .data import LengthBatches, token_counts
from .kept import cuts_and_padding, device_kept, modes_kept, without_dropout
from .layers import TrainableTernaryLinear
from .objective import DistillationLoss
from .resuming import (
    STATE_FILE,
    check_same_run,
    settings_of_run,
    state_file,
    texts_digest,
    weights_digest,
)
from .student import make_trainable, pack_trained, packed_form, reopen

logger = logging.getLogger(__name__)

FURTHER_RATE = 0.4
"""Share of the usual learning rate for the further training of a ternary student."""

LATENT = 0.75
"""First latent weights of a ternary student, in scales."""


class TernaryDistiller(SentenceTransformerTrainer):
    """Distil a model into its own ternary form, in place.

    Everything else is ``SentenceTransformerTrainer``: mixed precision, accumulation, evaluation, early
    stopping, logging, several processes. A checkpoint folder holds the packed model, ready to load and score,
    and the latent weights. ``train(resume_from_checkpoint=...)`` continues exactly from these.

    Args:
        model: the student, or its name or folder. Its linear layers become trainable ternary ones at once. A
            ternary student keeps its codes; it needs its original as the ``teacher``.
        args: settings; they are not changed.
        train_dataset: one text column; with ``teacher="labels"`` also ``label``, the teacher's vectors.
        teacher: a model with the same tokenizer, or its name or folder; None: a frozen copy of ``model``;
            ``"labels"``: the vectors in the data set's ``label`` column.
        config: settings of the ternary layers and tables; None for a ternary student.
        **kwargs: of ``SentenceTransformerTrainer``, except ``loss``.

    Raises:
        TriternError: a ternary model without another teacher, a teacher that does not fit, weights that
            ``patch`` refuses.
    """

    training_args_class = TernaryDistillationArguments

    def __init__(
        self,
        model: SentenceTransformer | str | Path,
        args: TernaryDistillationArguments,
        train_dataset: Any = None,
        *,
        teacher: SentenceTransformer | str | Path | None = None,
        config: TernaryConfig | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value, allowed, what in (
            ("args", args, TernaryDistillationArguments, "TernaryDistillationArguments"),
            ("config", config, (TernaryConfig, type(None)), "a tritern.TernaryConfig or None"),
        ):
            if not isinstance(value, allowed):
                raise TriternError(f"{name} must be {what}; received {type(value).__name__}")
        model = model_of(model, "model")
        if teacher is not None and not (isinstance(teacher, str) and teacher == "labels"):
            if isinstance(teacher, str) and near(teacher, ["labels"]) and not Path(teacher).exists():
                raise TriternError(f"teacher must be a model, None or 'labels'; received {teacher!r}")
            teacher = model_of(teacher, "teacher")
        if any(isinstance(m, TrainableTernaryLinear) for m in model.modules()):
            raise TriternError("the student comes from a run that ended early: load it again to start anew")
        further = is_ternary(model)
        if further and (teacher is None or teacher is model):
            raise TriternError(
                "a ternary student needs its original as the teacher: pass teacher=, that model "
                "or its vectors of the texts"
            )
        if further and (config is not None or args.blend_ratio):
            raise TriternError(
                "a ternary student keeps its settings: config must be None and blend_ratio 0; received "
                f"{config} and {args.blend_ratio}"
            )
        if {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}:
            logger.warning(
                "the student is cast to float32, so that small steps are not lost; bf16=True computes in bf16"
            )
            model.float()
        args = copy.copy(args)  # the caller may start another run with it
        self._tokenizer_as_before = cuts_and_padding(model.tokenizer)
        own = teacher is None or teacher is model
        frozen = (
            copy.deepcopy(model) if own else teacher if isinstance(teacher, SentenceTransformer) else None
        )
        if frozen is not None:
            _check_tokenizer(model, frozen)
        if own and frozen is not None:
            frozen.eval().requires_grad_(False)
        self._teacher = frozen
        # before layers are replaced: new layers take over hooks, and a refusal leaves the model unchanged
        self.objective = DistillationLoss(model, frozen, args)
        self.ternary_config, scales = config or TernaryConfig(), {}
        if further:
            self.ternary_config, scales = reopen(model, LATENT if args.learn_scale else 1.0)
        self.converted = make_trainable(
            model,
            self.ternary_config,
            scales=scales,
            learn_scale=args.learn_scale,
            clip=args.clip,
            backward_dtype=args.backward_dtype(),
            through_tables=args.train_rounded_embeddings,
        )
        if args.learning_rate is None:
            args.learning_rate = suggested_learning_rate(sum(p.numel() for p in model.parameters()))
            args.learning_rate *= FURTHER_RATE if further else 1
        self._length = min((n for n in (args.max_length, model.max_seq_length) if n), default=None)
        if "data_collator" not in kwargs:
            kwargs["data_collator"] = self.data_collator_class(
                model.preprocess,
                prompts=args.prompts,
                router_mapping=args.router_mapping,  # pyright: ignore[reportArgumentType]
                max_length=self._length,
            )
        super().__init__(model=model, args=args, train_dataset=train_dataset, loss=self.objective, **kwargs)
        self.args: TernaryDistillationArguments
        self._batches: LengthBatches | None = None
        self.add_callback(_Schedule(self))

    def layers(self) -> Iterator[TrainableTernaryLinear]:
        """The trainable ternary layers."""
        return (m for m in self.model.modules() if isinstance(m, TrainableTernaryLinear))

    def pack(self) -> SentenceTransformer:
        """End training: the model with packed layers, in place."""
        # mixed precision wraps forward in autocast; the packed model must not keep it
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        pack_trained(self.model, self.ternary_config, self.converted)
        return self.model

    def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **kwargs: Any) -> Any:
        """Batches of similar length if ``args.group_by_length`` asks for it and no other sampler is set."""
        texts = [c for c in dataset.column_names if c not in self.data_collator.valid_label_columns]
        usual = self.args.batch_sampler == BatchSamplers.BATCH_SAMPLER
        if not (self.args.group_by_length and usual and len(texts) == 1 and hasattr(dataset, "__len__")):
            return super().get_batch_sampler(dataset, batch_size, drop_last, **kwargs)
        lengths = token_counts(self.model.tokenizer, dataset[texts[0]], self._length)
        batches = LengthBatches(lengths, batch_size, drop_last, self.args.world_size, kwargs.get("seed", 0))
        if dataset is self.train_dataset:
            self._batches = batches
        return batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; wrappers of the sampler do not always pass it on."""
        if self._batches is not None:
            self._batches.set_epoch(epoch)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Like the parent's, without dropout. An error for lack of memory says which settings to lower.

        Afterwards dropout, modes, ``requires_grad``, the tokenizer and the teacher are as before.
        """
        model: Any = self.model
        try:
            with without_dropout(model), modes_kept(model), device_kept(self._teacher):
                for module in model.modules():
                    if isinstance(module, nn.Embedding) and not self.args.train_embeddings:
                        module.requires_grad_(False)
                return super().train(*args, **kwargs)  # auto_find_batch_size tries again in there
        except RuntimeError as error:
            known = "allocate memory", "No executable batch size"
            if not (isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in known)):
                raise
            raise TriternError(
                f"out of memory ({error}). Lower per_device_train_batch_size (now "
                f"{self.args.per_device_train_batch_size}; gradient_accumulation_steps keeps the texts per "
                f"step, each compared with fewer), max_length (now {self.args.max_length}), or set "
                "gradient_checkpointing=True."
            ) from error
        finally:
            self._tokenizer_as_before()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One step. A loss that is not finite ends the run; the batch is saved."""
        batch = dict(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            name = f"bad_batch-{self.state.global_step}"
            name += f"-process-{self.args.process_index}" if self.args.world_size > 1 else ""
            file = Path(str(self.args.output_dir)) / f"{name}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in batch.items() if isinstance(v, Tensor)}, file)
            raise TriternError(
                f"the loss is {float(loss)} at step {self.state.global_step}; the batch is kept in {file}. "
                f"Lower learning_rate (now {self.args.learning_rate:g}) or resume from the last checkpoint."
            )
        return loss

    def identity(self) -> dict[str, Any]:
        """Everything that decides the run's numbers. A resumed run must have the same."""
        texts_per_batch = self.args.train_batch_size * self.args.world_size
        settings = settings_of_run(self.args) | {"texts per batch": texts_per_batch}
        settings |= {"training texts": self._digest, "teacher": self._teacher_digest}
        return json.loads(json.dumps(asdict(self.ternary_config) | settings))

    @cached_property
    def _digest(self) -> str:
        return texts_digest(self.train_dataset, self.data_collator.valid_label_columns)

    @cached_property
    def _teacher_digest(self) -> str:
        return weights_digest(self._teacher)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            for layer in self.layers():
                layer.refresh()
            balance = ",".join(str(float(b)) for b in self.objective.balance)
            metadata = {"balance": balance, "run": json.dumps(self.identity())}
            save_model(self.model, str(folder / STATE_FILE), metadata)
        with packed_form(self.model, self.ternary_config, self.converted), sealed(folder):
            super()._save(str(folder), state_dict)
            self._tokenizer_as_before()  # training and the model card have changed it
            if isinstance(self.processing_class, PreTrainedTokenizerBase):
                self.processing_class.save_pretrained(str(folder))

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        file = state_file(checkpoint_path)
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata()
        check_same_run(checkpoint_path, json.loads(metadata["run"]), self.identity())
        load_model(self.model, file)
        with torch.no_grad():
            balance = [float(b) for b in metadata["balance"].split(",")]
            self.objective.balance.copy_(torch.tensor(balance, dtype=torch.float32))


class _Schedule(TrainerCallback):
    """Sets the blend and the loss's progress before every step; they depend on the step alone."""

    def __init__(self, trainer: TernaryDistiller) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.set_epoch(int((state.epoch or 0) + 1e-6))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progress = state.global_step / max(1, state.max_steps)
        self.trainer.objective.progress = progress
        for layer in self.trainer.layers():
            layer.blend = args.blend(progress)


def _check_tokenizer(model: SentenceTransformer, teacher: SentenceTransformer) -> None:
    ours, theirs = model.tokenizer, teacher.tokenizer
    if hasattr(ours, "get_vocab") and hasattr(theirs, "get_vocab") and ours.get_vocab() != theirs.get_vocab():
        raise TriternError(
            "student and teacher must have the same tokenizer; their vocabularies differ. Encode the texts "
            "with the teacher first and pass its vectors instead."
        )
