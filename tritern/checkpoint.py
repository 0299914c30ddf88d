"""The digest that makes an altered checkpoint detectable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError

DIGEST_KEY = "tritern_sha256"
"""Name of the digest in the safetensors metadata."""


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, in order of their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def verify(files: Iterable[str | Path]) -> None:
    """Read a checkpoint's safetensors files and compare them with the digest written when it was saved.

    Raises:
        CheckpointError: a file cannot be read, carries no digest, or its content is not what was saved.
    """
    files = [Path(f) for f in files]
    expected: set[str | None] = set()
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.suffix != ".safetensors":
            raise CheckpointError(
                f"{file}: ternary models are read from safetensors files only; save the model again"
            )
        try:
            with safe_open(file, framework="pt") as content:
                expected.add((content.metadata() or {}).get(DIGEST_KEY))
                tensors.update((name, content.get_tensor(name)) for name in content.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}): it is truncated or damaged. Copy it again."
            ) from None
    where = files[0].parent if files else "the checkpoint"
    if expected == {None} or len(expected) != 1:
        raise CheckpointError(
            f"{where}: the weights carry no single digest ({DIGEST_KEY} in the safetensors metadata), so "
            "they were rewritten after saving. Save the model again with model.save_pretrained()."
        )
    if digest(tensors.items()) != expected.pop():
        raise CheckpointError(
            f"{where}: the weights are not those that were saved (sha256 differs). Copy them again."
        )
