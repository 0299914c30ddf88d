"""From texts to vectors: tokens without Python lists, texts packed end to end, CUDA graphs, pooling.

Data goes ``tokens`` -> ``packing`` -> ``runner`` (``families`` say how a model runs on packed texts) ->
``pooling``; ``padded`` is for CPUs and models that have no packed form. ``pipeline`` overlaps the steps,
``path`` says which a model takes, ``encoder`` puts them behind ``model.encode``.
"""
