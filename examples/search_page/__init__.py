"""The parts of ``semantic_search.py``: passages, index, server, page and arguments."""
