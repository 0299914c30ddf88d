"""What imports what, and that importing tritern disturbs nobody."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("order", [("transformers", "tritern"), ("tritern", "transformers")])
@pytest.mark.parametrize("installed", [False, True])
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
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_listed_without_importing_what_it_needs():
    script = "import sys, tritern; print(set(tritern.__all__) - set(dir(tritern)), 'peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set() False", done.stderr
