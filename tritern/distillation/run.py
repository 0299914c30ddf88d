"""``tritern.distill``: one call from a model and texts to a ternary model on disk."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch
import transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import TernaryConfig
from ..errors import TriternError
from ..evaluate import Fidelity, evaluate
from ..pretrained import resolve
from ..reading import read_texts
from ..saving import is_ternary
from ..summary import summary
from .arguments import TernaryDistillationArguments
from .card import model_card
from .data import JOINED_RATIO, clean, joined, prefixed
from .trainer import TernaryDistiller

logger = logging.getLogger(__name__)

RECORD_FILE = "distillation.json"
"""What a run was given, what it did and how close the model came."""


class FidelityEvaluator(BaseEvaluator):
    """Closeness to the teacher on texts, for sentence-transformers' trainer: ``tritern.evaluate`` as an
    evaluator. Its primary metric is the top-10 overlap.

    Args:
        texts: at least 12, with their prompts, if any, before them.
        teacher: the teacher or its vectors.
        name: prefix of the metrics.
    """

    def __init__(
        self, texts: Sequence[str], teacher: SentenceTransformer | np.ndarray, name: str = "fidelity"
    ) -> None:
        super().__init__()
        self.texts, self.name = list(texts), name
        self.teacher = teacher if isinstance(teacher, np.ndarray) else teacher.encode(self.texts, prompt="")
        self.primary_metric = "overlap"
        self.latest: Fidelity | None = None

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Metrics ``{name}_cosine``, ``{name}_overlap`` and ``{name}_rank_correlation``."""
        self.latest = evaluate(model, self.teacher, self.texts, prompt="")
        values = {k: getattr(self.latest, k) for k in ("cosine", "overlap", "rank_correlation")}
        return self.prefix_name_to_metrics(values, self.name)


def distill(
    model: SentenceTransformer | str,
    texts: Iterable[str] | str | Path,
    output_dir: str | Path,
    *,
    teacher: SentenceTransformer | np.ndarray | None = None,
    config: TernaryConfig | None = None,
    column: str | None = None,
    limit: int | None = None,
    prefixes: Sequence[str] | None = None,
    holdout: int = 256,
    joined_ratio: float | None = None,
    evaluator: BaseEvaluator | None = None,
    callbacks: Sequence[Any] = (),
    resume: bool | str = False,
    **settings: Any,
) -> SentenceTransformer:
    """Train a ternary form of a model on raw texts to give the vectors of the original.

    The model is changed in place and returned, packed; ``output_dir`` receives it with a model card and
    ``distillation.json``, the record of the run.

    A model that is ternary already is trained on from where it is, to fit other texts: with its original as
    the teacher, no blend from full precision and two fifths of the learning rate, if not set.

    Args:
        model: a sentence-transformer, or its name or path.
        texts: strings, or a source for ``read_texts``. No labels are needed; take text like that to be
            embedded later. Repeated and very short ones are left out.
        output_dir: folder for the model and the checkpoints of the run.
        teacher: model with the same tokenizer, or the vectors of ``texts`` [len(texts), width]; by default
            the model itself, before training.
        config: what becomes ternary and how; by default ``TernaryConfig(embedding_bits=8)``. A ternary model
            stays as it is.
        column, limit: of ``read_texts``, where ``texts`` is a source.
        prefixes: put before the texts in turn; by default the model's own prompts, an empty one among them,
            and with teacher vectors none: pass those that the texts had when the vectors were made. Pass ()
            for none.
        holdout: texts kept out of training, to measure closeness on; 0: none.
        joined_ratio: share of the training texts made by joining several into a longer one; default 0.05, or
            0 with teacher vectors.
        evaluator: evaluates during training instead of closeness on the holdout (see ``eval_strategy``).
        callbacks: of transformers' Trainer, such as ``EarlyStoppingCallback``.
        resume: go on from the last checkpoint in ``output_dir``, or from the one named. The same arguments
            give the same numbers as a run without interruption.
        **settings: fields of ``TernaryDistillationArguments``, such as ``max_steps``,
            ``per_device_train_batch_size``, ``learning_rate``, ``save_steps``.

    Returns:
        The model.

    Raises:
        TriternError: an unsuitable model, texts or teacher; not enough memory; a loss that is not finite.
    """
    start = time.perf_counter()
    output_dir = Path(output_dir)
    model = SentenceTransformer(resolve(model)) if isinstance(model, str) else model
    if further := is_ternary(model):
        settings = {"blend_ratio": 0.0, **settings}
    else:
        config = config or TernaryConfig(embedding_bits=8)
    args = _arguments(output_dir, settings, evaluator)
    checkpoint = _checkpoint(output_dir, resume)
    source = str(texts) if isinstance(texts, (str, Path)) else "texts given to the call"
    if isinstance(texts, (str, Path)):
        texts = read_texts(texts, column=column, limit=limit)
    elif column is not None or limit is not None:
        raise TriternError("column and limit go with a file or data set; texts are given already")
    texts = list(texts)
    vectors = teacher if isinstance(teacher, np.ndarray) else None
    if prefixes is None and vectors is None:
        found = list(dict.fromkeys(prompt or "" for prompt in model.prompts.values()))
        prefixes = found if any(found) else []
    prefixes = list(prefixes or ())
    if joined_ratio is None:
        joined_ratio = 0.0 if vectors is not None else JOINED_RATIO
    if vectors is None:
        train, held = _split(texts, prefixes, holdout, joined_ratio, args)
        guide: Any = teacher or model
        held_vectors = guide.encode(held, prompt="", show_progress_bar=False) if held else None
    else:
        train, held = _split_with_vectors(texts, vectors, prefixes, holdout, joined_ratio)
        held_vectors = vectors[:holdout]
    if len(train) < (least := args.train_batch_size * args.world_size):
        raise TriternError(
            f"{len(train)} training texts are left after holdout ({holdout}) and joining, and a batch takes "
            f"{least}: lower per_device_train_batch_size, holdout or joined_ratio, or bring more"
        )
    closeness = FidelityEvaluator(held, held_vectors) if held and held_vectors is not None else None
    trainer = TernaryDistiller(
        model,
        args,
        train,
        teacher="labels" if vectors is not None else teacher,  # pyright: ignore[reportArgumentType]
        config=config,
        evaluator=evaluator or closeness,
        callbacks=list(callbacks),
    )
    fidelity: dict[str, Any] = {}

    def judge(stage: str) -> None:
        if closeness:
            closeness(model)
            fidelity[stage] = closeness.latest
            logger.info("%s: %s", stage, closeness.latest)

    judge("ternary, as given" if further else "ternary, not trained")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.pack()
    judge("ternary, distilled")
    record = _record(trainer, teacher, fidelity, time.perf_counter() - start)
    if further and isinstance(teacher, SentenceTransformer):  # a version of it, by way of another
        record["trained_on_from"], record["model"] = record["model"], _name(teacher)
        record["base_model"] = teacher.model_card_data.base_model or record["base_model"]
    record["data"] |= {"source": source, "column": column, "limit": limit, "holdout": holdout}
    record["data"] |= {"prefixes": prefixes, "joined_ratio": joined_ratio}
    record["resumed_from"] = Path(checkpoint).name if checkpoint else None
    if trainer.is_world_process_zero():
        vars(model)["_model_card_text"] = model_card(record)
        model.model_card_data.tags = [t for t in model.model_card_data.tags if t != "generated_from_trainer"]
        model.save_pretrained(str(output_dir))
        (output_dir / RECORD_FILE).write_text(json.dumps(_finite(record), indent=1) + "\n", encoding="utf-8")
    return model


def _arguments(
    output_dir: Path, settings: dict[str, Any], evaluator: BaseEvaluator | None
) -> TernaryDistillationArguments:
    unknown = set(settings) - {f.name for f in fields(TernaryDistillationArguments)}
    if unknown:
        raise TriternError(
            f"unknown settings: {', '.join(sorted(unknown))}; see "
            "tritern.distillation.TernaryDistillationArguments"
        )
    if "resume_from_checkpoint" in settings:
        raise TriternError("resume_from_checkpoint has no effect here: pass resume=True, or resume=PATH")
    settings.setdefault("eval_strategy", "no" if evaluator is None else "steps")
    settings.setdefault("report_to", "none")
    try:
        return TernaryDistillationArguments(output_dir=str(output_dir), **settings)
    except ValueError as error:
        raise TriternError(f"settings: {error}") from error


def _split(
    texts: list[str],
    prefixes: Sequence[str],
    holdout: int,
    joined_ratio: float,
    args: TernaryDistillationArguments,
) -> tuple[Dataset, list[str]]:
    """The training set and the texts held out of it."""
    _check_holdout(holdout)
    texts = clean(texts, holdout + args.train_batch_size * args.world_size)
    train = prefixed(joined(texts[holdout:], joined_ratio, args.seed), prefixes)
    return Dataset.from_dict({"text": train}), prefixed(texts[:holdout], prefixes)


def _split_with_vectors(
    texts: list[str], vectors: np.ndarray, prefixes: Sequence[str], holdout: int, joined_ratio: float
) -> tuple[Dataset, list[str]]:
    _check_holdout(holdout)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise TriternError(
            f"teacher vectors must have shape [{len(texts)}, width], one row per text; received "
            f"{list(vectors.shape)}"
        )
    if not np.isfinite(vectors).all():
        raise TriternError("teacher vectors hold NaN or infinity")
    if joined_ratio:
        raise TriternError("joined_ratio must be 0 with teacher vectors: joined texts have none")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings; number {i} is {type(text).__name__}")
        if not text.strip():
            raise TriternError(f"texts: number {i} is empty; remove it and its teacher vector")
    texts = prefixed(texts, prefixes)
    train = {"text": texts[holdout:], "label": list(vectors[holdout:].astype(np.float32))}
    return Dataset.from_dict(train), texts[:holdout]


def _check_holdout(holdout: int) -> None:
    if holdout and holdout < 12:
        raise TriternError(f"holdout must be 0 or at least 12; received {holdout}")


def _checkpoint(folder: Path, resume: bool | str) -> str | None:
    if isinstance(resume, str):
        return resume
    found = [f for f in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if f.name.rpartition("-")[2].isdigit()]
    found.sort(key=lambda f: int(f.name.rpartition("-")[2]))
    whole = [f for f in found if (f / TRAINER_STATE_NAME).is_file()]  # which is written last
    last = str(whole[-1]) if whole else None
    if found[-1:] != whole[-1:]:
        logger.warning("%s is incomplete, its run was interrupted while saving: left out", found[-1])
    if resume and last is None:
        logger.warning("no checkpoint in %s yet: starting from the beginning", folder)
    if last is not None and not resume:
        raise TriternError(
            f"{folder} already holds checkpoints of a run ({Path(last).name}); go on with resume=True or "
            "name another folder"
        )
    return last


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have: None instead."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(
    trainer: TernaryDistiller, teacher: Any, fidelity: dict[str, Any], seconds: float
) -> dict[str, Any]:
    from .. import __version__

    args, size = trainer.args, summary(trainer.model)
    teacher_name = "the model itself" if teacher is None else "given vectors"
    cuda = args.device.type == "cuda"
    return {
        "model": _name(trainer.model),
        "base_model": trainer.model.model_card_data.base_model,
        "teacher": _name(teacher) if isinstance(teacher, SentenceTransformer) else teacher_name,
        "config": asdict(trainer.ternary_config),
        "data": {"texts": len(trainer.train_dataset)},  # pyright: ignore[reportArgumentType]
        "settings": _changed(args),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "layers": len(size.layers),
        "bits_per_weight": round(size.bits_per_weight, 3),
        "bytes": {"in full precision": size.model_bytes_before, "ternary": size.model_bytes_after},
        "fidelity": {stage: asdict(f) for stage, f in fidelity.items()},
        "device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sentence_transformers": sentence_transformers.__version__,
            "tritern": __version__,
        },
        "date": datetime.now(timezone.utc).date().isoformat(),
        "log": trainer.state.log_history,
    }


_NOT_OF_THE_RUN = (
    *("output_dir", "logging_dir", "prompts", "router_mapping", "learning_rate_mapping", "report_to"),
    *("accelerator_config", "disable_tqdm", "hub_token", "prediction_loss_only"),
)


def _changed(args: TernaryDistillationArguments) -> dict[str, Any]:
    """Settings that are not transformers' own defaults, as plain values."""
    # the fields are asked: making another set of arguments would reset accelerate's state of the processes
    plain = {f.name: _default(f) for f in fields(SentenceTransformerTrainingArguments)}
    settings = {k: v for k, v in args.to_dict().items() if k not in _NOT_OF_THE_RUN}
    # what is not set may have become False or [] in the making
    return {k: v for k, v in settings.items() if k not in plain or (plain[k] != v and (plain[k] or v))}


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _name(model: SentenceTransformer) -> str:
    data, inner = model.model_card_data, getattr(model[0], "auto_model", None)
    path = getattr(inner, "name_or_path", None)
    return data.base_model or data.model_id or (Path(path).name if path else type(model[0]).__name__)
