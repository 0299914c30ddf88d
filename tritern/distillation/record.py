"""The record of a run, in a file of its own and as the model card."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, Field, asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

from ..summary import summary
from ..version import __version__
from .arguments import TernaryDistillationArguments
from .card import model_card
from .trainer import TernaryDistiller

RECORD_FILE = "distillation.json"
"""Name of the file with the run's inputs, its work and the model's closeness."""


def record_of(
    trainer: TernaryDistiller, teacher: Any, fidelity: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """The record of a run: its inputs, its work and the model's closeness.

    Args:
        trainer: after training.
        teacher: a model, vectors, or None for the model itself.
        fidelity: closeness, by stage.
        seconds: duration of the run.
    """
    args, size = trainer.args, summary(trainer.model)
    teacher_name = "the model itself" if teacher is None else "given vectors"
    cuda = args.device.type == "cuda"
    return {
        "model": name_of(trainer.model),
        "base_model": trainer.model.model_card_data.base_model,
        "teacher": name_of(teacher) if isinstance(teacher, SentenceTransformer) else teacher_name,
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
    # compare with the fields: a second arguments object would reset accelerate's state of the processes
    plain = {f.name: _default(f) for f in fields(SentenceTransformerTrainingArguments)}
    settings = {k: v for k, v in args.to_dict().items() if k not in _NOT_OF_THE_RUN}
    # unset fields may have become False or []
    return {k: v for k, v in settings.items() if k not in plain or (plain[k] != v and (plain[k] or v))}


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def name_of(model: SentenceTransformer) -> str:
    """A name for a model: its base model, its name on the hub, its folder or its class."""
    data, inner = model.model_card_data, getattr(model[0], "auto_model", None)
    path = getattr(inner, "name_or_path", None)
    return data.base_model or data.model_id or (Path(path).name if path else type(model[0]).__name__)


def save(model: SentenceTransformer, record: dict[str, Any], folder: Path) -> None:
    """Save the packed model with its model card and the record."""
    vars(model)["_model_card_text"] = model_card(record)
    model.model_card_data.tags = [t for t in model.model_card_data.tags if t != "generated_from_trainer"]
    model.save_pretrained(str(folder))
    (folder / RECORD_FILE).write_text(json.dumps(_finite(record), indent=1) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """The same value with None for NaN and infinity, because JSON has neither."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
