"""Private parts of torch and Triton that tritern uses, and its behaviour if they change."""

from __future__ import annotations

import warnings
from functools import cache
from inspect import Parameter, signature
from typing import Any

import torch

_torch: Any = torch._C
LAUNCHER = (
    "gridX", "gridY", "gridZ", "stream", "function",
    "kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook",
)  # fmt: skip
"""Arguments of Triton's launcher before the kernel's own, by position. Up to Triton 3.6 the last four have no
names.
"""


@cache
def changed(what: str, instead: str) -> None:
    """Warn once that another package has changed a private part.

    Warns:
        UserWarning: names the change and the behaviour instead.
    """
    warnings.warn(f"{what} is not as tritern knows it: {instead}. Upgrade tritern.", stacklevel=3)


def recorded() -> bool:
    """Whether a recorder or transform is active: torch.compile, torch.export, torch.jit.trace (also in the
    older ONNX export), make_fx, torch.func. These see operators, but no raw launches.
    """
    try:
        return (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
            or _torch._len_torch_dispatch_stack() > 0
            or _torch._functorch.peek_interpreter_stack() is not None
        )
    except AttributeError:
        changed("torch's stack of dispatch modes", "every product goes through torch's dispatcher")
        return True


def launches_directly(compiled: Any) -> bool:
    """Whether a compiled kernel's ``run`` is Triton's launcher, which takes ``LAUNCHER`` and the kernel's
    arguments.
    """
    try:
        known = compiled.function is not None and hasattr(compiled, "packed_metadata")
        *first, last = signature(compiled.run).parameters.values()
        names = tuple(p.name for p in first if p.kind is Parameter.POSITIONAL_OR_KEYWORD)
        known = known and len(names) == len(first) >= 5 and names == LAUNCHER[: len(names)]
        known = known and last.kind is Parameter.VAR_POSITIONAL
    except (AttributeError, TypeError, ValueError):
        known = False
    if not known:
        changed("Triton's launcher of compiled kernels", "Triton looks up every launch, which takes longer")
    return known
