"""The parts of ``embed_with_ray.py``: reading texts, embedding them on a cluster, shards, arguments."""
