import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

import tritern
from tritern import CheckpointError, TernaryConfig, TernaryLinear, TriternError
from tritern.checkpoint.digest import DIGEST_KEY, MANIFEST, digest
from tritern_cli import loading

from .forks import run_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, minilm_path):
    """A patched and saved MiniLM (folder) with the vectors it gave."""
    from tests.conftest import TEXTS

    model = tritern.patch(SentenceTransformer(minilm_path, device="cpu"))
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(str(folder))
    return folder, model.encode(TEXTS)


def copy_of(folder, tmp_path):
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_identical_vectors_in_a_new_process(saved, tmp_path):
    folder, vectors = saved
    code = """
import sys, numpy, tritern
from sentence_transformers import SentenceTransformer
from tests.conftest import TEXTS
numpy.save(sys.argv[2], SentenceTransformer(sys.argv[1], device="cpu").encode(TEXTS))
"""
    result = run_script(code, folder, tmp_path / "vectors.npy")
    assert result.returncode == 0, result.stderr[-2000:]
    assert np.array_equal(np.load(tmp_path / "vectors.npy"), vectors)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_loading_and_fusing_start_no_threads_that_a_forked_process_would_miss():
    """Servers load a model, fork their workers and encode there; torch's threads are not in a fork."""
    code = """
import os, torch, tritern
torch.set_num_threads(9)
before = len(os.listdir("/proc/self/task"))
started = lambda: len(os.listdir("/proc/self/task")) - before
tritern.fuse(tritern.load("minilm-l6-ternary", device="cpu"))
assert started() < 8, started()  # a progress bar's alone
torch.ones(1 << 20).add(1)
assert started() >= 8
"""
    result = run_script(code)
    assert result.returncode == 0, result.stderr[-2000:]


def test_loading_without_the_import_fails(saved):
    code = """
import sys
from sentence_transformers import SentenceTransformer
SentenceTransformer(sys.argv[1], device="cpu")
"""
    result = run_script(code, saved[0])
    assert result.returncode != 0
    assert "tritern" in result.stderr


def test_saved_files(saved):
    folder, _ = saved
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "tritern" and settings["format_version"] == 1
    assert len(settings["modules"]) == 36 and settings["rule"] == "mse"
    requirements = json.loads((folder / "config_sentence_transformers.json").read_text())["requirements"]
    assert list(requirements) == ["tritern"]
    card = (folder / "README.md").read_text()
    assert "import tritern" in card and "Scores published for the original do not hold" in card
    state = load_file(folder / "model.safetensors")
    assert sum(t.dtype == torch.uint8 for t in state.values()) == 36


def test_half_precision_checkpoint(minilm, texts, tmp_path):
    model = tritern.patch(minilm).half()
    model.save_pretrained(str(tmp_path))
    size = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert size <= 31_000_000
    options = {"model_kwargs": {"dtype": torch.float16}}
    loaded = SentenceTransformer(str(tmp_path), device="cpu", **options)
    layer = next(m for m in loaded.modules() if isinstance(m, TernaryLinear))
    assert layer.weight_scale.dtype == torch.float32 and layer.bias.dtype == torch.float16
    assert np.array_equal(loaded.encode(texts), model.encode(texts))


@pytest.fixture
def halved(tiny, tmp_path):
    """A folder in float16 with the model, which was widened to float32 afterwards."""
    tritern.patch(tiny, embedding_bits=8).half().save_pretrained(str(tmp_path / "halved"))
    stored = {t.dtype for t in load_file(tmp_path / "halved" / "model.safetensors").values()}
    assert stored == {torch.uint8, torch.int8, torch.float32, torch.float16}
    return tmp_path / "halved", tiny.float()


@pytest.mark.parametrize(
    ("gpu", "settings", "dtype"),
    [
        (False, {}, torch.float32),
        (False, {"dtype": "auto"}, torch.float32),
        (False, {"dtype": torch.float16}, torch.float16),
        (False, {"dtype": "bfloat16"}, torch.bfloat16),
        (True, {}, torch.float16),
        (True, {"device_map": "cpu"}, torch.float32),
        (True, {"device_map": {"": "cpu"}}, torch.float32),
        (True, {"device_map": "cpu", "dtype": torch.float16}, torch.float16),
    ],
)
def test_16_bits_stored_are_computed_with_in_float32_on_a_cpu(
    halved, sentences, monkeypatch, gpu, settings, dtype
):
    folder, wide = halved
    monkeypatch.setattr("tritern.checkpoint.quantizer.unsupported", lambda device: None if gpu else "no GPU")
    auto = AutoModel.from_pretrained(folder, **settings)
    loaded = SentenceTransformer(str(folder), device=None if "device_map" in settings else "cpu",
                                 model_kwargs=settings)  # fmt: skip
    assert auto.dtype == auto.config.dtype == loaded.dtype == dtype
    if dtype == torch.float32:
        assert np.array_equal(loaded.encode(sentences[:20]), wide.encode(sentences[:20]))


@pytest.mark.parametrize(
    ("settings", "dtype"), [({}, torch.float32), ({"dtype": torch.float16}, torch.float16)]
)
def test_so_they_are_where_the_cpu_is_chosen_beside_a_gpu(halved, monkeypatch, settings, dtype):
    folder, _ = halved
    monkeypatch.setattr("tritern.checkpoint.quantizer.unsupported", lambda device: None)
    assert tritern.load(folder, device="cpu", model_kwargs=settings).dtype == dtype
    name = str(dtype).removeprefix("torch.") if settings else None
    assert loading.load(str(folder), device="cpu", dtype=name).dtype == dtype


def test_a_full_precision_model_is_patched_in_the_dtype_it_has(tiny, tmp_path):
    tiny[0].auto_model.bfloat16().save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, quantization_config=TernaryConfig()).dtype == torch.bfloat16


def test_save_again_and_sharded(saved, texts, tmp_path):
    folder, vectors = saved
    SentenceTransformer(str(folder), device="cpu").save_pretrained(str(tmp_path / "again"))
    assert np.array_equal(SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(texts), vectors)
    auto = AutoModel.from_pretrained(folder)
    auto.save_pretrained(tmp_path / "shards", max_shard_size="5MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = AutoModel.from_pretrained(tmp_path / "shards").state_dict()
    assert all(torch.equal(t, again[k]) for k, t in auto.state_dict().items())


def test_auto_model_loads_ternary_layers_and_casts(saved):
    model = AutoModel.from_pretrained(saved[0])
    assert sum(isinstance(m, TernaryLinear) for m in model.modules()) == 36
    model.half()
    assert (
        next(m for m in model.modules() if isinstance(m, TernaryLinear)).weight_scale.dtype == torch.float32
    )
    as_bf16 = AutoModel.from_pretrained(saved[0], dtype=torch.bfloat16)
    layer = next(m for m in as_bf16.modules() if isinstance(m, TernaryLinear))
    assert layer.weight.dtype == torch.uint8 and layer.weight_scale.dtype == torch.float32
    assert as_bf16.embeddings.position_embeddings.weight.dtype == torch.bfloat16
    words = as_bf16.embeddings.word_embeddings
    assert words.weight.dtype == torch.int8 and words(torch.tensor([1])).dtype == torch.bfloat16


def test_dequantize_gives_plain_linears(saved):
    model = AutoModel.from_pretrained(saved[0])
    expected = model.encoder.layer[0].output.dense.packed().dequantize()
    model.dequantize()
    assert not any(isinstance(m, TernaryLinear) for m in model.modules())
    assert torch.equal(model.encoder.layer[0].output.dense.weight, expected)


def refused(folder, match, error=CheckpointError):
    with pytest.raises(error, match=match):
        SentenceTransformer(str(folder), device="cpu")


def test_an_altered_byte_is_refused(saved, tmp_path):
    folder = copy_of(saved[0], tmp_path)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    refused(folder, "not those that were saved")


def test_a_truncated_file_is_refused(saved, tmp_path):
    folder = copy_of(saved[0], tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(Exception, match="(?i)truncated|incomplete|deserializ"):
        SentenceTransformer(str(folder), device="cpu")


def test_verify_names_a_truncated_file(saved, tmp_path):
    from tritern.checkpoint.digest import verify

    file = tmp_path / "model.safetensors"
    file.write_bytes((saved[0] / "model.safetensors").read_bytes()[:-4096])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read.*truncated or damaged"):
        verify([file])
    with pytest.raises(CheckpointError, match="safetensors files only"):
        verify([tmp_path / "pytorch_model.bin"])


def test_a_rewritten_file_is_refused(saved, tmp_path):
    folder = copy_of(saved[0], tmp_path)
    save_file(
        load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"}
    )
    refused(folder, "carry no single digest")


def rewrite(folder, change):
    """Change the weights on disk as somebody who can write a valid digest."""
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt", DIGEST_KEY: digest(state.items())})


LAYER = "encoder.layer.1.output.dense"
TABLE = "embeddings.word_embeddings"


def setting(name, index, value):
    return lambda state: state[name].flatten().__setitem__(index, value)


def cast(name, dtype):
    return lambda state: state.update({name: state[name].to(dtype)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (setting(f"{LAYER}.weight_scale", 3, float("nan")), f"{LAYER}: scale holds NaN, infinity or a neg"),
        (setting(f"{LAYER}.weight_scale", 0, float("inf")), f"{LAYER}: scale holds NaN"),
        (setting(f"{LAYER}.weight_scale", -1, -0.1), f"{LAYER}: scale holds NaN"),
        (setting(f"{LAYER}.weight", 7, 0b00_10_00_01), f"{LAYER}: packed holds the bit pattern 10"),
        (setting(f"{TABLE}.weight_scale", 5, float("nan")), f"{TABLE}: scale holds NaN"),
        (lambda s: s.pop(f"{LAYER}.weight_scale"), f"the checkpoint has no {LAYER}.weight_scale"),
        (lambda s: s.pop(f"{LAYER}.weight"), f"the checkpoint has no {LAYER}.weight"),
        (lambda s: s.pop(f"{LAYER}.bias"), f"the checkpoint has no {LAYER}.bias"),
        (lambda s: s.pop(f"{TABLE}.weight"), f"the checkpoint has no {TABLE}.weight"),
        (
            lambda s: s.update({f"{LAYER}.weight": s[f"{LAYER}.weight"].char()}),
            "packed must be uint8.*received torch.int8",
        ),
        (
            lambda s: s.update({f"{TABLE}.weight": s[f"{TABLE}.weight"].byte()}),
            "must be torch.int8; received torch.uint8",
        ),
        (cast(f"{LAYER}.weight", torch.float32), "must be uint8 and float32 .*the file holds F32 and F32"),
        (
            cast(f"{LAYER}.weight_scale", torch.float16),
            "uint8 and float32 .*the file holds U8 and F16 of 1 dim",
        ),
        (cast(f"{TABLE}.weight", torch.bfloat16), f"{TABLE}.weight and its scale .*holds BF16 and F32"),
        (
            cast(f"{TABLE}.weight_scale", torch.float64),
            "int8 and floating point .*holds I8 and F64",
        ),
        (
            lambda s: s.update({f"{LAYER}.weight": s[f"{LAYER}.weight"][:-1]}),
            "(?i)mismatch|packed must have shape",
        ),
    ],
)
def test_a_valid_digest_over_impossible_weights_is_refused(tiny_path, tmp_path, change, match):
    tritern.patch(AutoModel.from_pretrained(tiny_path), embedding_bits=8).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: None)
    AutoModel.from_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises((CheckpointError, RuntimeError), match=match):
        AutoModel.from_pretrained(tmp_path)


def test_a_damaged_manifest_is_refused(saved, tmp_path):
    folder = copy_of(saved[0], tmp_path)
    for text in ("{", "[]", '{"sha256": {"../config.json": ""}}', '{"sha256": {"/etc/hosts": ""}}'):
        (folder / MANIFEST).write_text(text)
        refused(folder, "tritern_manifest.json cannot be read.*damaged. Copy it again")


def change_settings(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    file.write_text(json.dumps(config))


def test_settings_that_do_not_fit_are_refused(saved, tmp_path):
    folder = copy_of(saved[0], tmp_path)
    change_settings(folder, activation_bits=16)
    refused(
        folder,
        "copy/config.json is not the file that was saved.*Copy it again.*`tritern info .*copy --seal`",
    )
    (folder / MANIFEST).unlink()
    change_settings(folder, format_version=2)
    refused(folder, "format 2; this version reads 1: upgrade tritern")
    change_settings(folder, format_version=1, modules=["encoder.layer.9.output.dense"])
    refused(folder, "names the ternary layer 'encoder.layer.9.output.dense'")
    change_settings(folder, modules=["encoder.layer.0.output"])
    refused(folder, "'encoder.layer.0.output', but the model has no nn.Linear there")
    change_settings(folder, group_size=64)
    refused(folder, "unknown fields in the tritern quantization_config: group_size")


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(TernaryConfig(), torch.float32), (TernaryConfig("twn", 16, 8, ("*.layer.0.*",)), torch.bfloat16)],
)
def test_patching_while_loading_is_the_same_as_afterwards(tiny_path, tmp_path, config, dtype):
    loaded = AutoModel.from_pretrained(tiny_path, quantization_config=config, dtype=dtype)
    patched = tritern.patch(AutoModel.from_pretrained(tiny_path, dtype=dtype), config)
    assert same_state(loaded, patched) and loaded.config.to_dict() == patched.config.to_dict()
    loaded.save_pretrained(tmp_path)
    assert same_state(AutoModel.from_pretrained(tmp_path, dtype=dtype), patched)


def test_a_sentence_transformer_is_patched_while_loading(tiny_path, texts, tmp_path):
    config = TernaryConfig(embedding_bits=8)
    options = {"device": "cpu", "model_kwargs": {"quantization_config": config}}
    loaded = SentenceTransformer(tiny_path, **options)
    expected = tritern.patch(SentenceTransformer(tiny_path, device="cpu"), config).encode(texts)
    assert np.array_equal(loaded.encode(texts), expected)
    loaded.save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="`quantization_config` from the model will be used"):
        again = SentenceTransformer(str(tmp_path), **options)
    assert np.array_equal(again.encode(texts), expected)


def test_a_generating_model_is_patched_while_loading(tmp_path):
    """transformers writes such a model's settings out while it builds the model."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=TernaryConfig())
    patched = tritern.patch(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))
    assert same_state(loaded, patched) and len(tritern.summary(loaded).layers) == 7
    loaded.save_pretrained(tmp_path / "ternary")
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "ternary"), patched)


def test_what_cannot_be_patched_while_loading(tiny_path, tmp_path):
    with pytest.raises(TriternError, match="must be a tritern.TernaryConfig.*received a TernaryQuantiz"):
        AutoModel.from_pretrained(tiny_path, quantization_config={"quant_method": "tritern"})
    with pytest.raises(TriternError, match="skip='nope' matches no linear layer"):
        AutoModel.from_pretrained(tiny_path, quantization_config=TernaryConfig(skip=("nope",)))
    config = json.loads((Path(tiny_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ValueError, match="quantized with GPTQConfig but you are passing a TernaryConfig"):
        AutoModel.from_pretrained(tmp_path, quantization_config=TernaryConfig())


@pytest.mark.parametrize(
    ("folder", "match"),
    [
        ("file", "must be a folder; .*file is a file: name another"),
        ("file/model", "must be a folder; .*file is a file: name another"),
        ("/proc/none/model", "cannot write in /proc .*: name another folder than /proc/none/model"),
        ("", "must be the name of a folder; received ''"),
        (3, "must be the name of a folder; received 3"),
    ],
)
def test_folders_that_cannot_be_written(tiny, tmp_path, monkeypatch, folder, match):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    tritern.patch(tiny)
    with pytest.raises(TriternError, match=f"path {match}|path: {match}"):
        tiny.save_pretrained(folder)
    with pytest.raises(TriternError, match=f"save_directory {match}|save_directory: {match}"):
        tiny[0].auto_model.save_pretrained(folder)
    assert [f.name for f in Path().iterdir()] == ["file"]
