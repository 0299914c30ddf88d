"""Small checkpoints in the two public layouts, against the sources' formulas written out in plain torch."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertTokenizerFast,
    BitNetConfig,
    BitNetForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    Qwen3Config,
    Qwen3Model,
)
from transformers.integrations.bitnet import pack_weights

from tests.conftest import WORDS
from tritern import CheckpointError, TernaryLinear
from tritern.formats.bitnet import from_bitnet
from tritern.formats.bitnet_layers import METHOD, Header

from .forks import run_script

SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=2, eos_token_id=3,
)  # fmt: skip
IDS = torch.tensor([[2, 9, 17, 33, 5, 3], [2, 40, 41, 8, 3, 0]])


class Formula(nn.Module):
    """y = q(norm(x)) W^T, as the papers and sources state it; sums in float64, which holds them exactly."""

    def __init__(self, codes, scale, norm=None, eps=0.0):
        super().__init__()
        self.codes, self.scale, self.norm, self.eps = codes.double(), scale, norm, eps

    def forward(self, x):
        if self.norm is not None:
            x = self.norm * (x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        q = (x / step).round().clamp(-128, 127)
        return (q.double() @ self.codes.T * step * self.scale).to(x.dtype)


def absmean(weight):
    scale = weight.float().abs().mean()
    return (weight.float() / scale).round().clamp(-1, 1), scale.double()


def randomize(model):
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)


def save_tokenizer(folder):
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


@pytest.fixture(scope="module", params=["qwen3", "gemma3_text"])
def embedding(request, tmp_path_factory):
    """Folder in the layout of BitNet-embedding, and the plain model that computes the same."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    common = dict(**SIZES, vocab_size=len(WORDS) + 5, head_dim=16, rms_norm_eps=1e-3)
    if request.param == "qwen3":
        model = Qwen3Model(Qwen3Config(**common))
    else:
        model = Gemma3TextModel(Gemma3TextConfig(**common, query_pre_attn_scalar=16))
    randomize(model)
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    state, reference = load_file(folder / "model.safetensors"), model.float()
    for name, module in list(reference.named_modules()):
        if isinstance(module, nn.Linear):
            norm = (1 + 0.3 * torch.randn(module.in_features)).to(torch.bfloat16)
            state[f"{name}.norm.weight"] = norm
            reference.set_submodule(name, Formula(*absmean(module.weight), norm.float(), 1e-3))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, reference.eval()


def check(model, reference):
    """Every layer alone, on the inputs it gets, and the whole model."""
    layers = [n for n, m in model.named_modules() if isinstance(m, TernaryLinear)]
    assert layers == [n for n, m in reference.named_modules() if isinstance(m, Formula)] and layers
    inputs = {}
    for name in layers:
        hook = lambda module, given, name=name: inputs.update({name: given[0]})  # noqa: E731
        reference.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        expected, actual = reference(IDS)[0], model(IDS)[0]
        for name in layers:
            y = reference.get_submodule(name)(inputs[name])
            torch.testing.assert_close(model.get_submodule(name)(inputs[name]), y, rtol=1e-5, atol=1e-5)
    cosine = nn.functional.cosine_similarity(expected.flatten(0, 1), actual.flatten(0, 1))
    assert cosine.min() > 0.999  # a few activations fall on the other side of a rounding


def test_embedding_models_compute_the_formula(embedding):
    folder, reference = embedding
    model = from_bitnet(folder, device="cpu", dtype=torch.float32)
    assert isinstance(model, SentenceTransformer) and model.dtype == torch.float32
    check(model[0].model, reference)


def test_embedding_models_pool_the_last_token_and_normalize(embedding):
    model = from_bitnet(embedding[0], device="cpu", dtype=torch.float32)
    text = "bado kemi lu"
    ids = model.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        last = model[0].model(**{k: v for k, v in ids.items() if k != "token_type_ids"})[0][0, -1]
    vector = model.encode(text, convert_to_tensor=True)
    torch.testing.assert_close(vector, nn.functional.normalize(last, dim=0), rtol=0, atol=1e-6)


def test_embedding_models_save_and_load(embedding, tmp_path, texts):
    model = from_bitnet(str(embedding[0]), device="cpu")
    assert model.dtype == torch.bfloat16
    vectors = model.encode(texts, convert_to_tensor=True)
    model.save_pretrained(str(tmp_path))
    options = {"device": "cpu", "model_kwargs": {"dtype": torch.bfloat16}}
    again = SentenceTransformer(str(tmp_path), **options)
    assert torch.equal(again.encode(texts, convert_to_tensor=True), vectors)
    norms = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["norms"]
    assert len(norms) == 14 and set(norms.values()) == {1e-3}
    assert "imported by `tritern.formats.bitnet.from_bitnet`" in (tmp_path / "README.md").read_text()
    # once more, from the folder's own modules.json
    for file in ("config.json", "model.safetensors"):
        shutil.copy(embedding[0] / file, tmp_path / file)
    assert torch.equal(from_bitnet(tmp_path, device="cpu").encode(texts, convert_to_tensor=True), vectors)


FORMS = {
    "bitlinear": {"linear_class": "bitlinear"},
    "autobitlinear": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "unpacked": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "rms_norm": {"linear_class": "bitlinear", "use_rms_norm": True, "rms_norm_eps": 1e-3},
}


@pytest.fixture(scope="module", params=FORMS)
def generator(request, tmp_path_factory):
    """Folder in a form of transformers' bitnet format, and the plain model that computes the same."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    reference = BitNetForCausalLM(BitNetConfig(**SIZES, vocab_size=len(WORDS) + 5))
    randomize(reference)
    reference.config.quantization_config = {"quant_method": "bitnet", **FORMS[request.param]}
    reference.config.architectures = ["BitNetForCausalLM"]
    reference.config.dtype = torch.float32
    reference.config.save_pretrained(folder)
    state = reference.state_dict()
    for name, module in list(reference.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        codes, scale = absmean(module.weight.detach())
        norm = None
        if request.param != "online":
            packed = codes.clone() if request.param == "unpacked" else pack_weights(codes.clone())
            stored = scale if FORMS[request.param]["linear_class"] == "autobitlinear" else 1 / scale
            state[f"{name}.weight"], state[f"{name}.weight_scale"] = packed, stored.float().reshape(1)
        if request.param == "rms_norm":
            norm = state[f"{name}.rms_norm.weight"] = 1 + 0.3 * torch.randn(module.in_features)
        reference.set_submodule(name, Formula(codes, scale, norm, 1e-3))
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    return folder, reference.eval()


def test_bitnet_format_computes_the_formula(generator):
    model = from_bitnet(generator[0])
    assert isinstance(model, BitNetForCausalLM) and type(model.lm_head) is nn.Linear
    check(model, generator[1])


def test_bitnet_format_computes_what_transformers_does(generator):
    pytest.importorskip("accelerate")
    with torch.compiler.set_stance("force_eager"), torch.no_grad():  # its helpers are compiled functions
        source = AutoModelForCausalLM.from_pretrained(generator[0])
        expected = source(IDS)[0]
    assert any("BitLinear" in type(m).__name__ for m in source.modules())
    with torch.no_grad():
        actual = from_bitnet(generator[0])(IDS)[0]
    assert nn.functional.cosine_similarity(actual, expected, dim=-1).min() > 0.999


def test_bitnet_format_saves_and_loads(generator, tmp_path):
    model = from_bitnet(generator[0])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS)[0], model(IDS)[0])


def copy_of(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change(folder, tensors=None, **settings):
    """Change tensors (None: leave out) and the config of a copied checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    config.update(settings)
    (folder / "config.json").write_text(json.dumps(config))
    state = {**load_file(folder / "model.safetensors"), **(tensors or {})}
    state = {k: v for k, v in state.items() if v is not None}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(folder, match):
    with pytest.raises(CheckpointError, match=match):
        from_bitnet(folder, device="cpu")


def test_a_full_precision_model_is_refused(embedding, tmp_path):
    folder = copy_of(embedding[0], tmp_path)
    names = [n for n in load_file(folder / "model.safetensors") if n.endswith("_proj.norm.weight")]
    change(folder, {names[0]: None})
    refused(folder, rf"1 tensors are missing, among them {names[0]}. Copy it again")
    change(folder, dict.fromkeys(names))
    refused(folder, r"14 tensors are missing.* full-precision model\? Make that ternary with tritern.patch")


def test_shapes_that_do_not_fit_are_refused(embedding, tmp_path):
    folder = copy_of(embedding[0], tmp_path)
    change(folder, {"layers.0.self_attn.o_proj.norm.weight": torch.ones(63)})
    refused(folder, r"layers.0.self_attn.o_proj.norm.weight has shape \[63\]; it must be \[64\]")
    change(folder, {"layers.0.mlp.up_proj.weight": torch.ones(95, 64)})
    refused(folder, r"layers.0.mlp.up_proj.weight is F32 \[95, 64\].*it must be float \[96, 64\]")


@pytest.mark.parametrize("generator", ["autobitlinear"], indirect=True)
def test_damaged_packed_weights_are_refused(generator, tmp_path):
    folder, name = copy_of(generator[0], tmp_path), "model.layers.1.mlp.down_proj"
    state = load_file(folder / "model.safetensors")
    damaged = state[f"{name}.weight"].clone()
    damaged[3, 5] |= 0b1100
    change(folder, {f"{name}.weight": damaged})
    refused(folder, f"{name}.weight holds other codes than -1, 0 and")
    change(folder, {f"{name}.weight": state[f"{name}.weight"][:-1].contiguous()})
    refused(folder, rf"{name}.weight is U8 \[15, 96\]; .* must be uint8 \[16, 96\] or float \[64, 96\]")
    change(folder, {f"{name}.weight": state[f"{name}.weight"], f"{name}.weight_scale": torch.zeros(1)})
    refused(folder, rf"{name}.weight_scale must be a positive number; received \[0.0\]")
    change(folder, {f"{name}.weight_scale": None})
    refused(folder, "1 tensors are missing, among them layers.1.mlp.down_proj.weight_scale")


@pytest.mark.parametrize("generator", ["autobitlinear"], indirect=True)
def test_other_formats_are_refused(generator, embedding, tmp_path, tiny_path):
    folder = copy_of(generator[0], tmp_path)
    change(folder, quantization_config={"quant_method": "gptq"})
    refused(folder, "quant_method is 'gptq'; from_bitnet reads 'bitnet'")
    change(folder, quantization_config={"quant_method": "bitnet", "linear_class": "bytelinear"})
    refused(folder, "linear_class must be either 'bitlinear' or 'autobitlinear', but got bytelinear")
    change(folder, quantization_config={"quant_method": "bitnet", "linear_class": "autobitlinear",
                                        "quantization_mode": "online"})  # fmt: skip
    refused(folder, "is U8 .*, online, it must be float")
    from_bitnet(generator[0]).save_pretrained(tmp_path / "ternary")
    refused(tmp_path / "ternary", "quant_method is 'tritern'.* Load this folder with AutoModel")
    refused(tiny_path, "model_type 'bert'; a BitNet checkpoint has quant_method 'bitnet' or")


@pytest.mark.parametrize("generator", ["bitlinear"], indirect=True)
def test_a_model_without_its_head(generator, tmp_path):
    folder = change(copy_of(generator[0], tmp_path), architectures=["BitNetModel"])
    check(from_bitnet(folder, dtype=torch.float32), generator[1].model)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    refused(tmp_path / "away", "away is neither a folder nor a name on the hub, such as owner/name")


LOAD = """
import sys, tritern
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
sys.stdout.write(model.encode(sys.argv[2]).tobytes().hex())
"""


@pytest.mark.parametrize("embedding", ["qwen3"], indirect=True)
def test_a_new_process_that_imports_tritern_loads_what_was_saved(embedding, tmp_path):
    model = from_bitnet(embedding[0], device="cpu", dtype=torch.float32)
    model.save_pretrained(str(tmp_path))
    assert not any(METHOD in file.read_text() for file in tmp_path.rglob("*.json"))
    result = run_script(LOAD, tmp_path, "bado kemi lu")
    assert result.stdout == model.encode("bado kemi lu").tobytes().hex(), result.stderr[-2000:]


def test_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 64)
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read as safetensors .*truncated"):
        Header([file])
