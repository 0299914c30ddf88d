"""tritern: ternary sentence-embedding models. ``tritern.patch(model)`` and use the model as before."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tritern_kernels import PackedWeight

from .config import TernaryConfig
from .engine.fused import fuse
from .engine.warmup import warmup
from .errors import CheckpointError, TriternError
from .evaluate import Fidelity, evaluate
from .formats.dequantize import dequantize
from .nn.embedding import Int4Embedding, Int8Embedding
from .nn.linear import Int4Linear, TernaryLinear
from .patch import patch
from .pretrained import load
from .summary import Summary, summary
from .version import __version__

if TYPE_CHECKING:
    from .distillation import distill

__all__ = [
    "__version__",
    "CheckpointError",
    "Fidelity",
    "Int4Embedding",
    "Int4Linear",
    "Int8Embedding",
    "PackedWeight",
    "Summary",
    "TernaryConfig",
    "TernaryLinear",
    "TriternError",
    "dequantize",
    "distill",
    "evaluate",
    "fuse",
    "load",
    "patch",
    "summary",
    "warmup",
]


_MOVED = {
    "export_gguf": "formats.gguf",
    "from_bitnet": "formats.bitnet",
    "lora": "adapters",
}
"""Functions that had a name here until version 0.1; the old names go with version 0.2."""


def __getattr__(name: str) -> Any:
    if name == "distill":  # imported when it is asked for: it needs the packages of the train extra
        from .distillation import distill

        return distill
    if name in _MOVED:
        home = f"{__name__}.{_MOVED[name]}"
        warnings.warn(
            f"tritern.{name} will be gone in version 0.2: write `from {home} import {name}`",
            FutureWarning,
            stacklevel=2,
        )
        return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
