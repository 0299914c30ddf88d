"""The planned calls, their second kind included: with pointers as integers, in the interpreter."""

import ctypes
from dataclasses import replace

import pytest
import torch

from tritern_kernels import launch, pack, plan, reference
from tritern_kernels.launch import INTERPRETED
from tritern_kernels.tuning import KernelConfig

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        not INTERPRETED, reason="imitates launches in the interpreter; GPU tests run the real ones"
    ),
]


def at(pointer, dtype):
    """A tensor of one element at an address: all that the interpreter needs of a pointer."""
    memory = (ctypes.c_char * dtype.itemsize).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype)


@pytest.fixture
def imitated(monkeypatch):
    launched = []

    def compile_and_run(kernel, grid, arguments, constants, num_warps, num_stages=3):
        kernel[grid](*arguments, *constants, False)
        return kernel, [a.dtype for a in arguments if isinstance(a, torch.Tensor)]

    def run(compiled, grid, stream, arguments):
        kernel, dtypes = compiled
        assert len(arguments) == len(kernel.arg_names)
        pointers = [at(p, dtype) for p, dtype in zip(arguments, dtypes)]
        kernel[grid](*pointers, *arguments[len(dtypes) :])
        launched.append(kernel)

    monkeypatch.setattr(launch, "compile_and_run", compile_and_run)
    monkeypatch.setattr(launch, "run", run)
    return launched


TILE = KernelConfig(16, 32, 128, num_stages=2)


@pytest.mark.parametrize(
    ("config", "bits", "launches"),
    [
        (TILE, 8, 2),
        (replace(TILE, split_k=3), 8, 2),
        (replace(TILE, share_k=True), 8, 2),
        (replace(TILE, share_k=True, quantizing=True), 8, 1),
        (TILE, 16, 1),
        (replace(TILE, share_k=True), 16, 1),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
def test_first_and_later_calls_give_the_product(config, bits, launches, bias, gelu, imitated):
    N, K = 70, 384
    codes, scale = torch.randint(-1, 2, (N, K), dtype=torch.int8), torch.rand(N)
    packed, bias = pack(codes), torch.randn(N).half() if bias else None
    half, cpu = torch.float16, torch.device("cpu")
    call = plan.Plan(config, bits, 32, N, K, K, half, bias is not None, gelu, cpu)
    for M in (17, 5, 32, 1):
        x = torch.randn(M, K).half()
        exact = reference.linear(x, codes, scale, bias, bits, gelu)
        y = call(x, packed, scale, bias)
        assert (y.double() - exact).abs().max() <= 4 * torch.finfo(torch.float16).eps * exact.abs().max()
    assert len(imitated) == 3 * launches  # the first call goes through Triton


def test_what_it_does_not_take(imitated):
    call = plan.Plan(
        TILE,
        8,
        16,
        70,
        128,
        128,
        torch.float16,
        False,
        False,
        torch.device("cpu"),
    )
    packed, scale = torch.zeros(70, 32, dtype=torch.uint8), torch.rand(70)
    assert call(torch.zeros(2, 129, dtype=torch.float16)[:, 1:], packed, scale, None) is None  # not aligned
    strided = torch.zeros(70, 64, dtype=torch.uint8)[:, :32]
    assert call(torch.zeros(2, 128, dtype=torch.float16), strided, scale, None) is None
    assert call(torch.zeros(2, 128, dtype=torch.float16), packed, scale, None) is not None
