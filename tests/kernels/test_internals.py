"""Interfaces of torch and Triton that are not public: as known, and what is done where they are not."""

from functools import wraps
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from tritern_kernels import internals, launch
from tritern_kernels.internals import LAUNCHER, launches_directly, recorded


@pytest.fixture(autouse=True)
def said_anew():
    internals.changed.cache_clear()
    yield
    internals.changed.cache_clear()


def seen_by(transform):
    """What ``recorded`` says inside."""
    seen = []

    def function(x):
        seen.append(recorded())
        return x + 1

    transform(function)
    return seen


X = torch.ones(2, 3)


class Exported(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def counted(function):
    with FlopCounterMode(display=False):
        function(X)


RECORDED = {
    "torch.jit.trace": lambda f: torch.jit.trace(f, X, check_trace=False),
    "torch.export": lambda f: torch.export.export(Exported(f), (X,)),
    "make_fx": lambda f: make_fx(f)(X),
    "make_fx, symbolic": lambda f: make_fx(f, tracing_mode="symbolic")(X),
    "vmap": lambda f: torch.func.vmap(f)(X),
    "functionalize": lambda f: torch.func.functionalize(f)(X),
    "a dispatch mode": counted,
}


@pytest.mark.parametrize("name", RECORDED)
def test_what_records_operators_is_noticed(name):
    assert seen_by(RECORDED[name]) == [True]


def test_torch_compile_is_noticed():
    def function(x):
        return x + 1 if recorded() else x + 2

    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(X), X + 1)


def test_plain_calls_are_not_recorded():
    def under_a_device(function):
        with torch.device("cpu"), torch.inference_mode():
            function(X)

    assert seen_by(lambda f: f(X)) == seen_by(under_a_device) == [False]


@pytest.mark.parametrize("name", ["_len_torch_dispatch_stack", "_functorch"])
def test_without_torchs_internals_everything_counts_as_recorded(name, monkeypatch):
    monkeypatch.delattr(torch._C, name)
    with pytest.warns(UserWarning, match="torch's stack of dispatch modes is not as tritern knows") as warned:
        assert recorded() and recorded()
    assert len(warned) == 1


class Compiled:
    """A kernel as Triton compiles it, with a launcher."""

    function, packed_metadata = 1, ()

    def __init__(self, run):
        self.run = run


def of_3_4(gridX, gridY, gridZ, stream, function, *args): ...
def of_3_9(
    gridX, gridY, gridZ, stream, function, kernel_metadata, launch_metadata, launch_enter_hook,
    launch_exit_hook, *args,
): ...  # fmt: skip
def swapped(gridX, gridY, gridZ, function, stream, *args): ...
def shorter(gridX, gridY, gridZ, stream, *args): ...
def longer(
    gridX, gridY, gridZ, stream, function, kernel_metadata, launch_metadata, launch_enter_hook,
    launch_exit_hook, cluster, *args,
): ...  # fmt: skip
def named(gridX, gridY, gridZ, stream, function, *args, cluster): ...
def no_arguments(gridX, gridY, gridZ, stream, function): ...


def test_the_installed_tritons_launcher_is_known():
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    names = list(signature(driver.CudaLauncher.__call__).parameters)[1:-1]
    assert len(names) >= 5 and tuple(names) == LAUNCHER[: len(names)]


def without(name):
    kernel = type("Kernel", (), {"function": 1, "packed_metadata": (), "run": staticmethod(of_3_9)})
    delattr(kernel, name)
    return kernel()


def test_launchers(recwarn):
    assert launches_directly(Compiled(of_3_4)) and launches_directly(Compiled(of_3_9))
    assert not recwarn
    unknown = [Compiled(run) for run in (swapped, shorter, longer, named, no_arguments, None)]
    for kernel in (*unknown, *map(without, ("function", "packed_metadata", "run")), object()):
        assert not launches_directly(kernel)
    assert len(recwarn) == 1
    assert "Triton's launcher of compiled kernels is not as tritern knows it" in str(recwarn[0].message)


@pytest.mark.parametrize(("launcher", "direct"), [(of_3_9, True), (swapped, False)])
@pytest.mark.filterwarnings("ignore:Triton's launcher")
def test_only_known_launchers_are_called(launcher, direct, monkeypatch):
    """Others: Triton launches, with tensors, at every call."""
    by_triton, by_us = [], []

    @wraps(launcher)
    def launched(*arguments):
        by_us.append(arguments)

    class Kernel:
        params = [SimpleNamespace(do_not_specialize=name == "M") for name in ("x_ptr", "M", "N")]

        def __getitem__(self, grid):
            return lambda *arguments, **options: by_triton.append(arguments) or Compiled(launched)

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "overlaps", lambda device: False)
    monkeypatch.setattr(launch, "current_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel = Kernel()
    for M in (2, 2, 3):
        launch.launch(kernel, (1, 1), (X, M, 5), (64,), 4)
    assert (len(by_triton), len(by_us)) == ((1, 2) if direct else (3, 0))
    assert by_triton[0] == (X, 2, 5, 64, False)
    if direct:
        assert by_us[-1][-5:] == (X, 3, 5, 64, False)  # another number of tokens, the same compiled kernel
    launch.launch(kernel, (1, 1), (X, 3, 6), (64,), 4)  # another size
    assert len(by_triton) == (2 if direct else 4)


def test_where_triton_does_not_tell_of_profilers_it_launches(monkeypatch):
    assert not launch.hooked()
    monkeypatch.setattr(launch, "knobs", None)
    with pytest.warns(UserWarning, match=r"triton\.knobs\.runtime is not as tritern knows it") as warned:
        assert launch.hooked() and launch.hooked()
    assert len(warned) == 1


def test_the_stream_has_a_public_name(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", None, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: type("Stream", (), {"cuda_stream": 7 + d}))
    assert launch.current_stream(1) == 8
