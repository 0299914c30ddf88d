"""Launch a Triton kernel with little work on the host.

Triton looks at every argument in every call to find the compiled kernel. ``launch`` finds it by a short key
and launches it directly. If Triton's launcher has changed, Triton launches.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .internals import changed, launches_directly

try:
    from triton import knobs

    INTERPRETED = bool(knobs.runtime.interpret)
except (ImportError, AttributeError):
    knobs: Any = None
    INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ASM = not INTERPRETED  # inline assembly does not run in the interpreter

_compiled: dict[tuple[Any, ...], Any] = {}
"""The one cache: compiled kernels by kernel, device, compile-time arguments, dtypes and sizes."""


@cache
def overlaps(device: int | None) -> bool:
    """Whether a kernel on this GPU may start before the last one ends (programmatic dependent launch)."""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


def hooked() -> bool:
    """Whether Triton has launch hooks, such as a profiler's; True if unknown."""
    try:
        hook = knobs.runtime.launch_enter_hook
    except AttributeError:
        changed("triton.knobs.runtime", "Triton looks up every launch, which takes longer")
        return True
    return hook is not None and bool(getattr(hook, "calls", True))


def current_stream(device: int) -> int:
    """The driver's handle of a device's current stream."""
    quick = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return quick(device) if quick else torch.cuda.current_stream(device).cuda_stream


def launch(
    kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], constants: tuple[Any, ...],
    num_warps: int, num_stages: int = 3,
) -> None:  # fmt: skip
    """Run ``kernel[grid](*arguments, *constants, PDL)`` on the current device and stream.

    Arguments are tensors, integers and floats. Some integers, such as the number of tokens, do not affect the
    compiled kernel. They may change between calls without another search for it.
    """
    if INTERPRETED:
        kernel[grid](*arguments, *constants, False)
        return
    device = torch.cuda.current_device()
    open_places = _not_specialized(kernel)
    key: list[Any] = [id(kernel), device, num_warps, num_stages, constants]
    aligned = 0
    for place, a in enumerate(arguments):
        if isinstance(a, Tensor):
            key.append(a.dtype)
            aligned |= a.data_ptr()
        elif place not in open_places:
            key.append(a)
    found = None if aligned % 16 else _compiled.get(tuple(key))
    if found is not None and not hooked():
        found.run(
            grid[0], grid[1], 1, current_stream(device),
            found.function, found.packed_metadata, None, None, None, *arguments, *constants, overlaps(device),
        )  # fmt: skip
        return
    pdl = overlaps(device)
    options = {"launch_pdl": True} if pdl else {}
    found = kernel[grid](*arguments, *constants, pdl, num_warps=num_warps, num_stages=num_stages, **options)
    if aligned % 16 == 0 and launches_directly(found):
        _compiled[tuple(key)] = found


@cache
def _not_specialized(kernel: Any) -> frozenset[int]:
    """Positions of the arguments whose values do not affect the compiled kernel."""
    parameters = getattr(kernel, "params", ())
    return frozenset(i for i, p in enumerate(parameters) if getattr(p, "do_not_specialize", False))
