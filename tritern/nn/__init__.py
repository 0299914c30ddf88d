"""Ternary layers and rounded embedding tables, as modules of torch."""
