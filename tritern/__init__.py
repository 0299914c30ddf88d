"""tritern: ternary sentence-embedding models. ``tritern.patch(model)`` and use the model as before."""

from importlib.metadata import PackageNotFoundError, version

from tritern_kernels import PackedTernary

from .config import TernaryConfig
from .errors import CheckpointError, TriternError
from .evaluate import Fidelity, evaluate
from .linear import TernaryLinear
from .patch import patch
from .summary import Summary, summary

try:
    __version__ = version("tritern")
except PackageNotFoundError:  # used from a checkout that is not installed
    __version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Fidelity",
    "PackedTernary",
    "Summary",
    "TernaryConfig",
    "TernaryLinear",
    "TriternError",
    "evaluate",
    "patch",
    "summary",
]
