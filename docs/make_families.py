"""Write the table of model families: ``python docs/make_families.py`` writes docs/families.md.

It builds models on the meta device from the public sizes below, so it needs no weights. ``tritern.patch``
decides what is patched. The script runs the examples and writes their output below them.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from sentence_transformers.base.modules import Dense
from torch import nn

from tritern.selection import matrices_of, others, select_linears, select_tables, starred
from tritern_kernels import padded_k

TARGET = Path(__file__).parent / "families.md"
LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
XLM_R: dict[str, Any] = {"vocab_size": 250002, "type_vocab_size": 1}
QWEN3: dict[str, Any] = {"vocab_size": 151669, "num_hidden_layers": 28, "num_attention_heads": 16}
DEBERTA_BASE: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A family, checkpoints of one size, and the configuration that has it; ``more`` are modules behind."""

    family: str
    checkpoints: str
    config: Callable[[], Any]
    more: Callable[[], list[nn.Module]] = list


ROWS = [
    Row("BERT", "all-MiniLM-L6-v2", lambda: hf.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)),
    Row("BERT", "e5-base-v2, bge-base-en-v1.5", hf.BertConfig),
    Row("BERT", "e5-large-v2, bge-large-en-v1.5", lambda: hf.BertConfig(**LARGE)),
    Row("RoBERTa", "all-distilroberta-v1", lambda: hf.RobertaConfig(
        num_hidden_layers=6, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)),
    Row("XLM-R", "multilingual-e5-base", lambda: hf.XLMRobertaConfig(**XLM_R, max_position_embeddings=514)),
    Row("XLM-R", "bge-m3", lambda: hf.XLMRobertaConfig(**XLM_R, **LARGE, max_position_embeddings=8194)),
    Row("MPNet", "all-mpnet-base-v2", lambda: hf.MPNetConfig(max_position_embeddings=514)),
    Row("DistilBERT", "multi-qa-distilbert-cos-v1", hf.DistilBertConfig),
    Row("ALBERT", "paraphrase-albert-small-v2", lambda: hf.AlbertConfig(
        hidden_size=768, num_hidden_layers=6, num_attention_heads=12, intermediate_size=3072)),
    Row("ELECTRA", "electra-small-discriminator", hf.ElectraConfig),
    Row("DeBERTa", "deberta-v3-base", lambda: hf.DebertaV2Config(**DEBERTA_BASE)),
    Row("ModernBERT", "gte-modernbert-base", hf.ModernBertConfig),
    Row("NomicBERT", "nomic-embed-text-v1.5", hf.NomicBertConfig),
    Row("Jina v3", "jina-embeddings-v3-hf", hf.JinaEmbeddingsV3Config),
    Row("T5 encoder", "sentence-t5-base, gtr-t5-base", lambda: hf.T5Config(
        d_model=768, d_ff=3072, num_layers=12, num_heads=12), lambda: [Dense(768, 768, bias=False)]),
    Row("Qwen3", "Qwen3-Embedding-0.6B", lambda: hf.Qwen3Config(
        **QWEN3, hidden_size=1024, intermediate_size=3072, num_key_value_heads=8, head_dim=128)),
    Row("Mistral", "e5-mistral-7b-instruct", hf.MistralConfig),
    Row("Gemma 3", "embeddinggemma-300m", lambda: hf.Gemma3TextConfig(
        vocab_size=262144, hidden_size=768, intermediate_size=1152, num_hidden_layers=24,
        num_attention_heads=3, num_key_value_heads=1, head_dim=256),
        lambda: [Dense(768, 3072, bias=False), Dense(3072, 768, bias=False)]),
    Row("CLIP", "clip-ViT-B-32", hf.CLIPConfig),
    Row("SigLIP", "siglip-base-patch16-224", hf.SiglipConfig),
    Row("SigLIP 2", "siglip2-base-patch16-naflex", lambda: hf.Siglip2Config(
        text_config={"vocab_size": 256000})),
    Row("ViT", "vit-base-patch16-224", hf.ViTConfig),
    Row("DINOv2", "dinov2-base", lambda: hf.Dinov2Config(image_size=518)),
]  # fmt: skip


def built(row: Row) -> nn.Module:
    """The row's model, on the meta device."""
    config = row.config()
    with torch.device("meta"):
        model = hf.T5EncoderModel(config) if config.model_type == "t5" else hf.AutoModel.from_config(config)
        return nn.Sequential(model, *row.more())


def table_row(row: Row) -> list[str]:
    """The cells of a family."""
    model = built(row)
    linears = list(select_linears(model))
    chosen = [c.module for c in linears if not c.reason]
    left = [*(c for c in linears if c.reason), *others(model)]
    ternary = sum(m.weight.numel() for m in chosen if isinstance(m, nn.Linear))
    matrices = ternary + sum(p.numel() for c in left for p in matrices_of(c.module).values())
    total = sum(p.numel() for p in model.parameters())
    packed = sum(
        m.out_features * (padded_k(m.in_features) // 4 + 4) for m in chosen if isinstance(m, nn.Linear)
    )
    after = 2 * (total - ternary) + packed
    tables = [c.module for c in select_tables(model) if not c.reason]
    values = sum(t.weight.numel() - 2 * t.num_embeddings for t in tables if isinstance(t, nn.Embedding))
    reasons: dict[str, dict[str, None]] = {}
    for c in left:
        reasons.setdefault(_plain(c.reason), {})[f"`{_short(c.name)}`"] = None
    why = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in reasons.items())
    return [
        row.family,
        row.checkpoints,
        f"{total / 1e6:,.1f} M",
        f"{len(chosen)} of {len(linears)}",
        why or "nothing",
        f"{ternary / matrices:.1%}",
        f"{ternary / total:.1%}",
        f"{2 * total / 1e6:,.1f}",
        f"{after / 1e6:,.1f}",
        f"{(after - values) / 1e6:,.1f}",
    ]


def _short(name: str) -> str:
    """The name within a block, or within the model where there is none."""
    return starred(name).removeprefix("*.").rpartition(".*.")[2]


def _plain(reason: str) -> str:
    """The reason without shapes; a class says enough."""
    for words in ("not a linear layer: ", "subclass of nn.Linear: "):
        reason = reason.removeprefix(words)
    return reason.partition(" (")[0]


HEADER = [
    "family", "checkpoints", "parameters", "linear layers ternary", "left as they are", "of matrices",
    "of parameters", "fp16, MB", "ternary, MB", "and int8 tables, MB",
]  # fmt: skip

INTRODUCTION = """# Model families

`tritern.patch` takes a `SentenceTransformer`, a `CrossEncoder`, a `SparseEncoder`, a `MultiVectorEncoder`
or any `torch.nn.Module`. The tests build a small model of each family below, patch it, save it, load it in
another process and compare the vectors bit for bit. They do the same with Qwen2, routers of two encoders,
rerankers, SPLADE and CSR, late interaction, mixtures of experts, and code that comes with a checkpoint.

Sizes are those of the weights: *fp16* at two bytes a value, *ternary* after
`tritern.patch(model, embedding_bits=16)`, *and int8 tables* after `tritern.patch(model)`, with 16 bits for
what is not packed. *Of matrices* is the share of ternary weights among the weights of linear layers and of
modules in their place. *Of parameters* is their share among all parameters. The remaining parts are
small, lie next to the input or the output, or could not be loaded again.
"""

NOTES = """
Several modules share T5's word table, so it is not rounded. Gemma's table, which multiplies its rows, is
rounded. ALBERT's layers share their weights, and each weight is stored once. SigLIP, CLIP and other models of
text and images have both halves patched. A head is the part that a transformers model has around its base
model, under any name.

(`python docs/make_families.py`; sizes from the public configurations, on the meta device.)

## What is not patched

`tritern.summary(model)` lists everything that stays in full precision, with its size and the reason:

- matrices that are no `nn.Linear`: fused experts, `Conv1D`, `nn.MultiheadAttention`, convolutions,
  `nn.LSTM`, `nn.Bilinear` and others;
- subclasses of `nn.Linear`, since they have their own `forward`;
- layers whose weight another module reads;
- layers in sentence-transformers' own modules, which could not load them.
"""

EXAMPLES = [
    """import torch
import transformers
import tritern
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4)
        self.mix = nn.Bilinear(64, 64, 8)
        self.memory = nn.LSTM(64, 64)
        self.up = nn.Linear(64, 256)
        self.tied = nn.Linear(64, 64)

    def forward(self, x):
        return nn.functional.linear(self.up(x)[..., :64], self.tied.weight.t())

summary = tritern.summary(tritern.patch(nn.Sequential(Block(), Block()), skip="1.up"))
print("\\n".join(line for line in str(summary).splitlines() if line.startswith("not")))""",
    "A model without any `nn.Linear` to patch raises an error:",
    """sizes = dict(vocab_size=100, bos_token_id=1, eos_token_id=2)
tritern.patch(transformers.GPT2Model(transformers.GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=2)))""",
    "There is a warning if the larger part of a model's matrices is no `nn.Linear`, as with experts:",
    """import warnings

sizes.update(hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
config = transformers.Qwen3MoeConfig(**sizes, num_experts=8)
with warnings.catch_warnings(record=True) as caught:
    tritern.patch(transformers.Qwen3MoeModel(config))
print(caught[-1].message)""",
    """## Adapters

Merge LoRA or other adapters of peft before you patch. A model that carries them raises an error:""",
    """from peft import LoraConfig, get_peft_model

config = transformers.BertConfig(**sizes)
adapted = get_peft_model(transformers.BertModel(config), LoraConfig(target_modules=["query", "value"]))
tritern.patch(adapted)""",
    """summary = tritern.summary(tritern.patch(adapted.merge_and_unload()))
print(len(summary.layers))""",
    """On a ternary model LoRA trains beside the codes, which stay fixed. peft must know that it may adapt
these layers. `tritern.adapters.lora` (extra `lora`) tells it, for a new configuration or a loaded one:""",
    """from tritern.adapters import lora

model = tritern.patch(transformers.BertModel(config))
model.add_adapter(lora(LoraConfig(target_modules=["query", "value"])))
print(sum(p.numel() for p in model.parameters() if p.requires_grad))""",
    """A model with adapters saves only the adapters and the name of the folder that it was loaded from. Save
the ternary model, load it, then adapt it. Adapters of a model that is ternary in memory only are not saved.
An adapter cannot be merged into ternary weights. tritern refuses variants that read weights, such as DoRA.
""",
]
"""Prose and code. Prose begins with a capital or with #."""


def page() -> str:
    """The text of docs/families.md."""
    rows = [HEADER, ["---"] * 2 + ["---:"] * 2 + ["---"] + ["---:"] * 5, *map(table_row, ROWS)]
    parts = [INTRODUCTION, *(f"| {' | '.join(cells)} |" for cells in rows), NOTES]
    namespace: dict[str, Any] = {}
    for example in EXAMPLES:
        if example[0].isupper() or example[0] == "#":
            parts.append(f"{example}\n")
        else:
            parts.append(f"```python\n{example}\n```\n\n```text\n{_output(example, namespace)}\n```\n")
    return "\n".join(parts).rstrip() + "\n"


def _output(code: str, namespace: dict[str, Any]) -> str:
    """What the code prints, or its error."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            exec(code, namespace)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return output.getvalue().strip()


if __name__ == "__main__":
    TARGET.write_text(page())
