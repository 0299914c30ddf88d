"""Embed a corpus on every machine of a Ray cluster: text files in, Parquet shards with vectors out.

Ray Data reads the files, keeps a copy of the model on each GPU (on each CPU core where there is none) and
hands batches to whichever is free; ``tritern.search.embed`` embeds them, as on a single machine. Texts of
nothing but white space are left out. The id of a text is its file, as named here, and its line or row, from 1
("corpus.txt:17"), or what --id-column holds. With --index the shards, whose columns are id, text and vector,
go into a ``tritern.search.SearchIndex``, without being embedded again.

One machine: ``pip install 'tritern[ray,search]'``; Ray starts by itself. Several: the same versions on every
one, ``ray start`` on each, and a folder that all see under the same path (NFS, say) for texts, model, output.
"""

from __future__ import annotations

import argparse
import glob
import json
import logging
import os
import shutil
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from sentence_transformers import SentenceTransformer

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

BEGUN, DONE = "_embedding.json", "_embedded.json"
"""Beside the parts: how they are being made, and how they were. Parquet readers skip names with _ first."""
FILES = "_files.json"
"""In a part: its files and their sizes."""
PACKAGES = "tritern", "torch", "transformers", "tokenizers", "sentence-transformers", "ray"
SUFFIXES = ".txt", ".jsonl", ".parquet"
BATCH = 1024
"""Texts handed to an actor at once, sorted there by length."""
BLOCK = 2**20
"""Bytes of text or vectors that Ray keeps together: small, so that all actors share even a single file."""


def read(file: Any, column: str, id_column: str | None) -> Iterator[pa.Table]:
    """The texts of one file, a batch at a time, as tables of strings ``id`` and ``text``."""
    import pyarrow as pa

    (name,), (path,) = file["name"], file["path"]
    ids, texts = [], []
    for number, (own_id, text) in enumerate(records(str(path), column, id_column), 1):
        if not isinstance(text, str):
            raise ValueError(f"{path}, row {number}: {column!r} holds {text!r}; it must be a string")
        if id_column is not None and own_id is None:
            raise ValueError(f"{path}, row {number}: {id_column!r} holds no id")
        if text.strip():
            ids.append(f"{name}:{number}" if id_column is None else str(own_id))
            texts.append(text)
        if len(texts) == BATCH:
            yield pa.table({"id": ids, "text": texts})
            ids, texts = [], []
    yield pa.table({"id": pa.array(ids, pa.string()), "text": pa.array(texts, pa.string())})


def records(path: str, column: str, id_column: str | None) -> Iterator[tuple[Any, Any]]:
    """Id (None without a column of them) and text of every row of a file."""
    if path.endswith(".parquet"):
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        columns = [column] if id_column is None else [column, id_column]
        if missing := set(columns) - set(file.schema_arrow.names):
            there = ", ".join(file.schema_arrow.names)
            raise ValueError(f"{path} has no column {missing.pop()!r}; it has {there}")
        for batch in file.iter_batches(BATCH, columns=columns):
            texts = batch.column(column).to_pylist()
            yield from zip(batch.column(id_column).to_pylist() if id_column else [None] * len(texts), texts)
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if path.endswith(".txt"):
                    yield None, text
                else:
                    row = json.loads(text)
                    yield row[id_column] if id_column else None, row[column]
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                wanted = " and ".join(repr(c) for c in (column, id_column) if c)
                raise ValueError(
                    f"{path}, line {number}: not a JSON object with {wanted} ({error!r})"
                ) from None


def load(model: str, patch: bool, dtype: str | None, device: str | None = None) -> SentenceTransformer:
    import torch
    from sentence_transformers import SentenceTransformer

    import tritern
    from tritern.pretrained import resolve

    settings = {"dtype": getattr(torch, dtype)} if dtype else {}
    loaded = SentenceTransformer(resolve(model), device=device, model_kwargs=settings)
    return tritern.patch(loaded) if patch else loaded


def description(model: SentenceTransformer) -> dict[str, Any]:
    """What vectors depend on: a model of the same name may be another by now."""
    from tritern.checkpoint.digest import digest

    names = "prompts", "default_prompt_name", "max_seq_length", "truncate_dim"
    said = {name: getattr(model, name) for name in names}
    return {"weights": digest(model.state_dict().items()), "modules": str(model)} | said


class Embedder:
    """An actor: loads the model once, then embeds batch after batch."""

    def __init__(self, **settings: Any) -> None:
        # of 1,024 shapes by default: what oneDNN keeps of them splits up the memory that others have freed
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        self.model = load(**settings)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with a column ``vector``: lists of float32, all of the model's width."""
        import pyarrow as pa

        from tritern.search import embed

        vectors = embed(self.model, batch.column("text").to_pylist(), task="document").cpu().numpy()
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        return batch.append_column("vector", column)


def begin(folder: Path, plan: dict[str, Any]) -> None:
    """Keep how the parts are made; refuse to go on in another way once there are some."""
    file = folder / BEGUN
    if not any(folder.glob("part-*")):
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(plan, indent=1))
    before = json.loads(file.read_text())
    if other := [name for name in plan if plan[name] != before.get(name)]:
        raise SystemExit(
            f"--output {folder} was begun with other {', '.join(other)}: name a new folder, or delete it"
        )


def embedded(folder: Path, sizes: dict[str, int]) -> dict[str, int]:
    """Files in the parts that are there, with their sizes; refuses files that are not the same any more."""
    there: dict[str, int] = {}
    for part in folder.glob("part-*"):
        there |= json.loads((part / FILES).read_text())
    if changed := [file for file in there if sizes.get(file) != there[file]]:
        what = "has another size now" if changed[0] in sizes else "is not among the texts now"
        raise SystemExit(f"{changed[0]} is embedded in {folder}, and {what}: name a new folder")
    return there


def parts_of(sizes: dict[str, int], size: float) -> list[list[str]]:
    """Files in their order, so many together that they have ``size`` bytes or, but for one alone, less."""
    parts: list[list[str]] = []
    room = 0.0
    for file in sizes:
        if not parts or sizes[file] > room:
            parts.append([])
            room = size
        parts[-1].append(file)
        room -= sizes[file]
    return parts


def embed_corpus(
    files: list[str], settings: dict[str, Any], model: SentenceTransformer, args: argparse.Namespace
) -> None:
    """Write the parts that are not there, and last how all were made."""
    import ray
    from ray.data import DataContext

    folder = Path(args.output).resolve()
    local: dict[str, Any] = {} if args.address else {"include_dashboard": False}
    if not ray.is_initialized():
        ray.init(address=args.address, **local)
    for name in ("_internal.execution.streaming_executor_state", "exceptions"):
        logging.getLogger(f"ray.data.{name}").setLevel(logging.CRITICAL)  # errors are told once, by main()
    available = ray.cluster_resources()
    gpus, cpus = int(available.get("GPU", 0)), int(available.get("CPU", 1))
    actors = args.actors or gpus or cpus
    print(f"{len(files)} files; {actors} copies of the model on {f'{gpus} GPUs' if gpus else f'{cpus} CPUs'}")
    context = DataContext.get_current()
    context.execution_options.preserve_order = True  # shards follow the corpus
    context.target_max_block_size = BLOCK
    plan = settings | {"column": args.column, "id_column": args.id_column, "gpus": gpus > 0}
    plan |= description(model) | {name: version(name) for name in PACKAGES}
    begin(folder, plan)
    sizes = {file: Path(file).stat().st_size for file in files}
    there = embedded(folder, sizes)
    if there:
        print(f"{len(there)} of the files are embedded already")
    parts = parts_of({file: size for file, size in sizes.items() if file not in there}, 1e6 * args.part_mb)
    if parts:
        (folder / DONE).unlink(missing_ok=True)
    first = len(list(folder.glob("part-*")))
    for number, part in enumerate(parts, first):
        under_way = folder / f"_part-{uuid4().hex}"  # of this run alone
        under_way.mkdir()
        embed_part(part, under_way, settings, args, actors, gpus > 0)
        (under_way / FILES).write_text(json.dumps({file: sizes[file] for file in part}))
        try:
            under_way.rename(folder / f"part-{number:05}")
        except OSError:
            raise SystemExit(f"another run has written to {folder} meanwhile: let one end first") from None
        print(f"part {number + 1} of {first + len(parts)} is done", flush=True)
    for left in folder.glob("_part-*"):
        shutil.rmtree(left, ignore_errors=True)
    texts = count(folder)
    (folder / DONE).write_text(json.dumps(plan | {"texts": texts, "files": files}, indent=1))
    print(f"{texts:,} texts in {args.output}")


def embed_part(
    files: list[str],
    folder: Path,
    settings: dict[str, Any],
    args: argparse.Namespace,
    actors: int,
    on_gpu: bool,
) -> None:
    """Write the shards of some files."""
    import ray
    from ray.data import ActorPoolStrategy

    reader: Any = partial(read, column=args.column, id_column=args.id_column)
    share: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
    # reading and writing wait for disks: if they asked for a CPU, actors on all of them would leave none
    named = [{"name": file, "path": str(Path(file).resolve())} for file in files]
    texts = ray.data.from_items(named, override_num_blocks=len(files)).map_batches(
        reader, batch_size=1, num_cpus=0
    )
    embedded = texts.map_batches(
        Embedder,
        batch_size=BATCH,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=actors),
        fn_constructor_kwargs=settings | {"device": "cuda" if on_gpu else "cpu"},
        **share,
    )
    embedded.write_parquet(
        str(folder), min_rows_per_file=args.rows_per_shard, ray_remote_args={"num_cpus": 0}
    )


def shards_of(folder: Path) -> list[Path]:
    """The shards of complete parts, in the order of the corpus."""
    return sorted(folder.glob("part-*/*.parquet"))


def count(folder: Path) -> int:
    """Rows of the shards."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(file).num_rows for file in shards_of(folder))


def index_shards(model: SentenceTransformer, args: argparse.Namespace) -> None:
    """Build the index from the shards; the model is needed for its fingerprint and for queries."""
    from tritern import TriternError
    from tritern.search import SearchIndex

    try:
        batches = rows(Path(args.output))
        ids, texts, vectors = next(batches, ([], [], None))
        if vectors is None:
            raise SystemExit(f"--output {args.output} holds no texts: there is nothing to index")
        # an index is never empty, so the first text is embedded again; kinds are trained on all, at the end
        with SearchIndex.build(args.index, model, texts[:1], ids[:1]) as index:
            index.add(texts[1:], ids[1:], vectors=vectors[1:])
            for ids, texts, vectors in batches:
                index.add(texts, ids, vectors=vectors)
                print(f"\r{len(index):,} texts", end="", flush=True)
            if args.kind != index.kind:
                index.reindex(args.kind)
            print(f"\r{len(index):,} texts in {args.index} ({index.factory})")
    except TriternError as error:
        raise SystemExit(f"error: {error}") from None


def rows(folder: Path) -> Iterator[tuple[list[str], list[str], np.ndarray]]:
    """Ids, texts and vectors of the shards, so many at a time as a shard has at least."""
    import pyarrow.parquet as pq

    for file in shards_of(folder):
        for batch in pq.ParquetFile(file).iter_batches(100_000):
            vectors = batch.column("vector").flatten().to_numpy().reshape(batch.num_rows, -1)
            yield batch.column("id").to_pylist(), batch.column("text").to_pylist(), vectors


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=form)
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


def reason(error: BaseException) -> str:
    """What went wrong in the first place, in a line; Ray wraps it several times."""
    inner = getattr(error, "cause", None) or error.__cause__
    return reason(inner) if inner is not None else str(error).strip().splitlines()[0]


def main() -> None:
    args = parse()
    files, done = find(args.texts, args.output) if args.texts else [], Path(args.output) / DONE
    made: dict[str, Any] = {}
    if files:
        name = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
        settings = {"model": name, "patch": args.patch, "dtype": args.dtype}
    elif done.exists():
        made = json.loads(done.read_text())
        settings = {key: made[key] for key in ("model", "patch", "dtype")}
    else:
        raise SystemExit(
            f"--output {args.output} holds no complete shards (no {DONE}): name texts and --model"
        )
    try:
        model = load(**settings, device="cpu")  # here too, so that errors show before Ray starts
        from ray.exceptions import RayError
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}: pip install 'tritern[ray,search]'") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"--model {settings['model']}: {reason(error)}") from None
    if files:
        try:
            embed_corpus(files, settings, model, args)
        except (RayError, ConnectionError) as error:
            raise SystemExit(f"error: {reason(error)}") from None
    elif other := [name for name, value in description(model).items() if value != made.get(name)]:
        raise SystemExit(
            f"{settings['model']} has other {', '.join(other)} than when {args.output} was embedded: its "
            "queries would not find those vectors. Put the model back, or embed anew"
        )
    if args.index:
        index_shards(model, args)


if __name__ == "__main__":
    main()
