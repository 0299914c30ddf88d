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
        if file.name not in ("search.py",) and "distill" not in file.parts:
            assert not {n for n in names if "faiss" in n or "trainer" in n.lower()}, file


def test_the_kernels_folder_is_no_module():
    assert not list((ROOT / "kernels").glob("*.py"))


WORKS = """
import sys, importlib.util
{prelude}
import {first}, {second}
import tritern
from transformers import BertConfig, BertModel
import torch
model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
assert tuple(tritern.patch(model)(torch.tensor([[1, 2]])).last_hidden_state.shape) == (1, 2, 16)
import transformers.utils.import_utils as u
print("kernels available:", u.is_kernels_available())
assert "faiss" not in sys.modules and "matplotlib" not in sys.modules
"""
STUB = {
    "kernels/__init__.py": "def get_kernel(*a, **k): raise RuntimeError\n" * 1
    + "class _Any:\n    def __init__(self, *a, **k): pass\n    def __call__(self, *a, **k): return a[0] if a else None\n"
    + "def __getattr__(name):\n    return _Any\n",
    "kernels-0.99.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.99.0\n",
}


@pytest.mark.parametrize("order", [("transformers", "tritern"), ("tritern", "transformers")])
@pytest.mark.parametrize("installed", [False, True])
def test_transformers_works_from_the_repository_root(order, installed, tmp_path):
    """The top-level folder ``kernels`` must not be taken for the package of that name, be it installed or not."""
    spec = importlib_spec("kernels")
    prelude = ""
    if installed and spec is None:
        prelude = f"sys.path.append({str(tmp_path)!r})"
        for name, text in STUB.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
    if not installed and spec is not None:
        prelude = "sys.modules['kernels'] = None"
    code = WORKS.format(first=order[0], second=order[1], prelude=prelude)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]


def importlib_spec(name):
    """The installed package of that name, looked up from a folder where nothing shadows it."""
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(bool(s and s.origin))"
    result = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    return True if "True" in result.stdout else None


def test_import_is_quick_and_changes_no_global_state():
    code = """
import time, torch, transformers, sentence_transformers
before = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark)
start = time.perf_counter()
import tritern
seconds = time.perf_counter() - start
after = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark)
assert before == after
assert not torch.cuda.is_initialized()
assert seconds < 1.0, seconds
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
