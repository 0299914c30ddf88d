"""tritern: ternary sentence-embedding models. ``tritern.patch(model)`` and use the model as before."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from tritern_kernels import PackedTernary

from .bitnet import from_bitnet
from .config import TernaryConfig
from .embedding import Int4Embedding, Int8Embedding
from .errors import CheckpointError, TriternError
from .evaluate import Fidelity, evaluate
from .export import dequantize
from .fused import fuse
from .gguf import export_gguf
from .linear import TernaryLinear
from .patch import patch
from .pretrained import load
from .summary import Summary, summary
from .warmup import warmup

if TYPE_CHECKING:
    from .adapters import lora
    from .distillation import distill

try:
    __version__ = version("tritern")
except PackageNotFoundError:  # used from a checkout that is not installed
    __version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Fidelity",
    "Int4Embedding",
    "Int8Embedding",
    "PackedTernary",
    "Summary",
    "TernaryConfig",
    "TernaryLinear",
    "TriternError",
    "dequantize",
    "distill",
    "evaluate",
    "export_gguf",
    "from_bitnet",
    "fuse",
    "load",
    "lora",
    "patch",
    "summary",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name == "distill":  # loaded when asked for: it needs the packages of the train extra
        from .distillation import distill

        return distill
    if name == "lora":  # needs peft
        from .adapters import lora

        return lora
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
