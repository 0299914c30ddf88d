"""A corpus embedded by the actors of a Ray cluster."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from . import texts
from .shards import DONE, FILES, begin, count, embedded, parts_of
from .texts import BATCH, read

if TYPE_CHECKING:
    import pyarrow as pa
    from sentence_transformers import SentenceTransformer

PACKAGES = "tritern", "torch", "transformers", "tokenizers", "sentence-transformers", "ray"
BLOCK = 2**20
"""Ray keeps so many bytes of text or vectors together. Small blocks let all actors share a single file."""


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


def embed_corpus(
    files: list[str], settings: dict[str, Any], model: SentenceTransformer, args: argparse.Namespace
) -> None:
    """Write the parts that are not there, and last how all were made."""
    import ray
    from ray import cloudpickle
    from ray.data import DataContext

    for module in (texts, sys.modules[__name__]):  # workers need no copy of these files
        cloudpickle.register_pickle_by_value(module)
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
    total = count(folder)
    (folder / DONE).write_text(json.dumps(plan | {"texts": total, "files": files}, indent=1))
    print(f"{total:,} texts in {args.output}")


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
    found = ray.data.from_items(named, override_num_blocks=len(files)).map_batches(
        reader, batch_size=1, num_cpus=0
    )
    vectors = found.map_batches(
        Embedder,
        batch_size=BATCH,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=actors),
        fn_constructor_kwargs=settings | {"device": "cuda" if on_gpu else "cpu"},
        **share,
    )
    vectors.write_parquet(str(folder), min_rows_per_file=args.rows_per_shard, ray_remote_args={"num_cpus": 0})
