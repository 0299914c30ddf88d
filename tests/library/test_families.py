"""``patch``, save and load for every family: what is patched, what is left, and the same vectors after."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors import safe_open

import tritern
from tests.library import families
from tritern import TriternError
from tritern.checkpoint.digest import MANIFEST
from tritern.selection import starred

from .forks import run_script

ROOT = Path(__file__).parents[2]
CONV = "not a linear layer: Conv2d (weight 32 x 3 x 8 x 8)"
PACKED_ATTENTION = "not a linear layer: MultiheadAttention (in_proj_weight 96 x 32)"
OUT_PROJ = "subclass of nn.Linear: NonDynamicallyQuantizableLinear"

# Two layers each: 6 linears a layer in BERT and its like, 7 where the MLP is gated, 4 where projections are
# fused (ModernBERT) or the MLP is experts. ALBERT has one shared layer and a projection of its embeddings,
# as has ELECTRA.
EXPECTED: dict[str, tuple[int, dict[str, str]]] = {
    "bert": (12, {"pooler.dense": "pooler"}),
    "roberta": (12, {"pooler.dense": "pooler"}),
    "xlm-roberta": (12, {"pooler.dense": "pooler"}),
    "mpnet": (12, {"pooler.dense": "pooler"}),
    "distilbert": (12, {}),
    "albert": (7, {"pooler": "pooler"}),
    "electra": (13, {}),
    "deberta-v2": (12, {}),
    "modernbert": (8, {}),
    "nomic-bert": (14, {}),
    "jina-embeddings-v3": (12, {"pooler.dense": "pooler"}),
    "t5": (
        12,
        {"block.*.layer.*.DenseReluDense.wo": "T5 wo (kept in higher precision by transformers too)"},
    ),
    "qwen2": (14, {}),
    "qwen3": (14, {}),
    "mistral": (14, {}),
    "qwen3-moe": (
        8,
        {
            "layers.*.mlp.experts": "not a linear layer: Qwen3MoeExperts "
            "(gate_up_proj 4 x 64 x 32, down_proj 4 x 32 x 32)",
            "layers.*.mlp.gate": "not a linear layer: Qwen3MoeTopKRouter (weight 4 x 32)",
        },
    ),
    "clip": (
        24,
        {
            "visual_projection": "projection at the output",
            "text_projection": "projection at the output",
            "embeddings.patch_embedding": CONV,
        },
    ),
    "siglip": (
        24,
        {
            "text_model.head": "head",
            "vision_model.head.mlp.fc1": "head",
            "vision_model.head.mlp.fc2": "head",
            "vision_model.head.attention.out_proj": OUT_PROJ,
            "vision_model.head.attention": PACKED_ATTENTION,
            "embeddings.patch_embedding": CONV,
        },
    ),
    "siglip2": (
        24,
        {
            "text_model.head": "head",
            "vision_model.head.mlp.fc1": "head",
            "vision_model.head.mlp.fc2": "head",
            "vision_model.head.attention.out_proj": OUT_PROJ,
            "vision_model.head.attention": PACKED_ATTENTION,
            "embeddings.patch_embedding": "patch embedding",
        },
    ),
    "vit": (
        12,
        {
            "pooler.dense": "pooler",
            "embeddings": "not a linear layer: ViTEmbeddings (position_embeddings 1 x 17 x 32)",
            "embeddings.patch_embeddings.projection": CONV,
        },
    ),
    "dinov2": (
        12,
        {
            "embeddings": "not a linear layer: Dinov2Embeddings (position_embeddings 1 x 17 x 32)",
            "embeddings.patch_embeddings.projection": CONV,
        },
    ),
    "embedding-gemma": (14, {"linear": "sentence-transformers Dense"}),
    "router": (24, {"pooler.dense": "pooler"}),
    "cross-encoder-bert": (12, {"pooler.dense": "pooler", "classifier": "head"}),
    "cross-encoder-roberta": (12, {"classifier.dense": "head", "classifier.out_proj": "head"}),
    "cross-encoder-modernbert": (8, {"head.dense": "head", "classifier": "head"}),
    "splade-bert": (
        12,
        {"transform.dense": "head", "predictions.decoder": "weight shared with Embedding"},
    ),
    "splade-distilbert": (
        12,
        {"vocab_transform": "head", "vocab_projector": "weight shared with Embedding"},
    ),
    "splade-modernbert": (8, {"head.dense": "head", "decoder": "weight shared with Embedding"}),
    "splade-router": (12, {"transform.dense": "head", "predictions.decoder": "weight shared with Embedding"}),
    "csr": (
        12,
        {
            "pooler.dense": "pooler",
            "encoder": "sentence-transformers SparseAutoEncoder",
        },
    ),
    "colbert": (12, {"pooler.dense": "pooler", "linear": "sentence-transformers Dense"}),
    "custom-code": (
        3,
        {
            "blocks.*": "subclass of nn.Linear: LowRankLinear",
            "blocks.*.layer": "Transposed reads its weight itself",
        },
    ),
}

CHILD = """
import sys
from pathlib import Path
import numpy
import tritern
from tests.library import families
folder = Path(sys.argv[1])
found = {n: families.vectors(families.load(n, folder / n / "saved")) for n in sys.argv[2:]}
numpy.savez(folder / "again.npz", **found)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of each family: vectors before and after patching, the summary, warnings, and the vectors of the saved
    model in a new process.
    """
    folder = tmp_path_factory.mktemp("families")
    results = {}
    for name in EXPECTED:
        model = families.build(name, folder / name)
        before = families.vectors(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tritern.patch(model)
        model.save_pretrained(str(folder / name / "saved"))
        messages = [str(w.message) for w in caught if w.category is UserWarning]
        results[name] = before, families.vectors(model), tritern.summary(model), messages
    child = run_script(CHILD, folder, *EXPECTED)
    assert child.returncode == 0, child.stderr[-3000:]
    again = np.load(folder / "again.npz")
    return {name: (*result, again[name]) for name, result in results.items()}


def test_every_family_is_here():
    assert set(EXPECTED) == set(families.BUILDERS) - {"gpt2", "static"}


@pytest.mark.parametrize("name", EXPECTED)
def test_patched_saved_and_loaded(made, name):
    before, after, _, _, again = made[name]
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 0.05 * np.abs(before).max()  # something was patched
    assert np.array_equal(again, after)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_patched_and_what_is_left(made, name):
    patched, left = EXPECTED[name]
    summary = made[name][2]
    assert len(summary.layers) == patched
    reasons = {(starred(s.name), s.reason) for s in summary.skipped}
    for layer, reason in reasons:
        assert any(layer.endswith(f".{n}") and reason == r for n, r in left.items()), (layer, reason)
    for n, r in left.items():
        assert any(layer.endswith(f".{n}") and reason == r for layer, reason in reasons), (n, r)


def test_a_mixture_of_experts_is_warned_of(made):
    warned = {name: result[3] for name, result in made.items() if result[3]}
    assert list(warned) == ["qwen3-moe"]
    (message,) = warned["qwen3-moe"]
    assert message.startswith("24,832 weights are in matrices that are not nn.Linear")
    assert "6,144 become ternary. The largest: *.model.layers.*.mlp.experts: not a linear layer:" in message


@pytest.mark.parametrize(
    "name, match",
    [
        ("gpt2", r"h\.\*\.attn\.c_attn: not a linear layer: Conv1D \(weight 32 x 96\); .*c_proj"),
        ("static", r"embedding: not a linear layer: EmbeddingBag \(weight 145 x 32\)"),
    ],
)
def test_models_without_linear_layers_are_refused(name, match, tmp_path):
    model = families.build(name, tmp_path)
    with pytest.raises(
        TriternError, match="no linear layer to make ternary in SentenceTransformer .*" + match
    ):
        tritern.patch(model)


def test_summary_has_one_line_for_the_layers_of_all_blocks(made):
    lines = [line for line in str(made["t5"][2]).splitlines() if line.startswith("not ternary")]
    assert len(lines) == 1 and ".block.*.layer.*.DenseReluDense.wo (2 layers, 0.02 MB): T5 wo" in lines[0]


def test_the_page_on_families_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import make_families

    assert make_families.TARGET.read_text() == make_families.page(), "run python docs/make_families.py"


@pytest.mark.parametrize("name", ["vit", "dinov2", "bert"])
def test_layers_under_the_names_that_their_weights_have_on_disk(tmp_path, name):
    """As another version of transformers may have called them in the model."""
    model = tritern.patch(families.build(name, tmp_path))
    model.save_pretrained(str(tmp_path / "saved"))
    (folder,) = {f.parent for f in (tmp_path / "saved").rglob("*.safetensors")}
    config = json.loads((folder / "config.json").read_text())
    with safe_open(next(folder.glob("*.safetensors")), framework="pt") as file:
        named = [k.removesuffix(".weight_scale") for k in file.keys() if k.endswith(".weight_scale")]
    config["quantization_config"]["modules"] = named
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "saved" / MANIFEST).unlink()
    (folder / MANIFEST).unlink(missing_ok=True)
    loaded = families.load(name, tmp_path / "saved")
    assert np.array_equal(families.vectors(loaded), families.vectors(model))
    if name == "vit" and transformers.__version__ >= "5.23":  # else they are called the same
        assert not set(named) & {n for n, _ in loaded[0].model.named_modules()}
