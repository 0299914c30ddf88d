import copy
import re
from unittest.mock import Mock

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3Model,
)

import tritern
from tests.conftest import TEXTS, WORDS
from tritern import Int4Embedding, Int8Embedding, TernaryLinear, TriternError
from tritern.formats.gguf import export_gguf
from tritern.nn.linear import RMSNorm

gguf = pytest.importorskip("gguf")


def bert(folder, *, pooling="mean", words=WORDS, lower=True, accents=None, **config):
    """A random BERT whose layers cover all three types: in_features of 256, 96 and 80."""
    vocabulary = ["[PAD]", "[UNK]", "[MASK]", "[SEP]", "[CLS]", *words, *(f"##{w}" for w in words[:20])]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    settings = {"do_lower_case": lower, "strip_accents": accents}
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), **settings).save_pretrained(folder)
    sizes = dict(
        vocab_size=1100, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, initializer_range=0.2,
    )  # fmt: skip
    BertModel(BertConfig(**{**sizes, **config})).save_pretrained(folder)
    transformer = Transformer(str(folder))
    return SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), pooling), Normalize()],
        device="cpu",
    )


def qwen3(folder, ends=True):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    learner.model.save(str(folder))
    tokenizer = Qwen2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    if ends:
        from tokenizers.processors import TemplateProcessing

        end = ("<|endoftext|>", tokenizer.eos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end[0]}", special_tokens=[end]
        )
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=400, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=64, initializer_range=0.2,
        rms_norm_eps=1e-4, rope_theta=5000.0,
    )  # fmt: skip
    Qwen3Model(config).save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(96, "lasttoken")], device="cpu")


def read(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return (
        fields,
        {k: torch.from_numpy(v.copy()) for k, v in tensors.items()},
        {t.name: t for t in reader.tensors},
    )


def equal_to(model, path, names):
    """Every weight of the file against the model's."""
    _, tensors, stored = read(path)
    transformer = model[0].model
    left = set(tensors)
    for hf_name, name in names.items():
        module, value = transformer.get_submodule(hf_name), tensors[f"{name}.weight"]
        left.discard(f"{name}.weight")
        if isinstance(module, TernaryLinear):
            scale = module.weight_scale.half().float()
            assert torch.equal(value, scale[:, None] * module.packed().codes())
            K = module.in_features
            wide = module.weight_bits == 4
            kind = "TQ2_0" if K % 256 == 0 and not wide else "Q4_0" if K % 32 == 0 else "F16"
            assert stored[f"{name}.weight"].tensor_type.name == kind
        elif isinstance(module, Int8Embedding):
            assert torch.equal(value, module.weight_scale.half().float()[:, None] * module.weight)
            assert stored[f"{name}.weight"].tensor_type.name == "Q8_0"
        elif isinstance(module, Int4Embedding):
            kind = "Q4_0" if module.embedding_dim % 32 == 0 else "F16"
            expected = copy.deepcopy(module) if kind == "F16" else copy.deepcopy(module).half().float()
            expected = expected.to_embedding().weight.detach()
            expected = expected.half().float() if kind == "F16" else expected
            assert torch.equal(value, expected)
            assert stored[f"{name}.weight"].tensor_type.name == kind
        else:
            exact = value.dtype == torch.float32 and stored[f"{name}.weight"].tensor_type.name == "F32"
            expected = module.weight if exact else module.weight.half()
            assert torch.equal(value, expected.detach().float())
        if getattr(module, "bias", None) is not None:
            left.discard(f"{name}.bias")
            assert torch.equal(tensors[f"{name}.bias"], module.bias.detach().float())
            assert stored[f"{name}.bias"].tensor_type.name == "F32"
    assert not left


BERT_LAYER = {
    "attention.self.query": "attn_q", "attention.self.key": "attn_k", "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output", "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up", "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm",
}  # fmt: skip
BERT_NAMES = {
    "embeddings.word_embeddings": "token_embd", "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types", "embeddings.LayerNorm": "token_embd_norm",
}  # fmt: skip
QWEN3_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def names_of(layers, part, start):
    return {**start, **{f"{part}.{i}.{a}": f"blk.{i}.{b}" for i in range(2) for a, b in layers.items()}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    model = tritern.patch(bert(tmp_path).to(dtype), embedding_bits=8, skip="*.layer.1.output.dense")
    export_gguf(model, tmp_path / "model.gguf")
    equal_to(model, tmp_path / "model.gguf", names_of(BERT_LAYER, "encoder.layer", BERT_NAMES))


def test_a_file_that_is_there_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    model, path = tritern.patch(bert(tmp_path)), tmp_path / "out" / "model.gguf"
    export_gguf(model, path)
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(gguf.GGUFWriter, "write_tensors_to_file", Mock(side_effect=OSError(28)))
        with pytest.raises(OSError, match="28"):
            export_gguf(model, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    model[0].model.encoder.layer[0].output.dense.weight_scale.mul_(2)
    export_gguf(model, path)
    assert path.read_bytes() != before and list(path.parent.iterdir()) == [path]
    with pytest.raises(TriternError, match="path: the folder .*nowhere does not exist: make it"):
        export_gguf(model, tmp_path / "nowhere" / "model.gguf")
    with pytest.raises(TriternError, match="path must be a file; .* is a folder"):
        export_gguf(model, path.parent)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("embedding_bits", [4, 8, 16])
def test_bert_weights(tmp_path, embedding_bits):
    model = tritern.patch(bert(tmp_path), embedding_bits=embedding_bits)
    export_gguf(model, tmp_path / "model.gguf")
    equal_to(model, tmp_path / "model.gguf", names_of(BERT_LAYER, "encoder.layer", BERT_NAMES))


def test_weights_of_four_bits(tmp_path):
    model = tritern.patch(bert(tmp_path), weight_bits=4)
    export_gguf(model, tmp_path / "model.gguf")
    equal_to(model, tmp_path / "model.gguf", names_of(BERT_LAYER, "encoder.layer", BERT_NAMES))


def test_odd_widths_become_f16(tmp_path):
    model = tritern.patch(bert(tmp_path, hidden_size=80), embedding_bits=8, skip="*.layer.1.output.dense")
    model[0].model.embeddings.word_embeddings = nn.Embedding(1100, 80)
    export_gguf(model, tmp_path / "model.gguf")
    equal_to(model, tmp_path / "model.gguf", names_of(BERT_LAYER, "encoder.layer", BERT_NAMES))


def test_bert_metadata(tmp_path):
    model = tritern.patch(bert(tmp_path, pooling="cls"))
    export_gguf(model, str(tmp_path / "model.gguf"))
    fields, _, _ = read(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "bert", "bert.block_count": 2, "bert.context_length": 40,
        "bert.embedding_length": 96, "bert.feed_forward_length": 256, "bert.attention.head_count": 4,
        "bert.attention.causal": False, "bert.pooling_type": 2, "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.token_type_count": 2, "tokenizer.ggml.bos_token_id": 4,
        "tokenizer.ggml.seperator_token_id": 3, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 1, "tokenizer.ggml.mask_token_id": 2,
    }  # fmt: skip
    assert {k: fields[k] for k in expected} == expected
    assert fields["bert.attention.layer_norm_epsilon"] == pytest.approx(1e-12)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:6] == ["[PAD]", "[UNK]", "[MASK]", "[SEP]", "[CLS]", "\u2581" + WORDS[0]]
    assert tokens[5 + len(WORDS)] == WORDS[0] and tokens[-1] == "\u2581[PAD1099]"
    assert len(tokens) == len(kinds) == 1100 and kinds[:6] == [3, 3, 3, 3, 3, 1] and kinds[-1] == 5


def wordpieces(text, fields):
    """llama.cpp's tokenizer: longest match in words that start with a mark."""
    ids = {token: i for i, token in reversed(list(enumerate(fields["tokenizer.ggml.tokens"])))}
    found = [fields["tokenizer.ggml.bos_token_id"]]
    for word in re.findall(r"\w+|[^\w\s]", text.lower()):
        word, pieces = "\u2581" + word, []
        while word:
            size = next((n for n in range(len(word), 0, -1) if word[:n] in ids), 0)
            if not size:
                pieces = [fields["tokenizer.ggml.unknown_token_id"]]
                break
            pieces.append(ids[word[:size]])
            word = word[size:]
        found += pieces
    return [*found, fields["tokenizer.ggml.seperator_token_id"]]


def bert_graph(ids, fields, w):
    """llama.cpp's graph of a BERT (src/models/bert.cpp), with exact gelu."""
    width, heads = fields["bert.embedding_length"], fields["bert.attention.head_count"]
    eps = fields["bert.attention.layer_norm_epsilon"]

    def norm(x, name):
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["token_embd.weight"][ids] + w["token_types.weight"][0] + w["position_embd.weight"][: len(ids)]
    x = norm(x, "token_embd_norm")
    for i in range(fields["bert.block_count"]):
        blk = f"blk.{i}"
        q, k, v = (linear(x, f"{blk}.attn_{n}").view(len(ids), heads, -1).transpose(0, 1) for n in "qkv")
        attention = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(len(ids), width)
        x = norm(x + linear(attention, f"{blk}.attn_output"), f"{blk}.attn_output_norm")
        x = norm(
            x + linear(F.gelu(linear(x, f"{blk}.ffn_up")), f"{blk}.ffn_down"), f"{blk}.layer_output_norm"
        )
    return F.normalize(x.mean(0), dim=0)


def test_a_bert_file_alone_gives_the_vectors(tmp_path):
    model = tritern.patch(bert(tmp_path), activation_bits=16)
    export_gguf(model, tmp_path / "model.gguf")
    fields, tensors, _ = read(tmp_path / "model.gguf")
    for text in (f"{WORDS[3]} {WORDS[0]}{WORDS[1]}{WORDS[2]}, unknowable {WORDS[7].upper()}!", WORDS[4]):
        ids = wordpieces(text, fields)
        assert ids == model.tokenizer(text)["input_ids"]
        vector = bert_graph(torch.tensor(ids), fields, tensors)
        cosine = F.cosine_similarity(vector, model.encode(text, convert_to_tensor=True), dim=0)
        assert cosine > 0.99999  # scales in float16


def test_qwen3_weights_and_metadata(tmp_path):
    model = tritern.patch(qwen3(tmp_path))
    path = tmp_path / "model.gguf"
    export_gguf(model, path)
    start = {"embed_tokens": "token_embd", "norm": "output_norm"}
    equal_to(model, path, names_of(QWEN3_LAYER, "layers", start))
    fields, _, _ = read(path)
    expected = {
        "qwen3.attention.head_count_kv": 2, "qwen3.attention.key_length": 128,
        "qwen3.attention.value_length": 128, "qwen3.rope.freq_base": 5000.0, "qwen3.pooling_type": 3,
        "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.eos_token_id": model.tokenizer.eos_token_id,
    }  # fmt: skip
    assert {k: fields[k] for k in expected} == expected


@pytest.mark.parametrize("ends", [True, False])
def test_transformers_reads_a_qwen3_file(tmp_path, ends):
    model = tritern.patch(qwen3(tmp_path, ends), activation_bits=16)
    (tmp_path / "gguf").mkdir()
    export_gguf(model, tmp_path / "gguf" / "model.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32
    ).model.eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    text = TEXTS[3]
    ids = model.tokenizer(text)["input_ids"]
    plain = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == plain and (plain != ids) == ends
    with torch.no_grad():
        vector = loaded(torch.tensor([ids]))[0][0, -1]
    cosine = F.cosine_similarity(vector, model.encode(text, convert_to_tensor=True), dim=0)
    assert cosine > 0.99999


def test_minilm(minilm, tmp_path):
    """The real model: all weights, its size, and vectors from the file alone."""
    model = tritern.patch(minilm, activation_bits=16, embedding_bits=8)
    path = tmp_path / "minilm.gguf"
    export_gguf(model, path)
    assert path.stat().st_size < 19_000_000
    fields, tensors, _ = read(path)
    ids = wordpieces(TEXTS[0], fields)
    assert ids == model.tokenizer(TEXTS[0])["input_ids"]
    vector = bert_graph(torch.tensor(ids), fields, tensors)
    assert vector @ model.encode(TEXTS[0], convert_to_tensor=True) > 0.99999


def refused(model, path, match):
    with pytest.raises(TriternError, match=match):
        export_gguf(model, path)
    assert not path.exists()


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    model = bert(tmp_path)
    refused(model, path, r"no ternary layers: call tritern.patch\(model\) first")
    refused(model[0].model, path, "takes a SentenceTransformer.*received BertModel")
    tritern.patch(model, embedding_bits=16)
    layer = model[0].model.encoder.layer[0].output.dense
    layer.weight_scale[3] = 1e6
    refused(
        model, path, "encoder.layer.0.output.dense.weight_scale has values beyond float16.* largest is 1e"
    )
    layer.weight_scale[3] = 1
    layer.norm = RMSNorm(256, 1e-6)
    refused(model, path, "encoder.layer.0.output.dense has an RMSNorm of its own")
    layer.norm = None
    words = model[0].model.bfloat16().embeddings.word_embeddings.weight
    words.data[3, 3] = -1e6
    refused(model, path, "embeddings.word_embeddings.weight has values beyond float16.* largest is 999424")
    model.append(Dense(96, 8))
    refused(model, path, "this one has Transformer, Pooling, Normalize, Dense")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(pooling="max"), "pooling_mode must be one of mean, cls, lasttoken; it is 'max'"),
        (dict(lower=False), "WordPiece tokenizer in lower case.* this one is WordPiece, lowercase=False"),
        (dict(accents=False), "without accents; this one is WordPiece, lowercase=True, strip_accents=False"),
        (dict(hidden_act="relu"), "hidden_act of a bert model must be 'gelu'.*; it is 'relu'"),
        (dict(is_decoder=True), "is_decoder of a bert model must be False.*; it is True"),
    ],
)
def test_other_berts_are_refused(tmp_path, change, match):
    refused(tritern.patch(bert(tmp_path, **change)), tmp_path / "model.gguf", match)


def test_other_families_are_refused(tmp_path):
    model = tritern.patch(bert(tmp_path))
    model[0].model.config.model_type = "mpnet"
    refused(model, tmp_path / "model.gguf", "families bert and qwen3; this model's is 'mpnet'")


def test_another_tokenizer_is_refused(tmp_path):
    from tokenizers import pre_tokenizers

    model = tritern.patch(qwen3(tmp_path))
    model.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    refused(model, tmp_path / "model.gguf", "must have Qwen2's BPE tokenizer")


def test_the_missing_package_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'tritern\[gguf\]'"):
        export_gguf(tiny, tmp_path / "model.gguf")
