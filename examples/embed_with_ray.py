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

import json
from pathlib import Path
from typing import Any

from embed_corpus.arguments import find, parse
from embed_corpus.cluster import description, embed_corpus, load
from embed_corpus.shards import DONE, index_shards


def reason(error: BaseException) -> str:
    """What went wrong in the first place, in a line; Ray wraps it several times."""
    inner = getattr(error, "cause", None) or error.__cause__
    return reason(inner) if inner is not None else str(error).strip().splitlines()[0]


def main() -> None:
    args = parse(__doc__)
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
