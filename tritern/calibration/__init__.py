"""Weights fitted to texts, without training."""
