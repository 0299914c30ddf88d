"""Launching a Triton kernel with little work on the host.

Triton looks at every argument at every call to find the compiled kernel. Here that is found by a short key,
and the compiled kernel is launched directly: by Triton's own way where its launcher is not as known.
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


@cache
def overlaps(device: int | None) -> bool:
    """Whether kernels on this GPU may start while the one before ends (programmatic dependent launch)."""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


def hooked() -> bool:
    """Whether somebody, such as a profiler, asked Triton to be told of launches, or Triton does not say."""
    try:
        hook = knobs.runtime.launch_enter_hook
    except AttributeError:
        changed("triton.knobs.runtime", "Triton looks up every launch, which takes longer")
        return True
    return hook is not None and bool(getattr(hook, "calls", True))


def current_stream(device: int) -> int:
    """The current stream of a device, as the driver names it."""
    quick = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return quick(device) if quick else torch.cuda.current_stream(device).cuda_stream


def compile_and_run(
    kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], constants: tuple[Any, ...],
    num_warps: int, num_stages: int = 3,
) -> Any:  # fmt: skip
    """Run ``kernel[grid](*arguments, *constants, PDL)`` on the current device and stream by Triton's own
    way; the compiled kernel, if ``run`` can launch it.
    """
    if INTERPRETED:
        kernel[grid](*arguments, *constants, False)
        return None
    pdl = overlaps(torch.cuda.current_device())
    options = {"launch_pdl": True} if pdl else {}
    compiled = kernel[grid](
        *arguments, *constants, pdl, num_warps=num_warps, num_stages=num_stages, **options
    )
    return compiled if launches_directly(compiled) else None


def run(compiled: Any, grid: tuple[int, int], stream: int, arguments: tuple[Any, ...]) -> None:
    """Run a compiled kernel; all arguments in order, constants and the last one, PDL, too. Pointers may be
    integers.
    """
    compiled.run(
        grid[0], grid[1], 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments
    )  # fmt: skip


class Launch:
    """A kernel of which everything is decided but its pointers, the number of tokens and the grid.

    ``sizes`` are its integers after the number of tokens, ``constants`` its compile-time arguments but the
    last.
    """

    def __init__(
        self, kernel: Any, sizes: tuple[Any, ...], constants: tuple[Any, ...], device: torch.device,
        num_warps: int = 4, num_stages: int = 3,
    ) -> None:  # fmt: skip
        self.kernel, self.sizes, self.constants = kernel, sizes, constants
        self.num_warps, self.num_stages = num_warps, num_stages
        self.tail = (*sizes, *constants, overlaps(device.index))
        self.compiled: Any = None

    def __call__(self, grid: tuple[int, int], stream: int, M: int, pointers: tuple[Any, ...]) -> None:
        """Launch. Once ``compiled`` is there, calls take addresses too, of memory aligned as the first
        call's tensors.
        """
        if self.compiled is not None:
            run(self.compiled, grid, stream, (*pointers, M, *self.tail))
            return
        self.compiled = compile_and_run(
            self.kernel, grid, (*pointers, M, *self.sizes), self.constants, self.num_warps, self.num_stages
        )


def launch(
    kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], constants: tuple[Any, ...],
    num_warps: int, num_stages: int = 3,
) -> None:  # fmt: skip
    """``compile_and_run`` that finds the compiled kernel by a short key.

    Arguments are tensors and integers. Of the integers only the first, the number of tokens, may differ
    between calls that are otherwise alike: the kernel must not be specialized for it.
    """
    if INTERPRETED:
        compile_and_run(kernel, grid, arguments, constants, num_warps, num_stages)
        return
    device = torch.cuda.current_device()
    key: list[Any] = [id(kernel), device, num_warps, num_stages, constants]
    aligned = 0
    tokens = True
    for a in arguments:
        if isinstance(a, Tensor):
            key.append(a.dtype)
            aligned |= a.data_ptr()
        else:
            if not tokens:
                key.append(a)
            tokens = False
    found = None if aligned % 16 else _compiled.get(tuple(key))
    if found is not None and not hooked():
        run(found, grid, current_stream(device), (*arguments, *constants, overlaps(device)))
        return
    found = compile_and_run(kernel, grid, arguments, constants, num_warps, num_stages)
    if aligned % 16 == 0:
        _compiled[tuple(key)] = found
