"""Small random models of every family, built as their users load them, and the vectors they give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Router
from sentence_transformers.multi_vector_encoder import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from sentence_transformers.sparse_encoder.modules import (
    SparseAutoEncoder,
    SparseStaticEmbedding,
    SpladePooling,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.conftest import WORDS

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
TEXTS = [" ".join(WORDS[i : i + 4 + i]) for i in range(0, 24, 6)]
IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)) for i in range(3)
]

SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
TEXT = {**SIZES, "initializer_range": 0.2, "max_position_embeddings": 80}
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 16}
VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
TOWER = {**SIZES, "max_position_embeddings": 64}

BERT = hf.BertConfig(**TEXT)
TEXT_FAMILIES: dict[str, tuple[Any, str]] = {  # configuration and pooling
    "bert": (BERT, "cls"),
    "roberta": (hf.RobertaConfig(**TEXT), "mean"),
    "xlm-roberta": (hf.XLMRobertaConfig(**TEXT), "mean"),
    "mpnet": (hf.MPNetConfig(**TEXT), "mean"),
    "distilbert": (
        hf.DistilBertConfig(
            vocab_size=len(VOCABULARY), dim=32, n_layers=2, n_heads=2, hidden_dim=64, initializer_range=0.2
        ),
        "mean",
    ),
    "albert": (hf.AlbertConfig(**TEXT, embedding_size=16), "mean"),
    "electra": (hf.ElectraConfig(**TEXT, embedding_size=16), "mean"),
    "deberta-v2": (
        hf.DebertaV2Config(
            **TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16,
            share_att_key=True, norm_rel_ebd="layer_norm",
        ),
        "mean",
    ),
    "modernbert": (hf.ModernBertConfig(**TEXT, cls_token_id=2, sep_token_id=3), "cls"),
    "nomic-bert": (hf.NomicBertConfig(**TEXT), "mean"),
    "jina-embeddings-v3": (hf.JinaEmbeddingsV3Config(**TEXT), "mean"),
    "t5": (
        hf.T5Config(
            vocab_size=len(VOCABULARY), d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", initializer_factor=2.0,
        ),
        "mean",
    ),
    "qwen2": (hf.Qwen2Config(**TEXT, num_key_value_heads=1), "lasttoken"),
    "qwen3": (hf.Qwen3Config(**DECODER), "lasttoken"),
    "mistral": (hf.MistralConfig(**DECODER), "lasttoken"),
    "qwen3-moe": (
        hf.Qwen3MoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        "lasttoken",
    ),
    "gpt2": (hf.GPT2Config(vocab_size=len(VOCABULARY), n_embd=32, n_layer=2, n_head=2), "mean"),
}  # fmt: skip


def _size(**edges: int) -> dict[str, Any]:
    return {"size": edges, "crop_size": {"height": 32, "width": 32}}


IMAGE_FAMILIES: dict[str, tuple[Any, Callable[[Any], Any]]] = {  # configuration and processor of a tokenizer
    "clip": (
        hf.CLIPConfig(text_config=TOWER, vision_config=VISION, projection_dim=24, initializer_factor=5.0),
        lambda t: hf.CLIPProcessor(hf.CLIPImageProcessor(**_size(shortest_edge=32)), t),
    ),
    "siglip": (
        hf.SiglipConfig(text_config=TOWER, vision_config=VISION),
        lambda t: hf.SiglipProcessor(hf.SiglipImageProcessor(**_size(height=32, width=32)), t),
    ),
    "siglip2": (
        hf.Siglip2Config(
            text_config=TOWER,
            vision_config={
                **{k: v for k, v in VISION.items() if k != "image_size"},
                "patch_size": 16,
                "num_patches": 4,
            },
        ),
        lambda t: hf.Siglip2Processor(hf.Siglip2ImageProcessor(patch_size=16, max_num_patches=4), t),
    ),
    "vit": (
        hf.ViTConfig(**VISION, initializer_range=0.2),
        lambda t: hf.ViTImageProcessor(**_size(height=32, width=32)),
    ),
    "dinov2": (
        hf.Dinov2Config(
            **{k: v for k, v in VISION.items() if k != "intermediate_size"},
            mlp_ratio=2,
            initializer_range=0.2,
        ),
        lambda t: hf.BitImageProcessor(**_size(shortest_edge=32)),
    ),
}


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Words separated by spaces, between [CLS] and [SEP]."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=64,
    )  # fmt: skip


def transformer(
    folder: Path,
    config: Any,
    auto: Any = hf.AutoModel,
    processor: Any = None,
    task: Any = "feature-extraction",
) -> Transformer:
    """A sentence-transformers Transformer around a random model of the configuration."""
    model = hf.T5EncoderModel(config) if config.model_type == "t5" else auto.from_config(config)
    model.save_pretrained(folder)
    (processor or tokenizer()).save_pretrained(folder)
    return Transformer(str(folder), transformer_task=task)


def _text(name: str) -> Callable[[Path], SentenceTransformer]:
    config, pooling = TEXT_FAMILIES[name]
    return lambda folder: SentenceTransformer(
        modules=[transformer(folder, config), Pooling(32, pooling)], device="cpu"
    )


def _image(name: str) -> Callable[[Path], SentenceTransformer]:
    def build(folder: Path) -> SentenceTransformer:
        config, processor = IMAGE_FAMILIES[name]
        first = transformer(folder, config, processor=processor(tokenizer()))
        whole = first.module_output_name == "sentence_embedding"
        return SentenceTransformer(modules=[first] if whole else [first, Pooling(32, "mean")], device="cpu")

    return build


def _embedding_gemma(folder: Path) -> SentenceTransformer:
    modules = [transformer(folder, hf.Gemma3TextConfig(**DECODER)), Pooling(32, "mean")]
    modules += [Dense(32, 64, bias=False, activation_function=None), Dense(64, 32, activation_function=None)]
    return SentenceTransformer(modules=[*modules, Normalize()], device="cpu")


def _router(folder: Path) -> SentenceTransformer:
    query = [transformer(folder / "query", BERT), Pooling(32, "mean")]
    document = [transformer(folder / "document", hf.MPNetConfig(**TEXT)), Pooling(32, "mean")]
    return SentenceTransformer(modules=[Router.for_query_document(query, document)], device="cpu")


def _cross_encoder(config: Any) -> Callable[[Path], CrossEncoder]:
    def build(folder: Path) -> CrossEncoder:
        transformer(folder, config, hf.AutoModelForSequenceClassification, task="sequence-classification")
        return CrossEncoder(str(folder), device="cpu")

    return build


def _splade(config: Any) -> Callable[[Path], SparseEncoder]:
    def build(folder: Path) -> SparseEncoder:
        first = transformer(folder, config, hf.AutoModelForMaskedLM, task="fill-mask")
        return SparseEncoder(modules=[first, SpladePooling("max")], device="cpu")

    return build


def _splade_router(folder: Path) -> SparseEncoder:
    """Queries without a transformer."""
    query = [SparseStaticEmbedding(tokenizer(), weight=torch.rand(len(VOCABULARY)))]
    document = [transformer(folder, BERT, hf.AutoModelForMaskedLM, task="fill-mask"), SpladePooling("max")]
    return SparseEncoder(modules=[Router.for_query_document(query, document)], device="cpu")


def _csr(folder: Path) -> SparseEncoder:
    modules = [transformer(folder, BERT), Pooling(32, "mean"), SparseAutoEncoder(32, 64, k=16, k_aux=16)]
    return SparseEncoder(modules=modules, device="cpu")


def _colbert(folder: Path) -> MultiVectorEncoder:
    dense = Dense(32, 16, bias=False, activation_function=None, module_input_name="token_embeddings")
    return MultiVectorEncoder(modules=[transformer(folder, BERT), dense, MultiVectorMask()], device="cpu")


def _static(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer(), embedding_dim=32)], device="cpu")


def _custom_code(folder: Path) -> SentenceTransformer:
    """A model whose class comes with the checkpoint."""
    (folder / "own").mkdir(parents=True)
    copyfile(Path(__file__).parent / "own_model.py", folder / "own" / "own_model.py")
    tokenizer().save_pretrained(folder / "own")
    (folder / "own" / "config.json").write_text(
        '{"model_type": "own", "hidden_size": 32, "vocab_size": 145, "auto_map": '
        '{"AutoConfig": "own_model.OwnConfig", "AutoModel": "own_model.OwnModel"}}'
    )
    trust = {"trust_remote_code": True}
    config = hf.AutoConfig.from_pretrained(folder / "own", **trust)
    model = hf.AutoModel.from_config(config, **trust)
    state = {n: p * 5 for n, p in model.state_dict().items()}
    model.save_pretrained(folder / "own", state_dict=state)
    first = Transformer(str(folder / "own"), model_kwargs=trust, processor_kwargs=trust, config_kwargs=trust)
    return SentenceTransformer(modules=[first, Pooling(32, "mean")], device="cpu")


BUILDERS: dict[str, Callable[[Path], Any]] = {
    **{name: _text(name) for name in TEXT_FAMILIES},
    **{name: _image(name) for name in IMAGE_FAMILIES},
    "embedding-gemma": _embedding_gemma,
    "router": _router,
    "static": _static,
    "cross-encoder-bert": _cross_encoder(hf.BertConfig(**TEXT, num_labels=1)),
    "cross-encoder-roberta": _cross_encoder(hf.RobertaConfig(**TEXT, num_labels=1)),
    "cross-encoder-modernbert": _cross_encoder(hf.ModernBertConfig(**TEXT, num_labels=1)),
    "splade-bert": _splade(BERT),
    "splade-distilbert": _splade(TEXT_FAMILIES["distilbert"][0]),
    "splade-modernbert": _splade(TEXT_FAMILIES["modernbert"][0]),
    "splade-router": _splade_router,
    "csr": _csr,
    "colbert": _colbert,
    "custom-code": _custom_code,
}  # fmt: skip


def build(name: str, folder: Path) -> Any:
    """The unpatched model of a family; its parts are written below ``folder``."""
    torch.manual_seed(0)
    return BUILDERS[name](folder).eval()


def load(name: str, folder: Path) -> Any:
    """A saved model of a family."""
    kinds = {
        "cross-": CrossEncoder,
        "splade": SparseEncoder,
        "csr": SparseEncoder,
        "colber": MultiVectorEncoder,
    }
    kind = kinds.get(name[:6], SentenceTransformer)
    return kind(str(folder), device="cpu", trust_remote_code=name == "custom-code")


def vectors(model: Any) -> np.ndarray:
    """All that a model gives for the texts and the images, flat."""
    if isinstance(model, CrossEncoder):
        found = [model.predict([(TEXTS[0], t) for t in TEXTS])]
    elif isinstance(model, SparseEncoder):
        both = [model.encode_query(TEXTS), model.encode_document(TEXTS)]
        found = [v.to_dense().numpy() for v in both]
    elif isinstance(model, MultiVectorEncoder) or isinstance(model[0], Router):
        both = [model.encode_query(TEXTS), model.encode_document(TEXTS)]
        found = [torch.as_tensor(v).numpy() for part in both for v in part]
    else:
        modalities = getattr(model[0], "modality_config", {"text": {}})
        found = [
            model.encode(inputs) for m, inputs in (("text", TEXTS), ("image", IMAGES)) if m in modalities
        ]
    return np.concatenate([np.ravel(f) for f in found])
