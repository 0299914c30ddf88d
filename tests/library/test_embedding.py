import copy
import json
import pickle

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import WordEmbeddings
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from torch import nn
from transformers import AutoModel, Gemma3TextConfig, Gemma3TextModel, T5Config, T5EncoderModel
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import tritern
from tests.library.test_save_load import change_settings
from tritern import CheckpointError, Int4Embedding, Int8Embedding, TernaryConfig, TernaryLinear, TriternError
from tritern.adapters import lora
from tritern.checkpoint.digest import MANIFEST
from tritern.selection import select_tables
from tritern_kernels.embedding import quantize_table
from tritern_kernels.reference import quantize_activations

WORD_TABLE = "0.model.embeddings.word_embeddings"
IDS = torch.tensor([1, 2])


KINDS = {8: Int8Embedding, 4: Int4Embedding}
BITS = pytest.mark.parametrize("bits", KINDS)


def int8_names(model, kind=Int8Embedding):
    return [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, kind)]


@pytest.fixture(params=KINDS.values(), ids=["int8", "int4"])
def table(request):
    return request.param.from_embedding(nn.Embedding(60, 33, padding_idx=3))


def test_values_by_hand():
    values = torch.tensor([[254.0, 125.0, -2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    table = Int8Embedding.from_embedding(nn.Embedding.from_pretrained(values))
    assert table.weight.tolist() == [[127, 62, -1, 2], [0, 0, 0, 0]]  # 62.5 and 1.5: half to even
    assert table.weight_scale[0] == 2.0
    assert table(torch.tensor([[1, 0]])).tolist() == [[[0.0] * 4, [254.0, 124.0, -2.0, 4.0]]]
    with pytest.raises(IndexError):
        table(torch.tensor([2]))


def test_rows_are_rounded_as_activations_are():
    embedding = nn.Embedding(60, 33)
    table = Int8Embedding.from_embedding(embedding)
    q, scale = quantize_activations(embedding.weight.detach())
    assert torch.equal(table.weight, q) and torch.equal(table.weight_scale, scale)
    error = (table.to_embedding().weight - embedding.weight).abs().amax(1)
    assert (error <= embedding.weight.abs().amax(1) / 254 * 1.0001).all() and error.max() > 0


def test_four_bits_by_hand():
    values = torch.stack([torch.arange(36) % 16 - 8.0, torch.zeros(36)]) / 4
    table = Int4Embedding.from_embedding(nn.Embedding.from_pretrained(values))
    assert table.weight.shape == (2, 32) and table.weight_scale.tolist() == [[0.25, 0.25], [0.0, 0.0]]
    assert torch.equal(table(torch.tensor([[1, 0]])), values[[1, 0]][None])
    with pytest.raises(IndexError):
        table(torch.tensor([2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_four_bits_are_those_of_the_kernels(dtype):
    embedding = nn.Embedding(60, 100).to(dtype)
    table = Int4Embedding.from_embedding(embedding)
    packed, scale = quantize_table(embedding.weight.detach())
    assert torch.equal(table.weight, packed) and torch.equal(table.weight_scale, scale)
    error = (table.to_embedding().weight - embedding.weight).float().square().sum()
    assert 0 < error < 0.008 * embedding.weight.float().square().sum()


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.type(torch.half)],
)
def test_casts_leave_the_codes(table, cast):
    other = cast(copy.deepcopy(table))
    dtype = other.weight_scale.dtype
    assert other.weight.dtype == table.weight.dtype and torch.equal(other.weight, table.weight)
    assert torch.equal(other.weight_scale, table.weight_scale.to(dtype)) and dtype != torch.float32
    assert other(IDS).dtype == dtype
    rounded = copy.deepcopy(table)
    rounded.weight_scale = other.weight_scale.float()
    assert torch.equal(other(IDS), rounded(IDS).to(dtype))  # each product rounded once


def test_copies_give_the_same_bits(table):
    fresh = type(table)(60, 33)
    fresh.load_state_dict(table.state_dict())
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table)), fresh):
        assert torch.equal(other(IDS), table(IDS)) and other(IDS).any()
        assert other.weight.data_ptr() != table.weight.data_ptr()
    assert repr(table) == f"{type(table).__name__}(60, 33, padding_idx=3)"


def test_round_trip_to_embedding(table):
    back = table.eval().to_embedding()
    assert torch.equal(back(IDS), table(IDS)) and back.weight.requires_grad
    assert back.padding_idx == 3 and not back.training
    assert table.to_embedding(torch.bfloat16).weight.dtype == torch.bfloat16


def test_refusals(table):
    kind, codes = type(table), table.weight.dtype
    with pytest.raises(TriternError, match=f"max_norm=1.0 cannot be made int{kind.bits}.*max_norm to None"):
        kind.from_embedding(nn.Embedding(5, 4, max_norm=1.0))
    with pytest.raises(TriternError, match="meta device; load the weights"):
        kind.from_embedding(nn.Embedding(5, 4, device="meta"))
    with pytest.raises(TriternError, match="float16 or bfloat16; received torch.float64: cast it first"):
        kind.from_embedding(nn.Embedding(5, 4).double())
    with pytest.raises(TriternError, match="received torch.int8"):
        kind(5, 4, dtype=torch.int8)
    with pytest.raises(TriternError, match="NaN or infinity; repair"):
        kind.from_embedding(nn.Embedding.from_pretrained(torch.full((2, 2), torch.inf)))
    with pytest.raises(TriternError, match=r"cannot be trained.*`table.to_embedding\(\)`"):
        table.requires_grad_()
    assert table.requires_grad_(False) is table
    state = table.state_dict()
    with pytest.raises(
        RuntimeError, match=f"weight must be {codes}; the state dict holds torch.float32. Load full-precis"
    ):
        table.load_state_dict({**state, "weight": state["weight"].float()})
    with pytest.raises(RuntimeError, match="weight_scale must be torch.float32 or.*holds torch.int8"):
        table.load_state_dict({**state, "weight_scale": state["weight_scale"].to(torch.int8)})
    for given in (torch.ones(60, 33), "words", None, torch.nn.Linear(60, 33)):
        with pytest.raises(TriternError, match="embedding must be an nn.Embedding; received"):
            kind.from_embedding(given)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(TriternError, match="dtype must be float32, float16 or bfloat16; received"):
            kind(60, 33)
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(TriternError, match="embedding_bits must be 4, 8 or 16; received 5"):
        TernaryConfig(embedding_bits=5)


def test_with_16_bits_tables_stay(tiny, tmp_path):
    before = tiny.get_submodule(WORD_TABLE).weight
    tritern.patch(tiny, embedding_bits=16)
    assert int8_names(tiny) == [] and tiny.get_submodule(WORD_TABLE).weight is before
    assert tritern.summary(tiny).tables == tritern.summary(tiny).skipped_tables == ()
    tiny.save_pretrained(str(tmp_path))
    assert "word embeddings not rounded" in " ".join((tmp_path / "README.md").read_text().split())
    file = tmp_path / "config.json"  # as written before there were int8 tables
    config = json.loads(file.read_text())
    assert config["quantization_config"].pop("embeddings") == []
    file.write_text(json.dumps(config))
    (tmp_path / MANIFEST).unlink()
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert np.array_equal(loaded.encode(["ba be bi"]), tiny.encode(["ba be bi"]))


@BITS
def test_patched_saved_and_loaded(tiny, sentences, tmp_path, bits):
    bytes_before = tritern.summary(tiny).model_bytes_before
    original = tiny.encode(sentences[:20])
    tritern.patch(tiny, embedding_bits=bits)
    kind, said = KINDS[bits], {8: "int8 per row", 4: "4 bits in groups of 32"}[bits]
    assert int8_names(tiny, kind) == [WORD_TABLE]  # not positions and types
    vectors = tiny.encode(sentences[:20])
    assert not np.array_equal(vectors, original)
    transformer = tiny[0].model
    assert (
        transformer.dtype == torch.float32 and transformer.get_input_embeddings().weight.device.type == "cpu"
    )

    tiny.save_pretrained(str(tmp_path / "model"))
    assert f"word embeddings {said}" in " ".join((tmp_path / "model/README.md").read_text().split())
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert int8_names(loaded, kind) == [WORD_TABLE]
    assert np.array_equal(loaded.encode(sentences[:20]), vectors)
    size = tritern.summary(loaded)
    (table,) = size.tables
    row = {8: 32 + 4, 4: 16 + 4}[bits]
    assert (table.bytes_before, table.bytes_after) == (4 * table.shape[0] * 32, table.shape[0] * row)
    assert table.bits == bits and f"{WORD_TABLE} (int{bits})" in str(size)
    assert size.model_bytes_before == bytes_before
    with pytest.raises(TriternError, match="already ternary"):
        tritern.patch(loaded)

    as_bf16 = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).embeddings.word_embeddings
    assert (
        as_bf16.weight.dtype == tiny.get_submodule(WORD_TABLE).weight.dtype
        and as_bf16.weight_scale.dtype == torch.bfloat16
    )
    plain = AutoModel.from_pretrained(tmp_path / "model")
    plain.dequantize()
    assert type(plain.embeddings.word_embeddings) is nn.Embedding
    assert torch.equal(plain.embeddings.word_embeddings(IDS), transformer.embeddings.word_embeddings(IDS))
    change_settings(tmp_path / "model", embeddings=["embeddings.LayerNorm"])
    (tmp_path / "model" / MANIFEST).unlink()
    with pytest.raises(
        CheckpointError, match="names the rounded table 'embeddings.LayerNorm', but the model has"
    ):
        SentenceTransformer(str(tmp_path / "model"), device="cpu")


@BITS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tiny, sentences, tmp_path, dtype, bits):
    tritern.patch(tiny, embedding_bits=bits)
    full = tiny.encode(sentences[:20], normalize_embeddings=True)
    vectors = tiny.to(dtype).encode(sentences[:20])
    assert tiny.get_submodule(WORD_TABLE).weight.dtype == {8: torch.int8, 4: torch.uint8}[bits]
    cosines = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * full).sum(1)
    assert cosines.min() > 0.99
    tiny.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu", model_kwargs={"dtype": dtype})
    assert loaded.get_submodule(WORD_TABLE).weight_scale.dtype == dtype
    assert np.array_equal(loaded.encode(sentences[:20]), vectors)


@pytest.mark.parametrize(("bits", "most"), [(8, 16_500_000), (4, 11_000_000)])
def test_minilm_in_half_precision(minilm, texts, tmp_path, bits, most):
    tritern.patch(minilm, embedding_bits=bits).half().save_pretrained(str(tmp_path))
    assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) <= most
    loaded = SentenceTransformer(str(tmp_path), device="cpu", model_kwargs={"dtype": torch.float16})
    assert np.array_equal(loaded.encode(texts), minilm.encode(texts))


class Special(nn.Embedding):
    pass


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.other, self.special = nn.Embedding(2000, 8), nn.Embedding(2000, 8), Special(2000, 8)
        self.again = self.other  # one module with two names
        self.small, self.limited = nn.Embedding(1023, 8), nn.Embedding(2000, 8, max_norm=1.0)
        self.output, self.inner = nn.Linear(8, 2000, bias=False), nn.Linear(8, 8)
        self.output.weight = self.words.weight  # tied
        self.double = nn.Embedding(1024, 8).double()


def test_tables_left_alone_and_why():
    calls = []
    model = Model()
    model.other.register_forward_hook(lambda *_: calls.append(1))
    tritern.patch(model, embedding_bits=8, skip="double")
    assert int8_names(model) == ["other", "again"] and model.other is model.again
    model.again(IDS)
    assert calls == [1]
    reasons = {s.name: s.reason for s in tritern.summary(model).skipped_tables}
    assert reasons == {
        "words": "weight shared with Linear",
        "special": "subclass of nn.Embedding: Special",
        "limited": "max_norm is set",
        "double": "named in skip",
    }
    assert "not int8: words (0.06 MB): weight shared with Linear" in str(tritern.summary(model))


def test_skip_and_refusals_come_before_any_change():
    model = tritern.patch(Model(), embedding_bits=8, skip=["other", "double"])
    assert int8_names(model) == []
    named = tritern.patch(Model(), embedding_bits=16, skip="other")  # a table may be named at 16 too
    assert type(named.inner) is TernaryLinear
    model = Model()
    with pytest.raises(TriternError, match="double.weight is torch.float64; float32, float16 or bfloat16"):
        tritern.patch(model)  # 8 by default
    with torch.no_grad():
        model.other.weight[0, 0] = torch.nan
    with pytest.raises(TriternError, match="other.weight holds NaN.*name it in skip="):
        tritern.patch(model, embedding_bits=8, skip="double")
    assert type(model.inner) is nn.Linear and int8_names(model) == []


def test_t5s_shared_table_stays_and_loads(tmp_path):
    config = T5Config(d_model=32, d_ff=64, d_kv=16, num_layers=1, num_heads=2, vocab_size=2000)
    model = tritern.patch(T5EncoderModel(config).eval(), embedding_bits=8)
    assert int8_names(model) == []
    model.save_pretrained(tmp_path)
    loaded = T5EncoderModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS[None]).last_hidden_state, model(IDS[None]).last_hidden_state)


def test_word_embeddings_of_sentence_transformers_stay():
    words = WordEmbeddings(WhitespaceTokenizer([str(i) for i in range(2000)]), torch.ones(2000, 8))
    (choice,) = select_tables(SentenceTransformer(modules=[words], device="cpu"))
    assert choice.reason == "sentence-transformers WordEmbeddings"


@pytest.mark.parametrize(("before", "after"), [(8, 4), (16, 4), (4, 8), (8, 16), (16, 16), (4, 4)])
def test_tables_of_a_ternary_model_are_changed(tiny, sentences, tmp_path, before, after):
    skip = "*.layer.0.*"
    tritern.patch(tiny, embedding_bits=before, rule="twn", skip=skip)
    old = tiny.get_submodule(WORD_TABLE)
    values = (old if before == 16 else old.to_embedding()).weight.detach().clone()
    assert tritern.patch(tiny, embedding_bits=after) is tiny
    new = tiny.get_submodule(WORD_TABLE)
    if before == after:
        assert new is old
    elif after == 16:
        assert type(new) is nn.Embedding and torch.equal(new.weight, values)
    else:
        assert type(new) is KINDS[after]
        assert torch.equal(new.weight, KINDS[after].quantize(values)[0])
    vectors = tiny.encode(sentences[:20])
    tiny.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert np.array_equal(loaded.encode(sentences[:20]), vectors)
    settings = loaded[0].model.config.quantization_config
    assert (settings.rule, settings.skip) == ("twn", [skip]) and len(settings.modules) == 6
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert ("Its word embeddings were changed when" in card) == (before != after) and "(rule `twn`)" in card
    loaded = tritern.patch(loaded, embedding_bits=4)  # from disk too
    assert int8_names(loaded, Int4Embedding) == [WORD_TABLE]


def test_tables_of_a_ternary_model_that_stay(tiny):
    tritern.patch(tiny, skip="*word_embeddings")
    with pytest.raises(TriternError, match="no embedding table to round"):
        tritern.patch(tiny, embedding_bits=4)
    for others in ({"rule": "mse"}, {"skip": "pooler"}, {"config": TernaryConfig()}):
        with pytest.raises(TriternError, match="already ternary .*with embedding_bits alone"):
            tritern.patch(tiny, embedding_bits=4, **others)
    with pytest.raises(TriternError, match="embedding_bits must be 4, 8 or 16; received 2"):
        tritern.patch(tiny, embedding_bits=2)


class Two(nn.Module):
    def __init__(self, tiny_path):
        super().__init__()
        self.q, self.d = (AutoModel.from_pretrained(tiny_path) for _ in range(2))


def test_each_model_inside_keeps_its_settings(tiny_path):
    two = Two(tiny_path)
    tritern.patch(two.q, rule="twn", skip="embeddings.word_embeddings")
    tritern.patch(two.d)
    tritern.patch(two, embedding_bits=4)
    assert int8_names(two, Int4Embedding) == ["d.embeddings.word_embeddings"]
    settings = [m.config.quantization_config for m in (two.q, two.d)]
    assert [s.rule for s in settings] == ["twn", "mse"] and settings[0].skip == ["embeddings.word_embeddings"]
    assert [s.embedding_bits for s in settings] == [16, 4]


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.linear = nn.Embedding(2000, 32), nn.Embedding(2000, 32), nn.Linear(32, 32)
        self.c = self.a


def test_changing_tables_changes_all_or_none():
    model = tritern.patch(Tables(), embedding_bits=16)
    calls = []
    model.a.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.b.weight[0, 0] = torch.nan
    with pytest.raises(TriternError, match="b: the table holds NaN or infinity"):
        tritern.patch(model, embedding_bits=4)
    assert type(model.a) is type(model.b) is nn.Embedding
    with torch.no_grad():
        model.b.weight[0, 0] = 0
    for bits in (8, 4):
        tritern.patch(model, embedding_bits=bits)
        assert int8_names(model, KINDS[bits]) == ["a", "b", "c"] and model.a is model.c
    model.c(IDS)
    assert calls == [1]
    tables = model.a, model.b
    tritern.patch(model, embedding_bits=4)  # nothing to do
    assert (model.a, model.b) == tables


def test_a_rounded_table_alone_is_not_a_ternary_model():
    model = Tables()
    model.a = Int8Embedding.from_embedding(model.a)
    tritern.patch(model, embedding_bits=8)
    assert type(model.linear) is TernaryLinear and type(model.b) is Int8Embedding


def test_tables_beneath_adapters_stay(tiny):
    peft = pytest.importorskip("peft", reason="needs peft")
    tritern.patch(tiny, embedding_bits=8)
    tiny[0].auto_model.add_adapter(lora(peft.LoraConfig(target_modules=["query"])))
    with pytest.raises(TriternError, match="carries PEFT adapters"):
        tritern.patch(tiny, embedding_bits=4)


def test_tables_of_several_bits_are_not_saved(tiny, tmp_path):
    tritern.patch(tiny, embedding_bits=8)
    embeddings = tiny[0].model.embeddings
    embeddings.position_embeddings = Int4Embedding.from_embedding(embeddings.position_embeddings)
    with pytest.raises(TriternError, match="must have the same bits; they are .*: 8.*: 4"):
        tiny.save_pretrained(str(tmp_path))


def test_settings_of_older_and_newer_models(tiny, sentences, tmp_path):
    tritern.patch(tiny, embedding_bits=8).save_pretrained(str(tmp_path))
    (tmp_path / MANIFEST).unlink()
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["quantization_config"].pop("embedding_bits") == 8
    file.write_text(json.dumps(config))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert np.array_equal(loaded.encode(sentences[:9]), tiny.encode(sentences[:9]))
    for bits, error in ((2, CheckpointError), (16, CheckpointError), (4, (CheckpointError, RuntimeError))):
        change_settings(tmp_path, embedding_bits=bits)
        with pytest.raises(error, match="embedding_bits of a saved model are 4 or 8|(?i:mismatch|must be)"):
            SentenceTransformer(str(tmp_path), device="cpu")


def test_damaged_scales_are_refused(tiny, tmp_path):
    """NaN; a negative scale belongs to the format of 4 bits and not to that of 8."""
    for bits, value, allowed in ((4, -1.0, True), (4, torch.nan, False), (8, -1.0, False)):
        model = tritern.patch(copy.deepcopy(tiny), embedding_bits=bits)
        model.get_submodule(WORD_TABLE).weight_scale.view(-1)[5] = value
        model.save_pretrained(str(tmp_path / f"{bits}{value}"))
        if allowed:
            SentenceTransformer(str(tmp_path / f"{bits}{value}"), device="cpu")
        else:
            with pytest.raises(CheckpointError, match="word_embeddings: scale holds NaN, infinity or a neg"):
                SentenceTransformer(str(tmp_path / f"{bits}{value}"), device="cpu")


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_that_multiply(dtype):
    """By a number that no half-precision dtype holds; it is rounded before it is used, as in Gemma."""
    original = Gemma3TextScaledWordEmbedding(2000, 48, 7, embed_scale=48**0.5).to(dtype).eval()
    table = Int8Embedding.from_embedding(original)
    rounded = nn.Embedding.from_pretrained(table.weight[IDS].to(dtype) * table.weight_scale[IDS, None])
    assert torch.equal(table(IDS), rounded.weight * torch.tensor(48**0.5).to(dtype))
    assert ((table(IDS) - original(IDS)).abs().amax() / original(IDS).abs().amax()).item() < 0.01
    back = table.to_embedding()
    assert type(back) is Gemma3TextScaledWordEmbedding and torch.equal(back(IDS), table(IDS))
    assert (back.num_embeddings, back.padding_idx, back.training) == (2000, 7, False)
    assert repr(table) == "Int8Embedding(2000, 48, padding_idx=7, embed_scale=6.9282)"


def test_gemma_is_patched_saved_and_loaded(tmp_path):
    config = Gemma3TextConfig(
        vocab_size=2000, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = tritern.patch(Gemma3TextModel(config).eval(), embedding_bits=8)
    assert int8_names(model) == ["embed_tokens"]
    model.save_pretrained(tmp_path / "ternary")
    loaded = Gemma3TextModel.from_pretrained(tmp_path / "ternary")
    vectors = model(IDS[None]).last_hidden_state
    assert torch.equal(loaded(IDS[None]).last_hidden_state, vectors)
    tritern.dequantize(loaded).save_pretrained(tmp_path / "plain")
    plain = Gemma3TextModel.from_pretrained(tmp_path / "plain")
    assert torch.equal(plain.embed_tokens(IDS), model.embed_tokens(IDS))


class SquaredWordEmbedding(Gemma3TextScaledWordEmbedding):
    """Claims to be of transformers and takes the same arguments, but does something else."""

    __module__ = "transformers.models.own"

    def forward(self, input_ids):
        return super().forward(input_ids) ** 2


@pytest.mark.parametrize("kind", [SquaredWordEmbedding, BartScaledWordEmbedding])
def test_tables_that_do_something_else_stay(kind, tmp_path):
    table = kind(2000, 8, 0, embed_scale=2.0)
    with pytest.raises(TriternError, match=f"a {kind.__name__} cannot be made int8: only nn.Embedding and"):
        Int8Embedding.from_embedding(table)
    (choice,) = select_tables(nn.Sequential(table))
    assert choice.reason == f"subclass of nn.Embedding: {kind.__name__}"


def test_looking_at_a_class_draws_no_random_numbers():
    from tritern.nn.embedding import _multiplies

    _multiplies.cache_clear()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert _multiplies(Gemma3TextScaledWordEmbedding)
    assert torch.equal(torch.rand(2), expected)
