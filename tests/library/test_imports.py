"""What imports what, and that importing tritern disturbs nobody."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .forks import run_script

ROOT = Path(__file__).parents[2]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_kernels_import_torch_triton_and_the_standard_library_only():
    files = list((ROOT / "kernels").rglob("*.py"))
    assert len(files) >= 8
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for file in files:
        assert {name.split(".")[0] for name in imports(file)} <= allowed, file


def test_the_library_imports_no_trainer_and_no_faiss():
    for file in (ROOT / "tritern").rglob("*.py"):
        names = set(imports(file))
        assert not {n for n in names if n.split(".")[0] in ("examples", "benchmarks", "tests")}, file
        if not {"distillation", "search"} & set(file.parts):
            assert not {n for n in names if "faiss" in n or "trainer" in n.lower()}, file


def _modules():
    """The file of every module of the three packages, by the module's name."""
    found = {}
    for folder in (ROOT / "tritern", ROOT / "tritern_cli", ROOT / "kernels" / "tritern_kernels"):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = _modules()


def _for_type_checkers(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _statements(node):
    """The import statements below a node, also inside functions, but not those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif _for_type_checkers(child):
            for other in child.orelse:
                yield from _statements(ast.Module([other], []))
        else:
            yield from _statements(child)


def imported_by(name, source, modules, package):
    """Absolute names of the modules that the module of this name and source imports at any time.

    ``from a import b`` imports the module ``a.b`` where there is one, and otherwise ``a``.
    """
    parents = name.split(".") if package else name.split(".")[:-1]
    found = set()
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = [*parents[: len(parents) - node.level + 1]] if node.level else []
        base = ".".join([*base, node.module] if node.module else base)
        names = {f"{base}.{alias.name}" for alias in node.names}
        found |= {n if n in modules else base for n in names}
    return found


def circles(graph):
    """The sets of modules that reach each other."""
    reached = {name: set() for name in graph}
    for name in graph:
        waiting = [name]
        while waiting:
            new = graph.get(waiting.pop(), set()) - reached[name]
            reached[name] |= new
            waiting += new
    return {
        frozenset(n for n in graph if n in reached[m] and m in reached[n]) for m in graph if m in reached[m]
    }


GRAPH = {
    name: imported_by(name, file.read_text(), MODULES, file.name == "__init__.py")
    for name, file in MODULES.items()
}


def test_what_a_module_imports_is_read_from_its_source():
    """All kinds of import statements; those for type checkers are left out."""
    source = """
import os.path
from typing import TYPE_CHECKING
from . import b, absent
from .c import d
from ..e import f
if TYPE_CHECKING:
    from .g import h
else:
    import i
def late():
    try:
        from . import j
    except ImportError:
        import k
"""
    modules = {"p.q", "p.q.b", "p.q.c", "p.q.j", "p.e", "p.e.f"}
    expected = {"os.path", "typing", "p.q.b", "p.q", "p.q.c", "p.e.f", "i", "p.q.j", "k"}
    assert imported_by("p.q.a", source, modules, package=False) == expected
    assert imported_by("p.q", source, modules, package=True) == expected
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "os"}, "d": {"d"}}) == {
        frozenset("bc"), frozenset("d"),
    }  # fmt: skip


def test_no_modules_import_each_other_in_a_circle():
    """Neither directly nor over others, and not in functions either."""
    assert sum(len(names & MODULES.keys()) for names in GRAPH.values()) > 100
    assert not circles(GRAPH), [sorted(circle) for circle in circles(GRAPH)]


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("tritern", {"tritern_cli", "examples", "benchmarks", "tests"}),
        ("tritern_kernels", {"tritern", "tritern_cli", "examples", "benchmarks", "tests"}),
        ("tritern_cli", {"examples", "benchmarks", "tests"}),
    ],
)
def test_packages_import_only_those_below_them(package, never):
    beside = {p.stem for folder in ("examples", "benchmarks") for p in (ROOT / folder).glob("*.py")}
    checked = [name for name in GRAPH if name.split(".")[0] == package]
    assert len(checked) > 5
    for name in checked:
        found = {n.split(".")[0] for n in GRAPH[name]}
        assert not found & (never | beside), name


def test_the_kernels_folder_is_no_module():
    assert not list((ROOT / "kernels").glob("*.py"))


WORKS = """
import {first}, {second}
import sys, torch
import kernels
assert bool(getattr(kernels, "__file__", None)) == {installed}
from transformers import BertConfig, BertModel
model = BertModel(BertConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
assert tuple(tritern.patch(model)(torch.tensor([[1, 2]])).last_hidden_state.shape) == (1, 2, 16)
assert "faiss" not in sys.modules and "matplotlib" not in sys.modules
"""
KERNELS = Path(sys.prefix) / "optional"  # where `make setup` puts the PyPI package of that name


@pytest.mark.parametrize(
    ("order", "installed"), [(("transformers", "tritern"), False), (("tritern", "transformers"), True)]
)
def test_transformers_works_from_the_repository_root(order, installed):
    """The top-level folder ``kernels`` must not pass for the PyPI package of that name, present or not."""
    paths = [str(ROOT / "kernels")]
    if installed:
        if not (KERNELS / "kernels").exists():
            pytest.skip(f"pip install --no-deps --target {KERNELS} kernels")
        paths.append(str(KERNELS))
    code = WORKS.format(first=order[0], second=order[1], installed=installed)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


def test_import_is_quick_and_changes_no_global_state():
    """Quick in what it does, whatever else the machine does: modules and time of this process are counted."""
    code = """
import sys, time, torch, transformers, sentence_transformers
def state():
    return torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
before, modules = state(), set(sys.modules)
start = time.process_time()
import tritern
seconds = time.process_time() - start
assert state() == before
assert not torch.cuda.is_initialized()
new = {name.split(".")[0] for name in set(sys.modules) - modules}
assert new - set(sys.stdlib_module_names) == {"tritern", "tritern_kernels"}, new
assert seconds < 1.0, seconds
"""
    result = run_script(code)
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_listed_without_importing_what_it_needs():
    script = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
    del sys.modules[name]
import tritern
print(set(tritern.__all__) - set(dir(tritern)), "peft" in sys.modules)
"""
    done = run_script(script)
    assert done.stdout.strip() == "set() False", done.stderr


def test_a_cpu_needs_no_triton():
    """Torch's builds for CPUs bring none."""
    code = """
import sys
sys.modules["triton"] = None
import torch, tritern
from tritern_kernels import linear, lookup, quantize_table, ternarize_weight
weight = ternarize_weight(torch.randn(4, 128))
assert linear(torch.randn(2, 128), weight).shape == (2, 4)
assert lookup(torch.tensor([1]), *quantize_table(torch.randn(3, 40)), 40).shape == (1, 40)
layer = tritern.TernaryLinear.from_linear(torch.nn.Linear(128, 4))
assert layer(torch.randn(2, 128)).shape == (2, 4)
"""
    result = run_script(code)
    assert result.returncode == 0, result.stderr[-3000:]
