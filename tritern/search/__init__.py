"""Semantic search: ``SearchIndex.build(folder, model, texts)``, then ``index.search(queries)``.

A sentence-transformer embeds, faiss finds. It needs the ``search`` or the ``gpu-search`` extra.
"""

from .embed import embed
from .index import SearchIndex
from .kinds import KINDS
from .searching import Hit

__all__ = ["KINDS", "Hit", "SearchIndex", "embed"]
