"""From texts to vectors: tokens without Python lists, texts packed end to end, CUDA graphs, pooling.

Data goes ``tokens`` -> ``packing`` -> ``runner`` -> ``pooling``. ``families`` says how each model runs on
packed texts. ``padded`` serves CPUs and models without a packed form. ``pipeline`` overlaps the steps,
``path`` chooses between packed and padded, ``encoder`` puts both behind ``model.encode``.
"""
