"""The library on devices without kernels: refused, or the CPU where nobody asked for another."""

import pytest
import sentence_transformers.util
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tritern
from tritern.pretrained import device_with_kernels
from tritern_kernels import devices

NAME = "minilm-l6-ternary"


@pytest.fixture
def no_gpus(monkeypatch):
    devices.unsupported.cache_clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    yield
    devices.unsupported.cache_clear()


def test_load_refuses_a_device_without_kernels(no_gpus):
    with pytest.raises(tritern.TriternError, match=r"device='mps': cannot compute on mps: .*device='cpu'"):
        tritern.load(NAME, device="mps")
    with pytest.raises(tritern.TriternError, match="device='cuda': .*sees 0 CUDA GPUs here"):
        tritern.load(NAME, device="cuda")
    for device in ("gpu", "", True, ["cpu"]):
        with pytest.raises(tritern.TriternError, match="device must be 'cpu', 'cuda'.*; received"):
            tritern.load(NAME, device=device)


def test_load_takes_the_cpu_where_sentence_transformers_would_take_mps(monkeypatch):
    monkeypatch.setattr(sentence_transformers.util, "get_device_name", lambda: "mps")
    with pytest.warns(UserWarning, match="on the CPU, not on mps: there are no kernels for 'mps' devices"):
        model = tritern.load(NAME)
    assert model.device.type == "cpu" and model.encode("a text").shape == (384,)
    monkeypatch.setattr(sentence_transformers.util, "get_device_name", lambda: "cpu")
    assert device_with_kernels(None) is None and device_with_kernels("cpu") == "cpu"


def test_patch_refuses_a_device_without_kernels_before_it_changes_anything():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with FakeTensorMode():
        model[1].weight = torch.nn.Parameter(torch.empty(8, 8, device="mps"))
    with pytest.raises(tritern.TriternError, match=r"1\.weight: cannot compute on mps:0: there are no"):
        tritern.patch(model)
    assert type(model[0]) is type(model[1]) is torch.nn.Linear
