"""Arguments of ``semantic_search.py``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .commands import DEFAULT, index, search, serve

EXAMPLES = """examples:
  semantic_search.py index ~/notes --to notes-index
  semantic_search.py search notes-index "what did we decide about the roof?"
  semantic_search.py serve notes-index --compare packaged"""


def parse(description: str | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=EXAMPLES, formatter_class=form)
    verbs = parser.add_subparsers(required=True, metavar="index | search | serve")

    def verb(run: Any, help: str) -> Any:
        made = verbs.add_parser(run.__name__, help=help, description=help[0].upper() + help[1:] + ".")
        made.set_defaults(run=run)
        made.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
        return made.add_argument

    add = verb(index, "embed the passages of a folder, or what changed in it")
    add(
        "texts",
        metavar="FOLDER_OF_TEXTS",
        type=Path,
        help="its *.txt, *.md, *.rst files, at any depth, in UTF-8",
    )
    add(
        "--to",
        metavar="INDEX_FOLDER",
        type=Path,
        required=True,
        help="for model and index: new, or one made so",
    )
    add(
        "--model",
        metavar="NAME",
        help=f"hub name or folder; made ternary where it is not (default: {DEFAULT}, which needs no network)",
    )
    add(
        "--kind",
        help="of index: flat (default), ivf-flat, ivf-pq, hnsw, int8, binary or a faiss factory string",
    )
    add(
        "--no-calibration",
        dest="calibrate",
        action="store_false",
        help="where a model is made ternary: do not fit its weights to the passages",
    )
    add("--strict", action="store_true", help="stop at a file that is not text, instead of leaving it out")
    add = verb(search, "answer questions in the terminal")
    add("index", metavar="INDEX_FOLDER", type=Path, help="made by index")
    add("query", metavar="QUERY", nargs="*", help="questions (default: lines of standard input)")
    add("-k", type=int, default=5, help="passages shown for each (default: 5)")
    add = verb(serve, "open a page for a browser on this machine")
    add("index", metavar="INDEX_FOLDER", type=Path, help="made by index")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    add("--compare", metavar="MODEL", help="show this model's answers too: packaged, a hub name or a folder")
    add(
        "--example",
        metavar="QUESTION",
        action="append",
        default=[],
        help="a question that the page offers; may be repeated (default: three titles of the texts)",
    )
    args = parser.parse_args()
    if getattr(args, "k", 1) < 1:
        parser.error(f"-k must be at least 1; received {args.k}")
    if not 0 <= getattr(args, "port", 0) < 65536:
        parser.error(f"--port must be 0 to 65535; received {args.port}")
    return args
