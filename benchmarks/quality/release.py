"""Make the model that comes with the package, from the training text to the checkpoint.

    python benchmarks/quality/release.py texts DIR sentences.txt   text with an open licence
    python examples/distill_e5.py --model packaged --texts sentences.txt --limit 650000 --output RUN --bf16 \\
        --steps 2284 --learning_rate 1e-3 --per_device_train_batch_size 512 --max_length 256 --holdout 2000 \\
        --joined-ratio 0.15 --logging_steps 100 --save_strategy no --dataloader_num_workers 10
    python benchmarks/quality/release.py pack RUN --embedding-bits 4 --source "the first 650,000 lines" \\
        --record record.json --figure curve.png
    python benchmarks/quality/scores.py --data DIR --update-cards \\
        --ternary minilm-l6-ternary=minilm-l6-ternary

DIR/train/sentences.txt.zst holds one text a line and DIR/train/sources.txt.gz the letter of its source, one
of SOURCES. The run of the model in the package took 7.5 minutes on an H200, with cuDNN's attention switched
off (``torch.backends.cuda.enable_cudnn_sdp(False)``) and the tokens counted by the tokenizer's Rust part.
``pack`` takes the model of the last of the runs named, rounds its embedding table to --embedding-bits, and
writes it with a card that names what it was trained on.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import report

NAME = "minilm-l6-ternary"
MODELS = Path(__file__).parents[1] / "tritern" / "models"
MOST_BYTES = 11_500_000


class Source(NamedTuple):
    """Where training text comes from; without an open licence it is left out."""

    name: str
    repository: str
    licence: str | None


SOURCES = {
    "W": Source("Open English WordNet", "globalwordnet/english-wordnet", "CC BY 4.0, WordNet licence"),
    "F": Source("Flickr30k captions", "multi30k/dataset", None),
    "N": Source("novels up to 1924", "computationalstylistics/100_english_novels", "public domain"),
    "P": Source(
        "Wikipedia articles of the IBM Debater claim stance set",
        "cchang-vassar/Semantic-Relations-in-Vector-Embeddings",
        "CC BY-SA 3.0",
    ),
    "D": Source(
        "Schema-Guided Dialogue", "google-research-datasets/dstc8-schema-guided-dialogue", "CC BY-SA 4.0"
    ),
    "M": Source("MedQuAD, without the topics it is measured on", "abachaa/MedQuAD", "CC BY 4.0"),
    "B": Source(
        "biomedical abstracts and articles",
        "cambridgeltl/MTL-Bioinformatics-2016",
        "CC BY 4.0, CC BY 3.0, CC BY-SA 3.0, US public domain",
    ),
    "Y": Source("Python Enhancement Proposals", "python/peps", "public domain, CC0"),
    "T": Source("OpenTriviaQA", "uberspot/OpenTriviaQA", "CC BY-SA 4.0"),
    "X": Source("WikiSplit", "google-research-datasets/wiki-split", "CC BY-SA 4.0"),
    "R": Source("SciTLDR", "allenai/scitldr", "Apache 2.0"),
    "S": Source(
        "SNLI, dev and test; premises are captions of Flickr30k", "robertoviegas/SimCSE", "CC BY-SA 4.0"
    ),
    "Q": Source("Query-wellformedness", "google-research-datasets/query-wellformedness", "CC BY-SA 4.0"),
    "C": Source("CIA World Factbook", "factbook/factbook.json", "public domain"),
}
"""By the letter in sources.txt.gz."""

CARD = """---
library_name: sentence-transformers
license: apache-2.0
language: en
base_model: sentence-transformers/all-MiniLM-L6-v2
tags: [sentence-transformers, sentence-similarity, tritern, ternary, distillation]
---

# {name}

all-MiniLM-L6-v2 with weights in {{-1, 0, +1}}: {layers} linear layers of two bits a weight with int8
activations, word embeddings in {tables}, the rest in 16 bits; {megabytes:.1f} MB on disk. It
maps English sentences and short paragraphs, up to 256 tokens, to 384 dimensions.

```python
import tritern

model = tritern.load("{name}")     # comes with the package
vectors = model.encode(["Ternary weights, the same API."])
```

Its vectors are close to those of the original and not the same: index and query with one model. It was
distilled from the original's vectors alone, on English text.{rounded}

## Trained on

Text without labels, of sources with an open licence:

| source | taken from | licence |
|---|---|---|
{sources}

None of it is text of the sets below (lines equal to one of theirs, or sharing 13 words, had been removed).

{sections}
"""


def write_texts(data: Path, out: Path) -> dict[str, int]:
    """Write the texts of sources with a licence, one a line; the number of lines by source.

    Raises:
        ValueError: files that do not belong together, or a source that is not known.
    """
    import zstandard

    count, partial = dict.fromkeys(SOURCES, 0), out.with_name(out.name + ".partial")
    with (
        gzip.open(data / "train" / "sources.txt.gz", "rt") as letters,
        (data / "train" / "sentences.txt.zst").open("rb") as compressed,
        partial.open("w", encoding="utf-8", newline="\n") as file,
    ):
        stream = zstandard.ZstdDecompressor().stream_reader(compressed)
        texts = io.TextIOWrapper(stream, encoding="utf-8", newline="\n")
        for letter, text in zip(letters, texts, strict=True):
            if (letter := letter.strip()) not in SOURCES:
                raise ValueError(f"{data}: a text of source {letter!r}; known are {', '.join(SOURCES)}")
            if SOURCES[letter].licence:
                file.write(text)
                count[letter] += 1
    partial.replace(out)
    return count


ROUNDED = """ It was trained with word embeddings in {before}, which
were then rounded to {after}. Closeness and sizes below are of before that rounding, scores of after it."""


def card(records: list[dict[str, Any]], model: Any, size: int) -> str:
    """Markdown for the README.md of the shipped model, from the records of its runs in order."""
    import tritern
    from tritern.checkpoint.card import ROUNDED_TABLES
    from tritern.distillation.card import model_card

    found = tritern.summary(model)
    bits = records[-1]["config"]["embedding_bits"], next((t.bits for t in found.tables), 16)
    trained, shipped = (ROUNDED_TABLES.get(n, "16 bits") for n in bits)

    rows = [
        f"| {s.name} | [{s.repository}](https://github.com/{s.repository}) | {s.licence} |"
        for s in SOURCES.values()
        if s.licence
    ]
    closeness = {stage: f for record in records for stage, f in record["fidelity"].items()}
    *parts, training = model_card(records[-1] | {"fidelity": closeness}).split("\n## ")[1:]
    earlier = [model_card(record).split("\n## ")[-1] for record in records[:-1]]
    for i, text in enumerate((*earlier, training), 1):
        number = f", run {i} of {len(records)}" if earlier else ""
        parts.append(text.replace("Training", f"Training{number}", 1))
    sections = [f"## {part}" for part in parts]
    return CARD.format(
        name=NAME,
        layers=len(found.layers),
        tables=shipped,
        rounded="" if trained == shipped else ROUNDED.format(before=trained, after=shipped),
        megabytes=size / 1e6,
        sources="\n".join(rows),
        sections="\n".join(sections).rstrip(),
    )


def pack(
    runs: list[Path], folder: Path, embedding_bits: int | None = None, source: str | None = None
) -> list[dict[str, Any]]:
    """Write the model of the last of its runs into a folder as it is shipped, and give the runs' records.

    ``embedding_bits`` are those of its table, if others than it was trained with, and ``source`` says what
    texts of the training text the runs took, where their records do not.

    Raises:
        ValueError: it would be too large.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    import tritern
    from tritern.checkpoint.digest import sealed
    from tritern.distillation.record import RECORD_FILE

    records = [json.loads((run / RECORD_FILE).read_text(encoding="utf-8")) for run in runs]
    for record in records:
        record["data"]["source"] = source or Path(record["data"]["source"]).name
        settings = record["settings"]
        batches = settings.get("gradient_accumulation_steps", 1)
        record["texts_per_step"] = settings.get("per_device_train_batch_size", 8) * batches
    model = SentenceTransformer(str(runs[-1]), device="cpu", model_kwargs={"dtype": torch.float16})
    if embedding_bits:
        tritern.patch(model, embedding_bits=embedding_bits)
    with tempfile.TemporaryDirectory() as scratch:
        saved, whole = Path(scratch) / "saved", Path(scratch) / NAME
        model.save_pretrained(str(saved))
        config = saved / "config.json"  # on a CPU one computes in float32
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
        with sealed(whole):
            shutil.copytree(saved, whole)
        size = sum(f.stat().st_size for f in whole.rglob("*") if f.is_file())
        if size > MOST_BYTES:
            raise ValueError(f"the model takes {size:,} bytes; at most {MOST_BYTES:,} are shipped")
        (whole / "README.md").write_text(card(records, model, size), encoding="utf-8")
        for file in whole.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        whole.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
    return records


CURVES = (
    ("eval_fidelity_cosine", "cosine to the original's vectors, held-out texts"),
    ("eval_fidelity_overlap", "nearest 10 of them shared with the original"),
    ("cosine", "1 - cosine to the original's vectors, training texts"),
)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """The learning curve of runs in order: closeness, on the held-out texts too where it was evaluated, and
    the loss.
    """
    pyplot, settings = report.load_pyplot(), records[0]["settings"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    starts = [sum(record["steps"] for record in records[:i]) for i in range(len(records))]

    def points(key: str) -> list[tuple[int, float]]:
        runs = zip(starts, records)
        return [(start + e["step"], e[key]) for start, record in runs for e in record["log"] if key in e]

    for key, label in CURVES:
        if points(key):
            axes.plot(*zip(*points(key)), marker="o", markersize=3, label=label)
    faded = f"loss; per-token terms x {settings['layer_fade']:g} from {settings['layer_fade_start']:.0%} on"
    axes.plot(*zip(*points("loss")), color="gray", alpha=0.4, linewidth=0.7, label=faded)
    blended = settings["blend_ratio"] * records[0]["steps"]
    axes.axvline(blended, color="black", linewidth=0.8, linestyle=":", label="from here on wholly ternary")
    for start in starts[1:]:
        axes.axvline(start, color="black", linewidth=0.8, linestyle="--", label="the next run begins")
    axes.set_xlabel(f"steps of {records[0]['texts_per_step']} texts")
    axes.set_ylim(0, 1 if points(CURVES[0][0]) else None)
    axes.set_title(f"{NAME}: distillation")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    verbs = parser.add_subparsers(dest="verb", required=True)
    texts = verbs.add_parser("texts", help="write the training text")
    texts.add_argument("data", type=Path, metavar="DIR")
    texts.add_argument("to", type=Path, metavar="FILE")
    packing = verbs.add_parser("pack", help="write the shipped model")
    packing.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of its runs, in order")
    packing.add_argument("--to", type=Path, default=MODELS / NAME, help="default: into the package")
    packing.add_argument("--embedding-bits", type=int, choices=(4, 8), help="default: as trained")
    packing.add_argument("--source", help="the texts that the runs took, for the card; default: as recorded")
    packing.add_argument("--record", type=Path, metavar="FILE.json", help="also write the record of the run")
    packing.add_argument("--figure", type=Path, metavar="FILE.png", help="also draw its learning curve")
    options = parser.parse_args()
    try:
        if options.verb == "texts":
            for letter, lines in write_texts(options.data, options.to).items():
                print(f"{lines:8,} {SOURCES[letter].name}" + ("" if lines else ": left out, no licence"))
        else:
            records = pack(options.runs, options.to, options.embedding_bits, options.source)
            if options.record:
                report.write_json(options.record, {"runs": records})
            if options.figure:
                draw(records, options.figure)
            print(f"{options.to}: the model of {sum(record['steps'] for record in records):,} steps")
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
