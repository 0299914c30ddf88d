"""Resuming a run: the latent weights of a checkpoint, and a check that the run is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError, TriternError
from .arguments import TernaryDistillationArguments

STATE_FILE = "training_state.safetensors"
"""Latent weights and scales of a checkpoint, beside its packed model."""

_INHERITED = (
    "max_steps",
    "seed",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
)
"""Settings of the parent that change a run's numbers."""

_FREE = ("logging_steps", "cpu_bf16", "per_device_train_batch_size")
"""Own settings that may differ on resuming. Texts per batch are compared for all processes together."""


def settings_of_run(args: TernaryDistillationArguments) -> dict[str, Any]:
    """The settings that change a run's numbers, by name."""
    own = set(vars(TernaryDistillationArguments)["__annotations__"]).difference(_FREE)
    return {name: getattr(args, name) for name in [*sorted(own), *_INHERITED]}


def texts_digest(data: Any, label_columns: Iterable[str]) -> str:
    """A digest of a data set: of all its texts and 64 of its labels."""
    digest, labels = hashlib.sha256(), set(label_columns)
    if hasattr(data, "column_names") and hasattr(data, "__len__"):
        for column in data.column_names:
            some = data.select(range(0, len(data), len(data) // 64 + 1)) if column in labels else data
            digest.update("\0".join(map(str, some[column])).encode())
    return digest.hexdigest()[:12]


def weights_digest(model: nn.Module | None) -> str:
    """A digest of the first values of every parameter."""
    digest = hashlib.sha256()
    for parameter in () if model is None else model.parameters():
        digest.update(parameter.detach().flatten()[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def check_same_run(checkpoint: str, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume a run with other settings, texts or teacher.

    Raises:
        TriternError: names each difference.
    """
    if other := [name for name in now if now[name] != was.get(name)]:
        raise TriternError(
            f"{checkpoint} belongs to a run with other "
            + ", ".join(f"{n} ({was.get(n)}, now {now[n]})" for n in other)
            + ": resume with the settings of that run, or start a new run in another folder"
        )


def state_file(checkpoint: str | Path) -> Path:
    """The file of the latent weights.

    Raises:
        CheckpointError: it does not exist.
    """
    file = Path(checkpoint) / STATE_FILE
    if not file.exists():
        raise CheckpointError(
            f"{checkpoint} has no {STATE_FILE}: it is not a checkpoint of a distillation run "
            "(tritern.distill with teacher= trains a ternary model further)"
        )
    return file
