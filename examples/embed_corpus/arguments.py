"""Arguments of ``embed_with_ray.py``."""

from __future__ import annotations

import argparse
import glob
from pathlib import Path

from .shards import BEGUN
from .texts import SUFFIXES

EXAMPLES = """examples:
  # this machine: every line of the files, into shards and an index
  embed_with_ray.py 'corpus/*.txt' --model minilm-ternary --output shards --index notes.index

  # a model of the hub, made ternary on the way; a column of Parquet files with ids of their own
  embed_with_ray.py abstracts.parquet --column abstract --id-column doi --model intfloat/e5-small-v2 \\
      --patch --output shards

  # several machines: `ray start --head` on the first, `ray start --address=FIRST:6379` on the others, then
  embed_with_ray.py '/shared/corpus/*.parquet' --model /shared/e5-ternary --output /shared/shards \\
      --address auto

  # an index of shards that are there already
  embed_with_ray.py --output shards --index notes.index --kind ivf-flat

The files are embedded in parts of --part-mb, each with a folder of shards that has its name once it is whole.
The same command goes on after an interruption, and embeds files that were added since. (Ray itself repeats
the work of a machine that goes away during a run.) If the making of an index is interrupted, delete the
index: it is made of the shards, without embedding again."""


def parse(description: str | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=EXAMPLES, formatter_class=form)
    add = parser.add_argument
    add("texts", nargs="*", help=f"files or patterns, {', '.join(SUFFIXES)} (.txt: one text a line)")
    add("--model", metavar="NAME", help="folder or hub name of a sentence-transformer, ternary or not")
    add("--patch", action="store_true", help="make the model ternary, without training")
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of what is not ternary (default: as saved)",
    )
    add("--column", default="text", help="of .jsonl and .parquet: the texts (default: text)")
    add("--id-column", help="of .jsonl and .parquet: ids, unique in all files (default: file and row)")
    add("--output", metavar="FOLDER", required=True, help="for the shards: new, or what --index shall read")
    add("--rows-per-shard", metavar="N", type=int, default=100_000, help="at least (default: 100,000)")
    add("--part-mb", metavar="MB", type=float, default=1000.0, help="of files, in one go (default: 1000)")
    add("--index", metavar="FOLDER", help="build a search index of the shards here")
    add("--kind", default="flat", help="of the index: flat, ivf-flat, ivf-pq, hnsw ... (default: flat)")
    add("--address", help="of a Ray cluster, or auto (default: this machine alone)")
    add("--actors", metavar="N", type=int, help="copies of the model (default: one a GPU, else one a CPU)")
    args = parser.parse_args()
    for name in ("rows_per_shard", "actors"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; received {getattr(args, name)}")
    if not args.part_mb > 0:
        parser.error(f"--part-mb must be more than 0; received {args.part_mb}")
    if args.texts and not args.model:
        parser.error("name the model to embed with: --model")
    if not args.texts and not args.index:
        parser.error("name texts to embed, or an --index to build of the shards in --output")
    if args.index and Path(args.index).exists():
        parser.error(f"--index {args.index} is there already: name a new folder, or delete it")
    return args


def find(patterns: list[str], output: str) -> list[str]:
    """The files, in order, each once; refuses what a worker would stumble over later."""
    files = sorted({file for pattern in patterns for file in glob.glob(pattern, recursive=True)})
    if missing := [p for p in patterns if not glob.glob(p, recursive=True)]:
        raise SystemExit(f"texts: there is no file {missing[0]}")
    if wrong := [f for f in files if not f.endswith(SUFFIXES) or not Path(f).is_file()]:
        raise SystemExit(f"texts: {wrong[0]} is none of {', '.join(SUFFIXES)}")
    folder = Path(output)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / BEGUN).exists()):
        raise SystemExit(f"--output {output} holds something else: name a new folder")
    return files
