"""tritern: ternary sentence-embedding models. ``tritern.patch(model)`` and use the model as before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tritern_kernels import PackedTernary

from .config import TernaryConfig
from .engine.fused import fuse
from .engine.warmup import warmup
from .errors import CheckpointError, TriternError
from .evaluate import Fidelity, evaluate
from .formats.bitnet import from_bitnet
from .formats.dequantize import dequantize
from .formats.gguf import export_gguf
from .nn.embedding import Int4Embedding, Int8Embedding
from .nn.linear import TernaryLinear
from .patch import patch
from .pretrained import load
from .summary import Summary, summary
from .version import __version__

if TYPE_CHECKING:
    from .adapters import lora
    from .distillation import distill

__all__ = [
    "__version__",
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
