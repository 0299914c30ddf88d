"""Saving and loading ternary models, in transformers' own way."""
