"""The model card of a distilled model, written from the record of its run."""

from __future__ import annotations

from typing import Any

from ..checkpoint.card import ROUNDED_TABLES


def model_card(record: dict[str, Any]) -> str:
    """Markdown for README.md.

    Args:
        record: as ``distill`` writes it to distillation.json.
    """
    config, settings, data = record["config"], record["settings"], record["data"]
    options = {k: v for k, v in data.items() if k not in ("source", "texts") and v not in (None, [])}
    recipe = "\n".join(f"| {name} | {value} |" for name, value in (config | options | settings).items())
    quality = "\n".join(
        f"| {name} | {f['cosine']:.4f} | {f['overlap']:.1%} | {f['rank_correlation']:.4f} |"
        for name, f in record["fidelity"].items()
    )
    if quality:
        quality = f"| | cosine | top-10 overlap | rank correlation |\n|---|---|---|---|\n{quality}"
        quality = f"On texts that were not trained on:\n\n{quality}"
    sizes = "\n".join(f"| {name} | {size / 1e6:.1f} MB |" for name, size in record["bytes"].items())
    minutes = f"{record['seconds'] / 60:.1f} minutes"
    if record["resumed_from"]:
        minutes += f" since it was resumed from {record['resumed_from']}"
    versions = ", ".join(f"{name} {v}" for name, v in record["versions"].items())
    activations = "int8 per token" if config["activation_bits"] == 8 else "as they are"
    tables = ROUNDED_TABLES.get(config["embedding_bits"], "as they were")
    on = f", going on from {record['trained_on_from']}" if "trained_on_from" in record else ""
    named = f"\nbase_model: {record['base_model']}" if record["base_model"] else ""
    return f"""---
library_name: sentence-transformers{named}
tags: [sentence-transformers, tritern, ternary, distillation]
---

# Ternary version of {record["model"]}

{record["layers"]} linear layers hold weights in {{-1, 0, +1}}, two bits each, and one scale per output row:
{record["bits_per_weight"]:.2f} bits per weight;
activations are {activations}, word embeddings {tables}.
Distilled from {record["teacher"]} with `tritern.distill`{on}.

```python
import tritern  # registers the format
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
```

## Closeness to the teacher

{quality or "Not measured: no texts were held out of training."}

Scores published for the teacher do not hold for this model; measure it on your own task.

## Sizes

| | |
|---|---|
{sizes}

## Training

{data["texts"]:,} texts from {data["source"]}, {record["steps"]:,} steps in {minutes}
on {record["device"]}; {versions}; {record["date"]}.

| setting | value |
|---|---|
{recipe}
"""
