"""The devices with kernels, and the errors for all others."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .config import OLDEST_CAPABILITY

SUPPORTED = (
    "ternary layers run on a CPU and, with Triton, on NVIDIA GPUs of compute capability "
    f"{OLDEST_CAPABILITY // 10}.{OLDEST_CAPABILITY % 10} (Ampere) or newer"
)
GO_ON = (
    "Keep the model on the CPU: SentenceTransformer(..., device='cpu'), model.to('cpu'), or use_cpu=True "
    "where a trainer chooses the device"
)


@cache
def unsupported(device: torch.device) -> str | None:
    """Why no kernel runs on a device, or None. This alone decides which devices are supported.

    The meta device counts as supported: operators give shapes there.
    """
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return f"there are no kernels for {device.type!r} devices"
    if torch.version.hip:
        return "this torch is built for ROCm (AMD GPUs), and the kernels are NVIDIA's"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA GPUs here"
    if find_spec("triton") is None:
        return "Triton is not installed (it compiles the kernels for GPUs)"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}"
    return None


def check_device(device: torch.device) -> None:
    """Refuse a device without kernels.

    Raises:
        ValueError: the error names the device, the supported devices and a way out.
    """
    if why := unsupported(device):
        raise ValueError(f"cannot compute on {device}: {why}; {SUPPORTED}. {GO_ON}.")


def refuse(*arguments: object) -> None:
    """The operators' implementation for tensors without a kernel: on other devices, or not dense.

    Raises:
        ValueError: as ``check_device``.
    """
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    for tensor in tensors:
        check_device(tensor.device)
    kinds = ", ".join(str(t.layout).removeprefix("torch.") for t in tensors)
    raise ValueError(f"tensors must be dense (strided); received {kinds}: call .to_dense() on them")
