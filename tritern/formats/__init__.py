"""Ternary models for and from other programs."""
