"""The libraries that multiply on a CPU, held to fewer instruction sets than the processor has."""

from __future__ import annotations

import torch

ENVIRONMENT: dict[str, dict[str, str]] = {
    "native": {},
    "AVX512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX512"},
    "AVX2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
"""Environment variables of a process in which oneDNN, FBGEMM, MKL and torch use no more than that: all the
processor has; no VNNI and no AMX; AVX2 alone.
"""


def hold_to(name: str) -> None:
    """Hold this process, started with that environment, to an instruction set.

    Without VNNI torch multiplies int8 in a plain loop. It asks the processor for that, no variable, so that
    here the product is replaced by torch's plain loop for int32.
    """
    if name != "native":
        torch.ops.aten._int_mm = lambda x, y: torch.mm(x.int(), y.int())  # pyright: ignore
