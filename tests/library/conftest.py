"""Inputs of the command line."""

import pytest

from .cli import run


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory, sentences):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n\n".join(sentences[:60]))
    return path


@pytest.fixture(scope="session")
def ternary_path(tmp_path_factory, tiny_path):
    path = tmp_path_factory.mktemp("ternary") / "model"
    assert run("convert", tiny_path, path).exit_code == 0
    return path
