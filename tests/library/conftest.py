"""Inputs of the command line, and files of texts."""

import pytest

from tritern.engine.fused import bert as berts
from tritern.engine.fused import block as fused_block
from tritern.engine.fused import decoder as decoders
from tritern.texts.files import read_texts
from tritern_kernels import cuda


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory, sentences):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n\n".join(sentences[:60]))
    return path


@pytest.fixture
def read(tmp_path, monkeypatch):
    """The texts of a file with this name and content."""
    monkeypatch.chdir(tmp_path)

    def read(name, content, **settings):
        with open(name, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return read_texts(name, **settings)

    return read


@pytest.fixture
def on_gpu(monkeypatch, device):
    """Fused steps wherever the tensors are; lists the blocks that took them."""
    ran = []

    def listed(run):
        def call(block, *arguments):
            result = run(block, *arguments)
            if result is not None:
                ran.append(block)
            return result

        return call

    for family in (berts, decoders):
        monkeypatch.setattr(family, "run", listed(family.run))
    if device == "cpu":
        monkeypatch.setattr(fused_block, "on_gpu", lambda x: True)
        monkeypatch.setattr(cuda, "_device", lambda index: ("a GPU without a table", 90, 132))
    return ran
