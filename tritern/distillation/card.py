"""The model card of a distilled model, written from the record of its run."""

from __future__ import annotations

from typing import Any


def model_card(record: dict[str, Any]) -> str:
    """Markdown for README.md.

    Args:
        record: as ``distill`` writes it to distillation.json.
    """
    config, settings, data = record["config"], record["settings"], record["data"]
    recipe = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    quality = "\n".join(
        f"| {name} | {f['cosine']:.4f} | {f['overlap']:.1%} | {f['rank_correlation']:.4f} |"
        for name, f in record["fidelity"].items()
    )
    sizes = "\n".join(f"| {name} | {size / 1e6:.1f} MB |" for name, size in record["bytes"].items())
    minutes = record["seconds"] / 60
    versions = ", ".join(f"{name} {v}" for name, v in record["versions"].items())
    activations = "int8 per token" if config["activation_bits"] == 8 else "as they are"
    tables = "int8 per row" if config["embedding_bits"] == 8 else "as they were"
    return f"""---
library_name: sentence-transformers
tags: [sentence-transformers, tritern, ternary, distillation]
---

# Ternary version of {record["model"]}

{record["layers"]} linear layers hold weights in {{-1, 0, +1}}, two bits each, one scale per output row;
activations are {activations}, word embeddings {tables}.
Distilled from {record["teacher"]} with `tritern.distill`.

```python
import tritern  # registers the format
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
```

## Closeness to the teacher

On texts that were not trained on:

| | cosine | top-10 overlap | rank correlation |
|---|---|---|---|
{quality}

Scores published for the teacher do not hold for this model; measure it on your own task.

## Sizes

| | |
|---|---|
{sizes}

## Training

{data["texts"]:,} texts from {data["source"]}, {record["steps"]:,} steps in {minutes:.1f} minutes
on {record["device"]}; {versions}; {record["date"]}.

| setting | value |
|---|---|
{recipe}
"""
