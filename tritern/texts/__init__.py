"""Texts of files, and samples of them."""
