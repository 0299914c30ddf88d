"""``tritern.distill``: one call from a model and texts to a ternary model on disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import TernaryConfig
from ..errors import TriternError
from ..evaluate import Fidelity
from ..inputs import check_folder, check_texts, many, named, whole_number
from ..nn.replace import is_ternary
from ..pretrained import model_of
from ..texts.files import read_texts
from .arguments import TernaryDistillationArguments
from .data import JOINED_RATIO
from .fidelity import FidelityEvaluator
from .kept import random_kept
from .record import name_of, record_of, save
from .resuming import state_file
from .split import Split, check_holdout, split, split_with_vectors
from .trainer import TernaryDistiller

logger = logging.getLogger(__name__)


def distill(
    model: SentenceTransformer | str | Path,
    texts: Iterable[str] | str | Path,
    output_dir: str | Path,
    *,
    teacher: SentenceTransformer | np.ndarray | str | Path | None = None,
    config: TernaryConfig | None = None,
    column: str | None = None,
    limit: int | None = None,
    prefixes: Iterable[str] | None = None,
    holdout: int = 256,
    joined_ratio: float | None = None,
    evaluator: BaseEvaluator | None = None,
    callbacks: Iterable[Any] = (),
    resume: bool | str | Path = False,
    **settings: Any,
) -> SentenceTransformer:
    """Train a ternary form of a model on raw texts until its vectors are close to the original's.

    The model is changed in place and returned, packed. ``output_dir`` gets the model, a model card and
    ``distillation.json``, the record of the run. The teacher, the model's dropout and mode, and the state of
    the global random generators do not change.

    A model that is ternary already is trained further, to fit other texts. It needs its original as the
    teacher. There is no blend from full precision, and the default learning rate is two fifths.

    Args:
        model: a sentence-transformer, or its name or folder.
        texts: strings, in any iterable, or a source for ``read_texts``. They need no labels and should
            resemble the texts to be embedded later. Repeated and very short texts are left out.
        output_dir: folder for the model and the checkpoints of the run.
        teacher: a model with the same tokenizer, its name or folder, or the vectors of ``texts`` [len(texts),
            width]; by default the model itself, before training.
        config: settings of the ternary layers and tables; by default ``TernaryConfig()``. None for a ternary
            model, which keeps its own.
        column, limit: of ``read_texts``, if ``texts`` is a source. ``limit`` takes the first texts.
        prefixes: put before the texts in turn. The default is the model's own prompts and an empty one. With
            teacher vectors the default is none; pass the prefixes that the texts had when the vectors were
            made. () means none.
        holdout: number of texts to keep out of training and to measure closeness on; 0: none. They are drawn
            from all texts by ``data_seed`` or else ``seed``. The order of the texts does not matter.
        joined_ratio: share of training texts that join several into a longer one; default 0.05, or 0 with
            teacher vectors.
        evaluator: used during training instead of closeness on the holdout (see ``eval_strategy``).
        callbacks: of transformers' Trainer, such as ``EarlyStoppingCallback``.
        resume: True: continue from the last checkpoint in ``output_dir``; a path: from that checkpoint. The
            same arguments give the same numbers as a run without interruption.
        **settings: fields of ``TernaryDistillationArguments``, such as ``max_steps`` (or ``steps``),
            ``per_device_train_batch_size``, ``learning_rate``, ``save_steps``.

    Returns:
        The model.

    Raises:
        TriternError: an unsuitable model, teacher, setting or folder; too few texts; a text that is not a
            string; not enough memory; a loss that is not finite.
    """
    start = time.perf_counter()
    output_dir, holdout = check_folder(output_dir, "output_dir"), check_holdout(holdout)
    callbacks = list(many(callbacks, "callbacks"))
    for callback in callbacks:
        if not issubclass(callback if isinstance(callback, type) else type(callback), TrainerCallback):
            raise TriternError(f"callbacks must be transformers' TrainerCallbacks; received {callback!r}")
    if prefixes is not None:
        prefixes = list(many(prefixes, "prefixes"))
        check_texts(prefixes, name="prefixes", empty=True)
    if config is not None and not isinstance(config, TernaryConfig):
        raise TriternError(f"config must be a tritern.TernaryConfig; received {type(config).__name__}")
    if evaluator is not None and not isinstance(evaluator, BaseEvaluator):
        raise TriternError(
            "evaluator must be a sentence-transformers evaluator, such as FidelityEvaluator; received "
            f"{type(evaluator).__name__}"
        )
    vectors = teacher if isinstance(teacher, np.ndarray) else None
    with random_kept():
        guide = None if teacher is None or vectors is not None else model_of(teacher, "teacher")
        model = model_of(model, "model")
        if further := is_ternary(model):
            settings = {"blend_ratio": 0.0, **settings}
        else:
            config = config or TernaryConfig()
        args = _arguments(output_dir, settings, evaluator)
        checkpoint = _checkpoint(output_dir, resume)
        if prefixes is None:
            prefixes = [] if vectors is not None else _prompts(model)
        if joined_ratio is None:
            joined_ratio = 0.0 if vectors is not None else JOINED_RATIO
        source = str(texts) if isinstance(texts, (str, Path)) else "texts given to the call"
        parts = _parts(_read(texts, column, limit), vectors, prefixes, holdout, joined_ratio, args)
        theirs: Any = (guide or model) if parts.vectors is None else parts.vectors
        closeness = FidelityEvaluator(parts.held, theirs) if parts.held else None
        trainer = TernaryDistiller(
            model,
            args,
            parts.train,
            teacher=guide if vectors is None else "labels",
            config=config,
            evaluator=evaluator or closeness,
            callbacks=callbacks,
        )
        stage = "ternary, as given" if further else "ternary, not trained"
        fidelity = _trained(trainer, checkpoint, closeness, stage)
    seconds = time.perf_counter() - start
    record = record_of(trainer, guide if vectors is None else vectors, fidelity, seconds)
    if further and guide is not None:  # a version of the guide, made from another version
        record["trained_on_from"], record["model"] = record["model"], name_of(guide)
        record["base_model"] = guide.model_card_data.base_model or record["base_model"]
    record["data"] |= {"source": source, "column": column, "limit": limit, "holdout": holdout}
    record["data"] |= {"prefixes": prefixes, "joined_ratio": joined_ratio}
    record["resumed_from"] = Path(checkpoint).name if checkpoint else None
    if trainer.is_world_process_zero():
        save(model, record, output_dir)
    return model


def _read(texts: Iterable[str] | str | Path, column: str | None, limit: int | None) -> list[str]:
    if isinstance(texts, (str, Path)):
        return read_texts(texts, column=column, limit=limit)
    if column is not None or limit is not None:
        raise TriternError("column and limit go with a file or data set; texts are given already")
    return list(many(texts, "texts"))


def _prompts(model: SentenceTransformer) -> list[str]:
    """The different prompts of a model and an empty one, or nothing."""
    found = list(dict.fromkeys(prompt or "" for prompt in model.prompts.values()))
    return found if any(found) else []


def _parts(
    texts: list[str], vectors: np.ndarray | None, prefixes: list[str], holdout: int, joined_ratio: float,
    args: TernaryDistillationArguments,
) -> Split:  # fmt: skip
    options = prefixes, holdout, joined_ratio, args
    parts = split(texts, *options) if vectors is None else split_with_vectors(texts, vectors, *options)
    if len(parts.train) < (least := args.train_batch_size * args.world_size):
        raise TriternError(
            f"{len(parts.train)} training texts are left after holdout ({holdout}) and joining, but a batch "
            f"takes {least}: lower per_device_train_batch_size, holdout or joined_ratio, or bring more"
        )
    return parts


def _trained(
    trainer: TernaryDistiller, checkpoint: str | None, closeness: FidelityEvaluator | None, stage: str
) -> dict[str, Fidelity]:
    """Train and pack; return the closeness before (under the name ``stage``) and after."""
    found: dict[str, Fidelity] = {}

    def judge(stage: str) -> None:
        if closeness:
            closeness(trainer.model)
            found[stage] = cast(Fidelity, closeness.latest)
            logger.info("%s: %s", stage, closeness.latest)

    judge(stage)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.pack()
    judge("ternary, distilled")
    return found


def _arguments(
    output_dir: Path, settings: dict[str, Any], evaluator: BaseEvaluator | None
) -> TernaryDistillationArguments:
    settings, known = dict(settings), {f.name for f in fields(TernaryDistillationArguments)}
    if (steps := settings.pop("steps", None)) is not None:
        if "max_steps" in settings:
            raise TriternError(
                f"steps ({steps}) and max_steps ({settings['max_steps']}) are the same setting: pass one"
            )
        settings["max_steps"] = whole_number(steps, "steps", 1)
    if unknown := [named(name, known) for name in sorted(set(settings) - known)]:
        raise TriternError(
            f"unknown settings: {', '.join(unknown)}; see tritern.distillation.TernaryDistillationArguments"
        )
    if "resume_from_checkpoint" in settings:
        raise TriternError("resume_from_checkpoint has no effect here: pass resume=True, or resume=PATH")
    settings.setdefault("eval_strategy", "no" if evaluator is None else "steps")
    settings.setdefault("report_to", "none")
    try:
        return TernaryDistillationArguments(output_dir=str(output_dir), **settings)
    except TriternError:
        raise
    except (TypeError, ValueError) as error:
        raise TriternError(f"settings: {error}") from error


def _checkpoint(folder: Path, resume: bool | str | Path) -> str | None:
    if isinstance(resume, (str, Path)):
        return str(state_file(resume).parent)
    if not isinstance(resume, bool):
        raise TriternError(f"resume must be True, False or the folder of a checkpoint; received {resume!r}")
    found = [f for f in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if f.name.rpartition("-")[2].isdigit()]
    found.sort(key=lambda f: int(f.name.rpartition("-")[2]))
    whole = [f for f in found if (f / TRAINER_STATE_NAME).is_file()]  # that file is written last
    last = str(whole[-1]) if whole else None
    if found[-1:] != whole[-1:]:
        logger.warning("%s is incomplete (its run was interrupted while saving): left out", found[-1])
    if resume and last is None:
        logger.warning("no checkpoint in %s yet: starting from the beginning", folder)
    if last is not None and not resume:
        raise TriternError(
            f"{folder} already holds checkpoints of a run ({Path(last).name}); go on with resume=True or "
            "name another folder"
        )
    return last
