"""Devices without kernels: one answer, by whatever way they come to the operators. None of them is here, so
tensors are fake ones, which know their device and have no memory.
"""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tritern_kernels import cuda, devices, linear, ops, pack, ternarize_weight, training
from tritern_kernels.formats import PackedWeight

HOW = (
    "ternary layers run on a CPU and, with Triton, on NVIDIA GPUs of compute capability 8.0.*"
    r"SentenceTransformer\(..., device='cpu'\)"
)
OPERATORS = {
    "linear": lambda x, packed, scale: (x, packed, scale, None, 128, 8),
    "quantize_activations": lambda x, packed, scale: (x,),
    "dequantize": lambda x, packed, scale: (packed, scale, 128, torch.float32),
}


@pytest.fixture(autouse=True)
def asked_anew():
    devices.unsupported.cache_clear()
    yield
    devices.unsupported.cache_clear()


def tensors(device):
    with FakeTensorMode():
        return (
            torch.empty(2, 128, device=device),
            torch.empty(4, 32, dtype=torch.uint8, device=device),
            torch.empty(4, device=device),
        )


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("device", "key"), [("mps", "MPS"), ("xpu", "XPU")])
def test_the_operators_refuse_devices_without_kernels(device, key, operator):
    function = getattr(torch.ops.tritern, operator).default
    arguments = OPERATORS[operator](*tensors(device))
    what_that_device_runs = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    with pytest.raises(
        ValueError, match=f"on {device}:0: there are no kernels for '{device}' devices; {HOW}"
    ):
        function.redispatch(what_that_device_runs, *arguments)


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_device_is_left_to_torch(operator):
    """torch would name its own backends and builds; a device of somebody's own is a "PrivateUse1"."""
    for key in ("MPS", "XPU", "HPU", "PrivateUse1", "Vulkan", "SparseCPU"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"tritern::{operator}", key), key


def test_sparse_tensors_are_named():
    packed, scale = pack(torch.ones(4, 128, dtype=torch.int8)), torch.ones(4)
    with pytest.raises(ValueError, match=r"must be dense.*received sparse_coo, strided.*\.to_dense\(\)"):
        linear(torch.eye(128).to_sparse(), PackedWeight(packed, scale, (4, 128)))


def test_weights_are_ternarized_on_devices_with_kernels_only():
    x, _, scale = tensors("mps")
    with pytest.raises(ValueError, match=f"cannot compute on mps:0.*{HOW}"):
        ternarize_weight(x)
    with pytest.raises(ValueError, match=f"cannot compute on mps:0.*{HOW}.*use_cpu=True"):
        training.ternarize_given(x, scale)


def a_gpu(monkeypatch, capability=(8, 0), hip=None, triton=True, count=2):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(devices, "find_spec", lambda name: object() if triton else None)


@pytest.mark.parametrize(
    ("gpu", "why"),
    [
        ({"capability": (7, 5)}, "Tesla T4 has compute capability 7.5"),
        ({"hip": "6.3.42131"}, "this torch is built for ROCm"),
        ({"triton": False}, "Triton is not installed"),
        ({"count": 0}, f"torch {re.escape(torch.__version__)} sees 0 CUDA GPUs here"),
    ],
)
def test_gpus_without_kernels(monkeypatch, gpu, why):
    a_gpu(monkeypatch, **gpu)
    cuda._device.cache_clear()
    with pytest.raises(ValueError, match=f"cannot compute on cuda:0: {why}.*{HOW}"):
        cuda._device(0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    x, packed, scale = tensors("cuda")
    for call in (
        lambda: ops.linear_unchecked(x, packed, scale, None, 128, 8),
        lambda: ops._quantize_cuda(x),
        lambda: ops._dequantize_impl(packed, scale, 128, torch.float16),
        lambda: cuda.linear_int8(x, scale, packed, scale, None, 128, x.dtype),
        lambda: ternarize_weight(x),
        lambda: training.ternarize_given(x, scale),
    ):
        with pytest.raises(ValueError, match=why):
            call()


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 1)])
def test_gpus_with_kernels(monkeypatch, capability):
    a_gpu(monkeypatch, capability)
    for device in ("cuda:0", "cuda:1", "cpu", "meta"):
        devices.check_device(torch.device(device))
