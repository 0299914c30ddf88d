"""Self-taught distillation: raw text in, a ternary model close to its teacher out (``tritern.distill``).

Needs the ``train`` extra: ``pip install tritern[train]``.
"""

try:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
except ImportError as error:
    raise ImportError(f"{error}: distillation needs more packages: pip install 'tritern[train]'") from error

from ..texts.files import read_texts
from .arguments import TernaryDistillationArguments
from .fidelity import FidelityEvaluator
from .job import distill
from .layers import TrainableTernaryLinear
from .trainer import TernaryDistiller

__all__ = [
    "FidelityEvaluator",
    "TernaryDistillationArguments",
    "TernaryDistiller",
    "TrainableTernaryLinear",
    "distill",
    "read_texts",
]
