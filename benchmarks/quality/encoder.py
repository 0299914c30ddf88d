"""Vectors of a model, kept from run to run."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tritern.engine.encoder import attach


class Encoder:
    """The vectors of a model. A text is encoded once; with a cache folder, once for all runs.

    Stands for the model in ``tritern.evaluate``.

    Attributes:
        from_cache: number of texts whose vectors an earlier run had left in the cache folder.
    """

    def __init__(self, model: Any, batch_size: int = 64, cache: Path | None = None) -> None:
        attach(model)  # tritern's engine embeds originals, too
        self.model, self.batch_size, self.cache = model, batch_size, cache
        self.from_cache = 0
        self._known: dict[str, dict[str, np.ndarray]] = {"": {}, "query": {}, "document": {}}
        self._model_key = _fingerprint(model) if cache else ""

    def encode(self, texts: Sequence[str], kind: str = "", **_: Any) -> np.ndarray:
        """Vectors [len(texts), width], float32; ``kind`` is "", "query" or "document" and selects the
        model's prompt.
        """
        known = self._known[kind]
        if any(t not in known for t in texts):
            unique = list(dict.fromkeys(texts))
            known.update(zip(unique, self._load_or_compute(unique, kind)))
        return np.stack([known[t] for t in texts])

    def _load_or_compute(self, texts: list[str], kind: str) -> np.ndarray:
        file = None
        if self.cache:
            key = json.dumps([self._model_key, kind, texts])
            file = self.cache / f"{hashlib.sha256(key.encode()).hexdigest()}.npy"
            if file.exists():
                self.from_cache += len(texts)
                return np.load(file)
        encode = getattr(self.model, f"encode_{kind}" if kind else "encode")
        vectors = encode(texts, batch_size=self.batch_size, show_progress_bar=sys.stderr.isatty())
        vectors = np.asarray(vectors, dtype=np.float32)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial_file = file.with_suffix(".partial")
            with partial_file.open("wb") as out:
                np.save(out, vectors)
            os.replace(partial_file, file)
        return vectors


def _fingerprint(model: Any) -> str:
    """What a model's vectors depend on: weights, modules, settings, device and versions."""
    import sentence_transformers
    import torch

    import tritern
    from tritern.checkpoint.digest import digest

    bits = [m.activation_bits for m in model.modules() if isinstance(m, tritern.TernaryLinear)]
    settings = [repr(model), bits, model.max_seq_length, model.prompts, str(model.device.type)]
    versions = [torch.__version__, sentence_transformers.__version__, tritern.__version__]
    return json.dumps([digest(model.state_dict().items()), *settings, *versions])
